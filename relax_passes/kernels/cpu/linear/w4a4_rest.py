"""What low bytes add to a W4A4 product, for all rows of x and one panel of W.

- Low bytes of W, which single rows of a tile have in single groups: a broadcast of four of a row's
  columns times 16 rows of x (their turned copy), so that only such rows cost anything.
- Low bytes of x, in the rows that a group lists: low_bytes.py.
- Both: the same with the low bytes of W, where a tile has them in that group.
"""

from __future__ import annotations

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.avx512 import Avx512
from relax_passes.spec import TILE_ROWS, LinearSpec

from .low_bytes import LowBytes
from .panel import STEPS, Panel, Words
from .w4a4_activations import ExactActivations
from .w4a4_weights import ExactPanel


class Rest(LowBytes):
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
        super().__init__(spec, isa, wide, m, blocks * TILE_ROWS)
        self.x, self.w, self.blocks = x, w, blocks

    def emit(self) -> None:
        """Set all sums."""
        self.clear()
        if self.w.low is not None:
            with e.serial(0, self.wide * TILE_ROWS) as row:
                count = e.let(e.load(self.w.listed, row, 0))
                with e.when(count > 0), e.then(), e.serial(0, self.blocks) as block:
                    self._row_of_w(self.w.low, row, count, block)
        if self.x.low is not None:
            with e.serial(0, self.spec.groups) as group:
                count = e.let(e.load(self.x.listed, group, 0))
                with e.when(count > 0), e.then():
                    self._group_of_x(self.x.low, group, count)

    def _row_of_w(self, low: Panel, row: Expr, count: Expr, block: Expr) -> None:
        """Multiply the low bytes of a row of W by 16 rows of x; the row's sums are still 0."""
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

    def _group_of_x(self, low: Words, group: Expr, count: Expr) -> None:
        """Multiply the low bytes of the rows that a group lists by the panel."""
        places, rows = self.places(group), self.x.listed
        self.add_group(low, rows, self.w.bytes, places, 0, group, count)
        if self.w.low is None:
            return
        for c, place in enumerate(places):
            with e.when(e.load(self.w.flags, place) != 0), e.then():
                self.add_group(low.unstarted(), rows, self.w.low, [place], c, group, count)
