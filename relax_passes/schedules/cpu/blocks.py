"""What blocks of eight rows of x need beside the rows, made once in front of the loop over tiles.

    starts  int32 [M, G]          sums of the codes, times less the offset of the bytes of W
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

UNIT = 8  # rows of a block
MOST_ROWS = 256  # workspaces are made for this many rows at most


class BlockNotes:
    """Starts and lists for M rows, ``most`` at most."""

    def __init__(self, spec: LinearSpec, buffers: Any, most: int, offset: int):
        self.spec, self.buffers, self.offset = spec, buffers, offset
        units = -(-most // UNIT)
        self.starts = e.workspace((most, spec.groups), "int32")
        self.listed = e.workspace((units * spec.groups, 1 + UNIT), "int32")

    def make(self, m: Expr) -> None:
        """Fill them in."""
        with e.serial(0, m) as row, e.serial(0, self.spec.groups) as group:
            total = e.load(self.buffers["sums"], row, group)
            e.store(self.starts, total * (-self.offset), row, group)
        units = tirx.truncdiv(m + (UNIT - 1), tirx.const(UNIT, "int32"))
        with e.serial(0, units * self.spec.groups) as i:
            e.store(self.listed, e.const(0), i, 0)
        given = self.buffers["outliers"]
        with e.serial(0, m) as row, e.serial(0, e.let(e.load(given, row, 0))) as i:
            at = self.place(row, e.load(given, row, i + 1))
            count = e.let(e.load(self.listed, at, 0) + 1)
            e.store(self.listed, count, at, 0)
            e.store(self.listed, row, at, count)

    def place(self, row: Expr, group: Expr) -> Expr:
        """Return where the list of a group is, for the eight rows around ``row``."""
        unit = tirx.truncdiv(row, tirx.const(UNIT, "int32"))
        return e.let(unit * self.spec.groups + group)
