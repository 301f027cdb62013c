"""Integers that every step gives the compiled functions, in memory that is kept for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from amx_tvm.runtime.vm import VirtualMachine, aligned

_LENGTHS = 256  # of which views are kept


class Vector:
    """An int32 vector on the device that the next step overwrites: nothing is allocated for it.

    On CPUs the device's memory is the host's. A GPU copies it from pinned memory, in the order of
    its work, while the host goes on: whoever puts the next step's has read the results of this one.
    TVM takes no tensor that begins inside another: every vector has memory of its own.
    """

    def __init__(self, machine: VirtualMachine):
        self._machine = machine
        self._copy = None if machine.is_cpu else machine.builtin("runtime.TVMTensorCopyFromTo")
        self._memory = np.empty(0, np.int32)
        self._tensor: Any = None
        self._stage: Any = None  # the pinned memory as a tensor, on GPUs
        self._views: dict[int, tuple[Any, Any, np.ndarray]] = {}

    def put(self, values: Sequence[int] | np.ndarray) -> Any:
        """Return integers as a tensor, int32 [n]; valid until the next call."""
        tensor, stage, place = self._views.get(len(values)) or self._view(len(values))
        place[:] = values
        if self._copy is not None:
            self._copy(stage, tensor)
        return tensor

    def _view(self, count: int) -> tuple[Any, Any, np.ndarray]:
        if count > self._memory.size or self._tensor is None:
            self._grow(max(count, 2 * self._memory.size, 1))
        elif len(self._views) == _LENGTHS:
            self._views.clear()
        tensor, stage = (
            None if whole is None else self._machine.view(whole, [count])
            for whole in (self._tensor, self._stage)
        )
        view = self._views[count] = tensor, stage, self._memory[:count]
        return view

    def _grow(self, size: int) -> None:
        zeros = aligned(np.zeros(size, np.int32))
        self._tensor = self._machine.to_device(zeros)
        if self._copy is None:
            self._memory = zeros
        else:
            self._stage, self._memory = self._machine.mailbox(size)
        self._views.clear()
