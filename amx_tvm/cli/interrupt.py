"""Ctrl-C, also where it strikes inside TVM.

A KeyboardInterrupt that is raised in a Python callback under TVM's C++ code comes out as a
RuntimeError. So the handler notes that the user pressed Ctrl-C, and whatever exception ends the
command afterwards counts as that.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

_pressed = False


def watch() -> None:
    """Start noting Ctrl-C; it still raises KeyboardInterrupt."""
    clear()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _handle)


def clear() -> None:
    """Forget a Ctrl-C that was dealt with."""
    global _pressed
    _pressed = False


def pressed() -> bool:
    """Whether Ctrl-C was pressed since `watch` or `clear`."""
    return _pressed


def _handle(number: int, frame: FrameType | None) -> None:
    global _pressed
    _pressed = True
    raise KeyboardInterrupt
