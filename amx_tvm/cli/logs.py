"""What `-v` and AMX_TVM_LOG let the library say on stderr while it works."""

from __future__ import annotations

import logging
import os
import sys

from amx_tvm.errors import AmxError

VARIABLE = "AMX_TVM_LOG"
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}


def start(verbose: int) -> None:
    """Show what the package logs: by ``-v`` (steps) or ``-vv`` (details), else by the variable.

    Raises
    ------
    AmxError
        The variable names no level.
    """
    name = os.environ.get(VARIABLE, "") if not verbose else "info" if verbose == 1 else "debug"
    if not name:
        return
    if name.lower() not in LEVELS:
        raise AmxError(f"{VARIABLE} is {name!r}, expected {', '.join(LEVELS)}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(relativeCreated)6.0f ms %(name)s: %(message)s"))
    log = logging.getLogger("amx_tvm")
    log.handlers = [handler]
    log.setLevel(LEVELS[name.lower()])
    log.propagate = False  # `serve` has a handler of its own at the root
