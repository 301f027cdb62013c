"""Which compiler links a target's library: this machine's, Debian's cross compilers, the NDK's.

Where there is none, the object files can be kept to be linked elsewhere.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amx_tvm.errors import TargetError

NDK_VARIABLE = "TVM_NDK_CC"


def linker(triple: str) -> Any:
    """Return the function that links for a triple, or None for this machine's compiler.

    Raises
    ------
    TargetError
        When the compiler is not installed, with what installs it.
    """
    arch = triple.split("-")[0] if triple else platform.machine()
    if "android" in triple:
        compiler = os.environ.get(NDK_VARIABLE, "")
        hint = f"the NDK's clang++ (set {NDK_VARIABLE} to its path)"
    elif arch.replace("_", "-") == platform.machine().replace("_", "-"):
        return None
    else:
        compiler = f"{arch}-linux-gnu-g++"
        hint = f"{compiler} (Debian: apt-get install g++-{arch.replace('_', '-')}-linux-gnu)"
    if not shutil.which(compiler):
        raise TargetError(
            f"linking for {triple} needs {hint}; `amx-tvm export --no-link` writes object files "
            "and a script that links them elsewhere"
        )
    from tvm.support import cc

    return cc.cross_compiler(compiler, options=["-O2", "-s"])


def collector(folder: Path) -> Any:
    """Return what takes a linker's place: it copies the object files into a new folder."""

    def collect(output: str, objects: Sequence[str], **options: Any) -> None:
        folder.mkdir()
        for file in objects:
            shutil.copyfile(file, folder / Path(file).name)

    return collect
