"""Pages of keys and values in few bits on a GPU, and how a step is told of them.

One tensor of the device says of a step's sequences what its kernels need. Its copy from pinned
memory is ordered behind the step before, so the next may be prepared while one is under way.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np

from amx_tvm.runtime.kv_packed import PackedPages

HEADER = 16  # numbers in front of what is told of sequences
_STAGES = 3  # a step's copy may still wait when the next is staged


class DevicePages(PackedPages):
    """Pages in the memory of a GPU.

    ``create_kv_cache`` returns the state that kernels take, pages uint8 [pages, bytes], tokens in
    16 bits float16 [sequences, ..], int32 in which a step is told of its sequences, and tables.
    """

    def _open(self, made: tuple[Any, ...]) -> tuple[int, tuple[int, int]]:
        self._made = made
        state, self._page_rows, self._places, self._told, _ = made
        machine = self._machine
        self._copy_tensor = machine.builtin("runtime.TVMTensorCopyFromTo")
        places = int(self._places.shape[0])
        self._rounded = int(self._told.shape[0]) - places  # where the kernels' own numbers begin
        self._stages = [machine.mailbox(self._rounded) for _ in range(_STAGES)]
        self._stage = 0
        self.arguments = (machine.tuple_of([self._told]), state)
        shape = self._page_rows.shape
        return int(shape[0]), (int(shape[1]), 2 * int(self._places.shape[1]))

    def _copy_page(self, source: int, target: int) -> None:
        self._copy_row(self._page_rows, source, target)

    def _copy_place(self, source: int, target: int) -> None:
        self._copy_row(self._places, source, target)
        rounded = [self._machine.row(self._told, self._rounded + i) for i in (source, target)]
        self._copy_tensor(*rounded)

    def _clear_place(self, sequence: int) -> None:
        """Leave it: kernels read nothing that was not written."""

    def _tell(self, rows: np.ndarray, told: np.ndarray, tables: list[list[int]]) -> None:
        machine, n = self._machine, len(told)
        self._stage = (self._stage + 1) % _STAGES
        tensor, view = self._stages[self._stage]
        lengths = np.fromiter(map(len, tables), np.int32, n)
        at_rows = HEADER + told.size
        at_tables = at_rows + rows.size
        end = at_tables + int(lengths.sum())
        told[:, 5] = at_tables + np.cumsum(lengths) - lengths
        view[:4] = n, rows.shape[1], at_rows, self._rounded
        view[HEADER:at_rows] = told.ravel()
        view[at_rows:at_tables] = rows.ravel()
        view[at_tables:end] = np.fromiter(chain.from_iterable(tables), np.int32, end - at_tables)
        self._copy_tensor(machine.view(tensor, [end]), machine.view(self._told, [end]))

    def _copy_row(self, tensor: Any, source: int, target: int) -> None:
        self._copy_tensor(self._machine.row(tensor, source), self._machine.row(tensor, target))
