"""What low bytes add to a W4A4 product, for all rows of x and one panel of W.

    sums float32 [M, tiles * 16]   where the blocks of rows (linear_w4a4.py) begin

- Low bytes of W, which single rows of a tile have in single groups: a broadcast of four of a row's
  columns times 16 rows of x (their turned copy), so that only such rows cost anything.
- Low bytes of x, in the rows that a group lists: the group's bytes of W stay in registers.
- Both: the same with the low bytes of W, where a tile has them in that group.
"""

from __future__ import annotations

from ..spec import GROUP, TILE_ROWS, LinearSpec
from . import emit as e
from .emit import Expr
from .isa_avx512 import Avx512
from .linear_panel import Panel
from .panel import STEPS
from .w4a4_activations import ExactActivations
from .w4a4_weights import ExactPanel


class Rest:
    """Emits the sums of one panel."""

    def __init__(
        self,
        spec: LinearSpec,
        isa: Avx512,
        wide: int,
        x: ExactActivations,
        w: ExactPanel,
        m: Expr,
        blocks: Expr,
    ):
        self.spec, self.isa, self.wide = spec, isa, wide
        self.x, self.w, self.m, self.blocks = x, w, m, blocks
        self.sums = e.workspace((blocks * TILE_ROWS, wide * TILE_ROWS), "float32")

    def emit(self) -> None:
        """Set all sums."""
        width = self.wide * TILE_ROWS
        with e.serial(0, self.m) as row:
            e.store(self.sums, e.const(0.0, "float32", width), row, 0, lanes=width)
        if self.w.low is not None:
            with e.serial(0, width) as row:
                count = e.let(e.load(self.w.listed, row, 0))
                with e.when(count > 0), e.then(), e.serial(0, self.blocks) as block:
                    self._row_of_w(self.w.low, row, count, block)
        if self.x.low is not None:
            with e.serial(0, self.spec.groups) as group:
                count = e.let(e.load(self.x.listed, group, 0))
                with e.when(count > 0), e.then():
                    self._group_of_x(group, count)

    def _row_of_w(self, low: Panel, row: Expr, count: Expr, block: Expr) -> None:
        """Multiply the low bytes of a row of W by 16 rows of x."""
        zero = e.const(0.0, "float32", TILE_ROWS)
        total = e.Register("float32", TILE_ROWS, zero)
        first, lane = e.let((row >> e.const(4)) * self.spec.groups), e.let(row & e.const(15))
        with e.serial(0, count) as i:
            group = e.let(e.load(self.w.listed, row, i + 1))
            at = e.let(first + group)
            start = e.const(0, "int32", TILE_ROWS)
            if low.starts is not None:
                start = e.let(e.splat(e.load(low.starts, at, lane), TILE_ROWS))
            acc = e.Register("int32", TILE_ROWS, start)
            for step in range(STEPS):
                word = e.bits(e.load(low.codes, at, step, lane * 4, lanes=4), "int32")
                weight = e.let(e.bits(e.splat(word, TILE_ROWS), "uint8", 64))
                a = e.load(self.x.turned_codes, block, group, step, 0, lanes=TILE_ROWS)
                acc.set(self.isa.dot(acc.get(), weight, e.let(e.bits(a, "int8", 64))))
            scales = e.load(self.x.turned_scales, block, group, 0, lanes=TILE_ROWS)
            scale = e.let(scales * e.splat(e.load(low.scales, at, lane), TILE_ROWS))
            value = e.cast(acc.get(), "float32", TILE_ROWS)
            total.set(e.fma(value, scale, total.get(), TILE_ROWS))
        for r in range(TILE_ROWS):
            e.store(self.sums, e.load(total.buffer, r), block * TILE_ROWS + r, row)

    def _group_of_x(self, group: Expr, count: Expr) -> None:
        """Multiply the low bytes of the rows that a group lists by the panel."""
        places = [e.let(c * self.spec.groups + group) for c in range(self.wide)]
        self._listed_rows(self.w.bytes, places, 0, group, count, True)
        if self.w.low is None:
            return
        for c, place in enumerate(places):
            with e.when(e.load(self.w.flags, place) != 0), e.then():
                self._listed_rows(self.w.low, [place], c, group, count, False)

    def _listed_rows(
        self, w: Panel, places: list[Expr], first: int, group: Expr, count: Expr, offset: bool
    ) -> None:
        """Add the products of listed rows with tiles ``first``... of the panel at ``places``."""
        x, lanes = self.x.low, TILE_ROWS
        assert x is not None and w.starts is not None
        weights = [
            [e.let(e.load(w.codes, at, step, 0, lanes=64)) for at in places]
            for step in range(STEPS)
        ]
        scales = [e.let(e.load(w.scales, at, 0, lanes=lanes)) for at in places]
        starts = [e.let(e.load(w.starts, at, 0, lanes=lanes)) for at in places]
        with e.serial(0, count) as i:
            row = e.let(e.load(self.x.listed, group, i + 1))
            if offset:  # bytes of W with an offset
                start = e.let(e.splat(e.load(x.sums, row, group), lanes))
                acc = [e.Register("int32", lanes, start + s) for s in starts]
            else:
                acc = [e.Register("int32", lanes, s) for s in starts]
            for step, tiles in enumerate(weights):
                a = self.isa.activation(x.codes, row, group * GROUP + step * 4)
                for register, weight in zip(acc, tiles, strict=True):
                    register.set(self.isa.dot(register.get(), weight, a))
            x_scale = e.let(e.splat(e.load(x.scales, row, group), lanes))
            for c, (register, scale) in enumerate(zip(acc, scales, strict=True), first):
                value = e.let(e.cast(register.get(), "float32", lanes) * scale)
                before = e.load(self.sums, row, c * lanes, lanes=lanes)
                total = e.fma(value, x_scale, before, lanes)
                e.store(self.sums, total, row, c * lanes, lanes=lanes)
