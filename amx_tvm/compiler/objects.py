"""Object files in memory, because LLVM ends the process where it cannot write one to its end.

TVM's ``export_library`` writes ``lib0.o``, ``lib1.o``, ... and ``devc.o`` into its workspace. Here
those names are links to files in memory (memfd_create), which a linker reads through this process's
entry in /proc; a full or read-only disk is then met by the linker alone, which says so.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

_NAMES = (*(f"lib{index}.o" for index in range(4)), "devc.o")


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
