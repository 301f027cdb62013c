"""What blocks of eight rows of x need beside the rows, made once in front of the loop over tiles.

    starts  int32 [M, G]          what accumulators start with (group_sums.py): sums of the codes,
                                  times less the offset of the bytes of W
    listed  int32 [units, G, 9]   how many of eight rows have second bytes in a group, then their
                                  numbers

A row lists its groups (outliers.py); a kernel that holds a group of W decoded wants the rows.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from ..spec import LinearSpec
from . import emit as e
from .emit import Expr
from .group_sums import first
from .outliers import LOW_STEPS

UNIT = 8  # rows of a block
MOST_ROWS = 256  # workspaces are made for this many rows at most


class BlockNotes:
    """Starts and lists for M rows, ``most`` at most."""

    unit = UNIT

    def __init__(self, spec: LinearSpec, buffers: Any, most: int, offset: int):
        self.spec, self.buffers, self.offset = spec, buffers, offset
        units = -(-most // UNIT)
        self.starts = e.workspace((most, spec.groups), "int32")
        self.listed = e.workspace((units * spec.groups, 1 + UNIT), "int32")
        self.low_starts = e.workspace((units * spec.groups, 1 + UNIT), "int32")
        self.low_scales = e.workspace((units * spec.groups, 1 + UNIT), "float32")

    def make(self, m: Expr) -> None:
        """Fill them in."""
        begin = first(self.spec.fmt)
        with e.serial(0, m) as row, e.serial(0, self.spec.groups) as group:
            total = e.load(self.buffers["sums"], row, group)
            e.store(self.starts, total * (-self.offset) + begin, row, group)
        units = tirx.truncdiv(m + (UNIT - 1), tirx.const(UNIT, "int32"))
        with e.serial(0, units * self.spec.groups) as i:
            e.store(self.listed, e.const(0), i, 0)
        given = self.buffers["outliers"]
        with e.serial(0, m) as row, e.serial(0, e.let(e.load(given, row, 0))) as i:
            group = e.let(e.load(given, row, i + 1))
            at = self.place(row, group)
            count = e.let(e.load(self.listed, at, 0) + 1)
            e.store(self.listed, count, at, 0)
            e.store(self.listed, row, at, count)
            total = e.load(self.buffers["sums_low"], row, group) if self.offset else e.const(0)
            e.store(self.low_starts, total * (-self.offset), at, count)
            scale = e.load(self.buffers["scales"], row, group)
            e.store(self.low_scales, scale * e.const(1 / LOW_STEPS, "float32"), at, count)

    def place(self, row: Expr, group: Expr) -> Expr:
        """Return where the list of a group is, for the eight rows around ``row``."""
        unit = tirx.truncdiv(row, tirx.const(UNIT, "int32"))
        return e.let(unit * self.spec.groups + group)
