"""What `amx-tvm run` was asked before, so that asking again imports no compiler.

An artifact's folder is named by what TVM says of the target. Beside the folders, a link for each
question that was answered leads to its folder: the question has all that the answer depends on.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from contextlib import suppress
from pathlib import Path

from amx_tvm.artifact.cpu import cpu_features, limit
from amx_tvm.artifact.kept import is_artifact, kept_folder
from amx_tvm.config import QuantizationConfig
from amx_tvm.frontends import open_model
from amx_tvm.version import versions

_CPUINFO = Path("/proc/cpuinfo")
_NAMES = ("vendor_id", "cpu family", "model", "model name", "stepping", "CPU part")


class Question:
    """A model, a target and a quantization on this machine, and the folder that answers it.

    Parameters
    ----------
    model, target, quantization : str
        As for `amx-tvm run`. Only ``llvm`` is remembered: GPUs come and go.
    """

    def __init__(self, model: str, target: str, quantization: str) -> None:
        self._link: Path | None = None
        if target == "llvm":
            config = QuantizationConfig.parse(quantization).describe()
            here = [_cpu(), os.cpu_count(), limit(), sorted(cpu_features())]
            said = [_model(model), config, versions(), here]
            digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
            self._link = kept_folder() / f".asked-{digest[:20]}"

    def answer(self) -> Path | None:
        """Return the folder, where one was remembered and is still there."""
        if self._link is None or not self._link.is_symlink() or not is_artifact(self._link):
            return None
        return self._link.parent / os.readlink(self._link)

    def remember(self, folder: Path) -> None:
        """Keep the answer; where that cannot be written, the next time asks again."""
        if self._link is not None:
            with suppress(OSError):
                self._link.unlink(missing_ok=True)
                self._link.symlink_to(folder.name)


def _model(name: str) -> object:
    """Return what changes with a model: the times of a path's files, or what it holds.

    To open a directory takes its family, which is written with TVM.
    """
    path = Path(name)
    if not path.exists():
        return open_model(name).digest()
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [(file.name, file.stat()) for file in files if file.is_file()]
    return [str(path.resolve()), *((name, s.st_size, s.st_mtime_ns) for name, s in found)]


def _cpu() -> list[str]:
    """Return the lines of the first CPU by which LLVM may know its name, and the architecture."""
    try:
        first = _CPUINFO.read_text("utf-8", "replace").split("\n\n")[0].splitlines()
    except OSError:
        first = []
    return [platform.machine(), *(line for line in first if line.split("\t")[0] in _NAMES)]
