"""Second bytes of x for many rows: per group of columns, so that W stays in registers.

Which groups of a row have second bytes is turned around into lists of rows, once a linear:

    rows  int32 [G, 1 + M]             how many rows, then their numbers
    sums  float32 [M, tiles * 16]      of a panel of W, where the blocks of rows begin

A block of rows would load a group of W for the second bytes of one row, somewhere else for each.
"""

from __future__ import annotations

from typing import Any

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.avx512 import Avx512
from relax_passes.kernels.cpu.outliers import listed_groups
from relax_passes.spec import GROUP, TILE_ROWS, LinearSpec

from .panel import STEPS, Panel, Words


def list_rows(far: Any, m: Expr, groups: int) -> Any:
    """Emit the lists of the rows where ``far`` int32 [M, G] is 1 (elsewhere 0); return ``rows``."""
    rows = e.workspace((groups, 1 + m), "int32")
    with e.parallel(0, groups) as group:
        count = e.Register("int32", 1, e.const(0))
        with e.serial(0, m) as row:
            # Every row takes the next place of the list; the following one may overwrite it.
            place = e.let(count.get())
            e.store(rows, row, group, place + 1)
            count.set(place + e.load(far, row, group))
        e.store(rows, count.get(), group, 0)
    return rows


def turn_lists(listed: Any, m: Expr, groups: int) -> Any:
    """Emit ``rows`` out of ``listed`` int32 [M, 1 + G] (outliers.py)."""
    far = e.workspace((m, groups), "int32")
    with e.parallel(0, m) as row:
        with e.serial(0, groups) as group:
            e.store(far, e.const(0), row, group)
        with listed_groups(listed, row) as group:
            e.store(far, e.const(1), row, group)
    return list_rows(far, m, groups)


class LowBytes:
    """Emits the products of second bytes of x with one panel.

    Attributes
    ----------
    sums : Buffer
        What the products are added to.
    """

    def __init__(self, spec: LinearSpec, isa: Avx512, wide: int, m: Expr, rows: int | Expr):
        """Allocate sums for ``rows`` >= M rows."""
        self.spec, self.isa, self.wide, self.m = spec, isa, wide, m
        self.sums = e.workspace((rows, wide * TILE_ROWS), "float32")

    def clear(self) -> None:
        """Set the sums to 0."""
        width = self.wide * TILE_ROWS
        with e.serial(0, self.m) as row:
            e.store(self.sums, e.const(0.0, "float32", width), row, 0, lanes=width)

    def places(self, group: Expr) -> list[Expr]:
        """Return where each tile has its bytes of a group in the panel."""
        return [e.let(c * self.spec.groups + group) for c in range(self.wide)]

    def add(self, x: Words, rows: Any, w: Panel) -> None:
        """Add the products of all groups."""
        with e.serial(0, self.spec.groups) as group:
            count = e.let(e.load(rows, group, 0))
            with e.when(count > 0), e.then():
                self.add_group(x, rows, w, self.places(group), 0, group, count)

    def add_group(
        self,
        x: Words,
        rows: Any,
        w: Panel,
        places: list[Expr],
        first: int,
        group: Expr,
        count: Expr,
    ) -> None:
        """Add the products of a group's rows with the tiles ``first``... at ``places``."""
        lanes = TILE_ROWS
        weights = [
            [e.let(e.load(w.codes, at, step, 0, lanes=64)) for at in places]
            for step in range(STEPS)
        ]
        scales = [e.let(e.load(w.scales, at, 0, lanes=lanes)) for at in places]
        starts = [w.start(at) for at in places]
        with e.serial(0, count) as i:
            row = e.let(e.load(rows, group, i + 1))
            start = x.start(row, group)
            acc = [e.Register("int32", lanes, start if s is None else start + s) for s in starts]
            for step, tiles in enumerate(weights):
                a = self.isa.activation(x.codes, row, group * GROUP + step * 4)
                for register, weight in zip(acc, tiles, strict=True):
                    register.set(self.isa.dot(register.get(), weight, a))
            x_scale = x.scale(row, group)
            for c, (register, scale) in enumerate(zip(acc, scales, strict=True), first):
                value = e.let(e.cast(register.get(), "float32", lanes) * scale)
                before = e.load(self.sums, row, c * lanes, lanes=lanes)
                total = e.fma(value, x_scale, before, lanes)
                e.store(self.sums, total, row, c * lanes, lanes=lanes)
