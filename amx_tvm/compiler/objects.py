"""Object files of an executable: written by threads, and in memory.

As TVM's ``export_library`` does, ``lib0.o``, ``lib1.o``, ... hold the kernels and ``devc.o`` all
else, but LLVM makes the machine code of several at once. LLVM ends the process where it cannot
write a file to its end: the names are links to files in memory (memfd_create), which a linker reads
through this process's entry in /proc; a full or read-only disk is then met by the linker alone,
which says so.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from relax_passes.machine_code import PARTS, in_threads

_NAMES = (*(f"lib{index}.o" for index in range(PARTS)), "devc.o")


def export(executable: Any, path: Path, build: Callable[..., Any]) -> None:
    """Write an executable's object files and call ``build`` (path, files)."""
    from tvm.runtime import _ffi_api

    kernels = executable.mod._collect_dso_modules()
    with object_folder(path.parent) as folder:
        if any(one.kind != "llvm" for one in kernels):  # TVM's stand-in where there are none, in C
            executable.export_library(str(path), fcompile=build, workspace_dir=folder)
            return
        files = [f"{folder}/lib{i}.o" for i in range(len(kernels))]
        in_threads(lambda one: one[0].write_to_file(one[1]), zip(kernels, files, strict=True))
        target = kernels[0].get_function("_get_target_string")()
        files.append(f"{folder}/devc.o")
        _ffi_api.ModulePackImportsToLLVM(executable.mod, False, target, "").write_to_file(files[-1])
        build(str(path), files)


@contextmanager
def object_folder(parent: Path) -> Iterator[str]:
    """Make a workspace for ``export_library`` below ``parent``; it is removed at the end."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=parent, prefix=".objects-"))
        for name in _NAMES if hasattr(os, "memfd_create") else ():
            descriptor = os.memfd_create(name)
            stack.callback(os.close, descriptor)
            os.symlink(f"/proc/{os.getpid()}/fd/{descriptor}", Path(folder) / name)
        yield folder
