"""Pages of keys and values in few bits: who has which, and what a step's kernels are told.

The kernels (``relax_passes/kernels/cpu/packed_cache`` and ``cuda/packed_cache``) round tokens into
their pages and read the newest of a sequence, and its first ones, from a place in 16 bits that
each sequence has. `PackedPages` keeps both in the host's memory, `DevicePages` (kv_device.py) on a
GPU. A fork shares full pages, and copies the last one, if it is partly filled, and the place. A
page that several sequences share is copied before one of them, rolled back into it, writes there.

What a fork or a rollback makes the newest again is read as it was rounded: its 16 bits are gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from amx_tvm.errors import ArtifactError
from amx_tvm.runtime.vm import VirtualMachine


class PackedPages:
    """The pages of a cache of few bits, counted here.

    Parameters
    ----------
    machine : VirtualMachine
        Whose functions take them.
    made : sequence of tensor
        What ``create_kv_cache`` returned: pages uint8 [pages, ..], and the places of sequences'
        tokens in 16 bits, float16 [sequences, ..].
    page_size : int
        Tokens of a page.
    stored : mapping
        What the manifest says of the cache: its key "packed".

    Raises
    ------
    ArtifactError
        The tensors are not of the sizes that the manifest says.
    """

    def __init__(
        self, machine: VirtualMachine, made: Sequence[Any], page_size: int, stored: dict[str, Any]
    ):
        self._machine, self._page_size, self._newest = machine, page_size, int(stored["newest"])
        self.arguments: tuple[Any, ...] = ()
        pages, found = self._open(tuple(made))
        said = (int(stored["page_bytes"]), int(stored["sequence_bytes"]))
        if found != said:
            raise ArtifactError(
                f"the library's cache has {found[0]} bytes a page and {found[1]} a sequence, the "
                f"manifest says {said[0]} and {said[1]}; compile the model again"
            )
        self._free = list(range(pages - 1, -1, -1))
        self._users = [0] * pages
        self._tables: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._exact: dict[int, int] = {}  # from which token on a sequence's are in 16 bits

    def _open(self, made: tuple[Any, ...]) -> tuple[int, tuple[int, int]]:
        """Take the tensors; returns how many pages there are, bytes of one and of a place."""
        self._made = made
        self._pages, self._recent = (self._machine.rows_of(tensor) for tensor in made)
        return len(self._pages), (self._pages.shape[1], self._recent.shape[1])

    def _copy_page(self, source: int, target: int) -> None:
        """Copy a page."""
        self._pages[target] = self._pages[source]

    def _copy_place(self, source: int, target: int) -> None:
        """Copy a sequence's tokens in 16 bits."""
        self._recent[target] = self._recent[source]

    def _clear_place(self, sequence: int) -> None:
        """Prepare a new sequence's place: no NaN, what is not read is multiplied by 0."""
        self._recent[sequence] = 0

    def _tell(self, rows: np.ndarray, told: np.ndarray, tables: list[list[int]]) -> None:
        """Make the arguments of a step.

        Parameters
        ----------
        rows : ndarray
            int32 [2, rows]: each row's position, and its sequence.
        told : ndarray
            int32 [sequences, 8]: see the layouts of the kernels.
        tables : list of list of int
            Pages of each sequence.
        """
        most = max(1, *map(len, tables))
        padded = np.zeros((len(tables), most), np.int32)
        for i, table in enumerate(tables):
            padded[i, : len(table)] = table
        step = [self._machine.to_device(array) for array in (rows, told, padded)]
        self.arguments = (self._machine.tuple_of([*step, *self._made]),)

    def available(self) -> int:
        """Return how many pages are free."""
        return len(self._free)

    def needed(self, sequence: int, length: int, count: int) -> int:
        """Return how many pages a sequence of a length needs for so many more tokens."""
        page = self._page_size
        grown = (length + count + page - 1) // page - (length + page - 1) // page
        return grown + int(count > 0 and self._shares_last(sequence))

    def add(self, sequence: int) -> None:
        """Start an empty sequence."""
        self._tables[sequence], self._lengths[sequence], self._exact[sequence] = [], 0, 0
        self._clear_place(sequence)

    def remove(self, sequence: int) -> None:
        """Forget a sequence."""
        self._release(self._tables.pop(sequence))
        del self._lengths[sequence], self._exact[sequence]

    def fork(self, parent: int, child: int, position: int, _length: int) -> None:
        """Start a sequence that shares the first tokens of another."""
        full = position // self._page_size
        table = self._tables[parent][:full]
        for page in table:
            self._users[page] += 1
        if position % self._page_size:
            table.append(self._copy(self._tables[parent][full]))
        self._tables[child], self._lengths[child] = table, position
        self._exact[child] = min(self._exact[parent], position)
        self._copy_place(parent, child)

    def pop(self, sequence: int, count: int) -> None:
        """Forget the last tokens of a sequence."""
        length = self._lengths[sequence] = self._lengths[sequence] - count
        kept, table = -(-length // self._page_size), self._tables[sequence]
        self._release(table[kept:])
        del table[kept:]
        self._exact[sequence] = min(self._exact[sequence], length)

    def begin(self, sequences: Sequence[int], counts: Sequence[int]) -> None:
        """Reserve positions for one pass, and make what it is told."""
        told: list[tuple[int, ...]] = []
        positions: list[int] = []
        for sequence, count in zip(sequences, counts, strict=True):
            length, table = self._lengths[sequence], self._tables[sequence]
            if count and self._shares_last(sequence):
                shared = table[-1]
                table[-1] = self._copy(shared)
                self._users[shared] -= 1
            while len(table) * self._page_size < length + count:
                table.append(self._take())
            told.append((len(positions), count, length, self._exact[sequence], sequence, 0, 0, 0))
            positions.extend(range(length, length + count))
            # Even if the pass fails: its rows may lie where these tokens' 16 bits were.
            self._lengths[sequence] = length + count
            self._exact[sequence] = max(self._exact[sequence], length + count - self._newest)
        rows = np.array((positions, np.repeat(np.arange(len(counts)), counts)), np.int32)
        tables = [self._tables[sequence] for sequence in sequences]
        self._tell(rows, np.array(told, np.int32), tables)

    def end(self) -> None:
        """End the pass."""

    def _shares_last(self, sequence: int) -> bool:
        """Whether the page that a sequence would write into is another's too."""
        partly = self._lengths[sequence] % self._page_size
        return bool(partly) and self._users[self._tables[sequence][-1]] > 1

    def _take(self) -> int:
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _copy(self, page: int) -> int:
        new = self._take()
        self._copy_page(page, new)
        return new

    def _release(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._users[page] -= 1
            if not self._users[page]:
                self._free.append(page)
