"""One thread at a time in TVM's compiler.

Passes of TVM 0.27 share their arithmetic analyzers between the threads of a process: two compiles
at once end in failed checks that no Python code can catch. Whoever lowers or builds takes this lock
for the whole of it; a second thread waits. Processes do not share it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")

_lock = threading.RLock()


def one_at_a_time(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Let one thread at a time run the functions that are decorated with this."""

    @wraps(function)
    def alone(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        with _lock:
            return function(*args, **kwargs)

    return alone


def _renew() -> None:
    """Give a forked child a lock of its own: nobody there would release the parent's."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew)
