"""Tuning: which knobs the project's own schedules get on one exact machine, found by measuring.

tasks.py    a model's configuration -> its distinct kernels and how often each runs
spaces.py   a kernel -> the values that each knob may take, the default among them
search.py   which point to measure next, when a challenger wins, when to stop
measure.py  warm worker processes with time limits; oracle.py says what is right
records.py  what was found, one JSON line a kernel; lookup.py hands it to the compiler
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_LAZY = {
    "Record": "tuning.records",
    "RecordFile": "tuning.records",
    "Task": "tuning.tasks",
    "tune": "tuning.api",
}

__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'tuning' has no attribute {name!r}")
