"""What blocks of eight rows of x need beside the rows, made once in front of the loop over tiles.

    starts  int32 [M, G]      what accumulators start with (group_sums.py): sums of the codes, times
                              less the offset of the bytes of W
    listed  uint8 [units, G]  which of eight rows have second bytes in a group, a bit a row

A row lists its groups (outliers.py); a kernel that holds a group of W decoded wants the rows.  A
byte for a group is a line or two for all of them: between cores, lines are what costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tvm import tirx

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.spec import LinearSpec

from .group_sums import first

UNIT = 8  # rows of a block
MOST_ROWS = 256  # workspaces are made for this many rows at most
LANES = 16


class BlockNotes:
    """Starts and lists for M rows, ``most`` at most."""

    unit = UNIT

    def __init__(self, spec: LinearSpec, buffers: Any, most: int, offset: int):
        self.spec, self.buffers, self.offset = spec, buffers, offset
        self.starts = e.workspace((most, spec.groups), "int32")
        self.listed = e.workspace((-(-most // UNIT) * spec.groups,), "uint8")

    def make(self, m: Expr) -> None:
        """Fill in both for all rows."""
        with e.serial(0, m) as row:
            self.start(row)
        self.list(m)

    def start(self, row: Expr, group: Expr | None = None) -> None:
        """Fill in a row's starts, or the one of a group."""
        if group is not None:
            self._start(row, group, 1)
            return
        whole, groups = self.spec.groups // LANES, self.spec.groups
        if whole:
            with e.serial(0, whole) as i:
                self._start(row, i * LANES, LANES)
        for group in range(whole * LANES, groups):
            self._start(row, e.const(group), 1)

    def _start(self, row: Expr, group: Expr, lanes: int) -> None:
        total = e.load(self.buffers["sums"], row, group, lanes=lanes)
        begin = e.const(first(self.spec.fmt), "int32", lanes)
        value = total * e.const(-self.offset, "int32", lanes) + begin
        e.store(self.starts, value, row, group, lanes=lanes)

    def list(self, m: Expr) -> None:
        """Fill in which rows have second bytes."""
        units = tirx.truncdiv(m + (UNIT - 1), tirx.const(UNIT, "int32"))
        with e.serial(0, units * self.spec.groups) as i:
            e.store(self.listed, e.const(0, "uint8"), i)
        given = self.buffers["outliers"]
        with e.serial(0, m) as row:
            bit = e.let(e.const(1) << tirx.truncmod(row, tirx.const(UNIT, "int32")))
            with e.serial(0, e.let(e.load(given, row, 0))) as i:
                at = self.place(row, e.let(e.load(given, row, i + 1)))
                rows = e.cast(e.load(self.listed, at), "int32") | bit
                e.store(self.listed, e.cast(rows, "uint8"), at)

    def place(self, row: Expr, group: Expr) -> Expr:
        """Return where a group's byte is, for the eight rows around ``row``."""
        unit = tirx.truncdiv(row, tirx.const(UNIT, "int32"))
        return e.let(unit * self.spec.groups + group)

    @contextmanager
    def rows(self, listed: Expr) -> Iterator[Expr]:
        """Open a loop over the rows of a group's byte: 0 to 7."""
        left = e.Register("int32", 1, listed)
        with e.serial(0, e.let(tirx.popcount(listed))):
            bits = e.let(left.get())
            left.set(bits & (bits - 1))
            yield e.let(e.llvm("int32", "llvm.cttz", bits, tirx.const(False, "bool")))
