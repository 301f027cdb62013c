"""Integers that every step gives the compiled functions, in memory that is kept for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from amx_tvm.runtime.vm import VirtualMachine, aligned

_LENGTHS = 256  # of which views are kept


class Vector:
    """An int32 vector on the device that the next step overwrites: nothing is allocated for it.

    On CPUs the device's memory is the host's. TVM's functions take no tensor that begins inside
    another, so every vector has memory of its own.
    """

    def __init__(self, machine: VirtualMachine):
        self._machine = machine
        self._memory = np.empty(0, np.int32)
        self._tensor: Any = None
        self._views: dict[int, tuple[Any, np.ndarray]] = {}

    def put(self, values: Sequence[int] | np.ndarray) -> Any:
        """Return integers as a tensor, int32 [n]; valid until the next call."""
        tensor, place = self._views.get(len(values)) or self._view(len(values))
        place[:] = values
        self._machine.upload(tensor, place)
        return tensor

    def _view(self, count: int) -> tuple[Any, np.ndarray]:
        if count > self._memory.size:
            self._memory = aligned(np.zeros(max(count, 2 * self._memory.size), np.int32))
            self._tensor = self._machine.to_device(self._memory)
            self._views.clear()
        elif len(self._views) == _LENGTHS:
            self._views.clear()
        view = self._views[count] = (
            self._machine.view(self._tensor, [count]),
            self._memory[:count],
        )
        return view
