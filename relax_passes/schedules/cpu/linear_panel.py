"""The linear on int8 activations for many rows of x: decode a panel of W once, then multiply.

    for each pair of row tiles, in parallel
        decode both tiles, all of K, to bytes and scales (panel.py) in a buffer that fits the L2
        for each block of rows of x: int32 sums of 4 x 8 products a group, scaled into float32

A block of R rows and two tiles holds 2R int32 and 2R float32 vectors in registers.
"""

from __future__ import annotations

from typing import Any

from ..spec import GROUP, TILE_ROWS, LinearSpec
from . import emit as e
from . import panel
from .emit import Expr
from .epilogue import Epilogue
from .isa_avx512 import Avx512
from .knobs import CpuKnobs
from .rows import equal_blocks


def emit_panel(spec: LinearSpec, isa: Avx512, knobs: CpuKnobs, buffers: Any, m: Expr) -> None:
    """Emit the whole linear for M rows, M being worth a panel."""
    wide = knobs.panel_tiles if spec.tiles % knobs.panel_tiles == 0 or not spec.silu_mul else 2
    with e.parallel(0, -(-spec.tiles // wide)) as block:
        decoder = panel.PanelDecoder(spec, isa, buffers)
        codes = e.workspace((wide * spec.groups, panel.STEPS, 64), "uint8")
        scales = e.workspace((wide * spec.groups, TILE_ROWS), "float32")
        first = e.let(block * wide)
        with e.serial(0, wide) as c, e.serial(0, spec.groups) as group:
            tile = first + c if spec.tiles % wide == 0 else e.clamped(first + c, spec.tiles - 1)
            tile = e.let(tile)
            knobs.prefetch_tile(spec, buffers, tile, group)
            decoder.decode(tile, group, codes, scales, c * spec.groups + group)
        kernel = _Block(spec, knobs, buffers, codes, scales, wide, decoder.factor)
        equal_blocks(m, knobs.panel_block, lambda row, rows: kernel.emit(first, row, rows))


class _Block:
    """Code generator for R rows of x and the tiles of a panel."""

    def __init__(
        self,
        spec: LinearSpec,
        knobs: CpuKnobs,
        buffers: Any,
        codes: Any,
        scales: Any,
        wide: int,
        factor: float,
    ):
        self.spec, self.knobs, self.buffers = spec, knobs, buffers
        self.codes, self.scales, self.wide = codes, scales, wide
        self.offset = panel.offset(spec.fmt)
        self.isa = Avx512()
        self.epilogue = Epilogue(spec, buffers, TILE_ROWS, factor)

    def emit(self, first: Expr, row: Expr, rows: int) -> None:
        """Emit the product of a block and its epilogue."""
        row = e.let(row)
        zero = e.const(0.0, "float32", TILE_ROWS)
        out = [
            [e.Register("float32", TILE_ROWS, zero) for _ in range(rows)] for _ in range(self.wide)
        ]
        with e.serial(0, self.spec.groups) as group:
            self._group(group, row, out)
        self._finish(first, row, out)

    def _group(self, group: Expr, row: Expr, out: list[list[e.Register]]) -> None:
        rows, groups = len(out[0]), self.spec.groups
        at = [e.let(c * groups + group) for c in range(self.wide)]
        acc: list[list[e.Register]] = [[] for _ in range(self.wide)]
        low = self.buffers.get("codes_low")
        zero = e.const(0, "int32", TILE_ROWS)
        for r in range(rows):
            start = zero if low is not None else self._start(row + r, group)
            for c in range(self.wide):
                acc[c].append(e.Register("int32", TILE_ROWS, start))
        self._products(self.buffers["codes"], at, group, row, acc)
        if low is not None:
            # 16-bit codes: the high bytes' sums move up, at most 32 * 252 * 127 * 256 = 2^28.
            for r in range(rows):
                start = self._start(row + r, group)
                for c in range(self.wide):
                    high = acc[c][r].get() << e.const(8, "int32", TILE_ROWS)
                    acc[c][r].set(high + start)
            self._products(low, at, group, row, acc)
        w_scales = [e.let(e.load(self.scales, i, 0, lanes=TILE_ROWS)) for i in at]
        for r in range(rows):
            x_scale = e.let(e.splat(e.load(self.buffers["scales"], row + r, group), TILE_ROWS))
            for c in range(self.wide):
                value = e.cast(acc[c][r].get(), "float32", TILE_ROWS)
                register = out[c][r]
                scaled = e.let(value * w_scales[c])
                register.set(e.fma(scaled, x_scale, register.get(), TILE_ROWS))

    def _start(self, row: Expr, group: Expr) -> Expr:
        """Return what the weights' offset adds to a row's sum, to be taken off up front."""
        if not self.offset:
            return e.const(0, "int32", TILE_ROWS)
        total = e.load(self.buffers["sums"], row, group)
        return e.let(e.splat(total * (-self.offset), TILE_ROWS))

    def _products(
        self, codes: Any, at: list[Expr], group: Expr, row: Expr, acc: list[list[e.Register]]
    ) -> None:
        """Add the products of one array of codes over a group."""
        with e.serial(0, panel.STEPS) as step:
            weights = [e.let(e.load(self.codes, i, step, 0, lanes=64)) for i in at]
            for r in range(len(acc[0])):
                a = self.isa.activation(codes, row + r, group * GROUP + step * 4)
                for c in range(self.wide):
                    acc[c][r].set(self.isa.dot(acc[c][r].get(), weights[c], a))

    def _finish(self, first: Expr, row: Expr, out: list[list[e.Register]]) -> None:
        """Store; in a last, partly filled panel the tiles beyond W are dropped."""
        if self.spec.silu_mul:
            for c in range(0, self.wide, 2):
                pair = [[[r.get()] for r in out[c]], [[r.get()] for r in out[c + 1]]]
                self.epilogue.rows(pair, e.let((first + c) // 2), row)
            return
        for c in range(self.wide):
            tile = e.let(first + c)
            if c and self.spec.tiles % self.wide:
                with e.when(tile < self.spec.tiles), e.then():
                    self.epilogue.rows([[[r.get()] for r in out[c]]], tile, row)
            else:
                self.epilogue.rows([[[r.get()] for r in out[c]]], tile, row)
