"""The same input, the same library: a process whose addresses are the same every time.

TVM 0.27 orders parts of the generated code (the shape functions) by the addresses of objects, so a
few instructions change places from run to run; with address randomization off they do not.
Parameters, manifest and archive never depend on it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_ADDR_NO_RANDOMIZE = 0x0040000  # linux/personality.h
_QUERY = 0xFFFFFFFF
_COMMANDS = ("amx-tvm", "__main__.py")


def fix_addresses() -> bool:
    """Start the command line again without address randomization; return whether it is off.

    Does nothing in any other process than the command line's own, which cannot be started again,
    and where the system does not allow it (some containers).
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "personality"):
        return False
    current = libc.personality(ctypes.c_ulong(_QUERY))
    if current != -1 and current & _ADDR_NO_RANDOMIZE:
        return True
    if Path(sys.argv[0]).name not in _COMMANDS:
        return False
    if current == -1 or libc.personality(ctypes.c_ulong(current | _ADDR_NO_RANDOMIZE)) == -1:
        return False
    if not libc.personality(ctypes.c_ulong(_QUERY)) & _ADDR_NO_RANDOMIZE:
        return False
    os.environ["PYTHONHASHSEED"] = "0"
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
