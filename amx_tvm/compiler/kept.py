"""Artifacts that are compiled once and kept in the user's cache, for `amx-tvm run`.

A kept artifact's folder is named by the model and the quantization, and by a digest of all that
decides what is compiled: the weights, the target, the quantization and the versions.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from amx_tvm.artifact import Manifest
from amx_tvm.artifact.names import default_output
from amx_tvm.compiler.compile import Progress, compile
from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import ArtifactError
from amx_tvm.frontends import open_model
from amx_tvm.targets import resolve
from amx_tvm.user_cache import cache_folder
from amx_tvm.version import versions

log = logging.getLogger("amx_tvm.compiler")
MANIFEST = "manifest.json"
_DIGITS = 10  # of the digest, in a folder's name


@dataclass(frozen=True)
class Kept:
    """A kept artifact: its folder, what it holds ("" where it cannot be read), and its bytes."""

    path: Path
    model: str
    quantization: str
    target: str
    bytes: int


def kept_artifact(
    model: str | os.PathLike[str],
    target: str = "llvm",
    quantization: str = "amxfp4",
    progress: Progress | None = None,
) -> Path:
    """Return the folder of a model's artifact, which is compiled where it is not kept yet.

    Parameters
    ----------
    model, target, quantization, progress
        As for :func:`amx_tvm.compile`; an artifact's own folder is returned as it is.

    Raises
    ------
    AmxError
        As :func:`amx_tvm.compile`.
    """
    if (Path(model) / MANIFEST).is_file():
        return Path(model)
    resolved = resolve(target)
    config = QuantizationConfig.parse(quantization).resolve(resolved.device)
    source = open_model(model)
    said: list[Any] = [source.digest(), asdict(resolved.record()), config.describe(), versions()]
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:_DIGITS]
    path = _folder() / f"{default_output(source.name, config.format).name}-{digest}"
    there = (path / MANIFEST).is_file()
    log.info("%s: %s", path, "taken as it is" if there else "compiled first")
    if not there:
        path.parent.mkdir(parents=True, exist_ok=True)
        compile(source, target, quantization, path, progress=progress)
    return path


def kept_artifacts() -> list[Kept]:
    """Return all kept artifacts by name."""
    folders = _folder().iterdir() if _folder().is_dir() else ()
    return [_read(path) for path in sorted(folders) if path.is_dir() and path.name[0] != "."]


def remove_kept(names: Sequence[str]) -> list[Kept]:
    """Remove kept artifacts and return what they were.

    Parameters
    ----------
    names : sequence of str
        Names of folders or of models, or beginnings of a folder's name.

    Raises
    ------
    ArtifactError
        For a name that is none of them, or the beginning of several; nothing is removed then.
    """
    there, chosen = kept_artifacts(), []
    for name in names:
        found = [one for one in there if name in (one.path.name, one.model)]
        found = found or [one for one in there if name and one.path.name.startswith(name)]
        if len(found) != 1:
            known = ", ".join(one.path.name for one in found or there) or "none"
            problem = "names several kept artifacts" if found else "is no kept artifact"
            raise ArtifactError(f"{name!r} {problem}; expected one of: {known}")
        chosen += [one for one in found if one not in chosen]
    for one in chosen:
        shutil.rmtree(one.path)
    return chosen


def _folder() -> Path:
    return cache_folder("artifacts")


def _read(path: Path) -> Kept:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    try:
        manifest = Manifest.load(path)
    except ArtifactError:
        return Kept(path, "", "", "", size)
    formats = str(manifest.quantization.get("format", ""))
    return Kept(path, str(manifest.model.get("name", "")), formats, manifest.target.key, size)
