"""Activations as 16-bit words, both bytes of a code in one: words = 256 * codes + codes_low.

    x = scale / 256 * words      int16 [M / 4, G, 4 rows, 32]

Four neighbouring columns are in the order 0 2 1 3 (pair_words.py).  Four rows of a group lie side
by side: kernels read them so, and rows of 2048 columns would all be in the same lines of a cache.
So a group with second bytes costs what others cost.  A row is made of its codes first; second
bytes are added when the lists of groups are complete.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.outliers import listed_groups
from relax_passes.spec import GROUP, LinearSpec

from .pair_words import LOW_STEPS_BITS, ORDER

ROWS = 4  # that lie side by side


class XWords:
    """Words of M rows, ``rows`` at most.

    Attributes
    ----------
    unit : int
        Kernels read the words of blocks of so many rows, or more.
    """

    def __init__(self, spec: LinearSpec, buffers: Any, rows: int | Expr, unit: int):
        self.spec, self.buffers, self.unit = spec, buffers, unit
        units = tirx.floordiv(rows + (ROWS - 1), tirx.const(ROWS, "int32"))
        self.words = e.workspace((units, spec.groups, ROWS, GROUP), "int16")

    def make(self, m: Expr) -> None:
        """Make all rows, one after the other."""
        with e.serial(0, m) as row:
            self.row(row)

    def row(self, row: Expr) -> None:
        """Make a row whose list is complete."""
        self.start(row)
        self._add(row)

    def start(self, row: Expr, group: Expr | None = None) -> None:
        """Make a row (or a group of it) of its codes."""
        if group is not None:
            self._start(row, group)
            return
        with e.serial(0, self.spec.groups) as each:
            self._start(row, each)

    def list(self, m: Expr) -> None:
        """Add the second bytes of all rows."""
        with e.serial(0, m) as row:
            self._add(row)

    def _start(self, row: Expr, group: Expr) -> None:
        codes = self._codes("codes", row, group)
        shift = e.const(LOW_STEPS_BITS, "int16", GROUP)
        e.store(self.words, codes << shift, *self._place(row, group), 0, lanes=GROUP)

    def _add(self, row: Expr) -> None:
        if not self.spec.activation.outliers:
            return
        with listed_groups(self.buffers["outliers"], row) as group:
            low = self._codes("codes_low", row, group)
            place = (*self._place(row, group), 0)
            e.store(self.words, e.load(self.words, *place, lanes=GROUP) + low, *place, lanes=GROUP)

    def _place(self, row: Expr, group: Expr) -> tuple[Expr, Expr, Expr]:
        rows = tirx.const(ROWS, "int32")
        return e.let(tirx.truncdiv(row, rows)), group, e.let(tirx.truncmod(row, rows))

    def _codes(self, name: str, row: Expr, group: Expr) -> Expr:
        codes = e.let(e.load(self.buffers[name], row, group * GROUP, lanes=GROUP))
        order = [4 * i + j for i in range(GROUP // 4) for j in ORDER]
        shuffled = tirx.Shuffle([codes], [tirx.const(i, "int32") for i in order])
        return e.let(e.cast(shuffled, "int16", GROUP))

    def pair(self, unit: Expr, row: int, group: Expr, step: Expr, lanes: int) -> Expr:
        """Repeat the two words of a step in ``lanes`` 32-bit lanes: of a row of a unit of four."""
        two = e.load(self.words, unit, group, row, step * 2, lanes=2)
        return e.let(e.bits(e.splat(e.bits(two, "int32"), lanes), "int16", 2 * lanes))
