"""The linear on int8 activations for many rows of x: decode a panel of W once, then multiply.

    for each pair of row tiles, in parallel
        decode both tiles, all of K, to bytes and scales (panel.py) in a buffer that fits the L2
        for each block of rows of x: int32 sums of 4 x 8 products a group, scaled into float32

A block of R rows and two tiles holds 2R int32 and 2R float32 vectors in registers.
"""

from __future__ import annotations

from typing import Any

from ..spec import GROUP, OUTLIERS, TILE_ROWS, LinearSpec
from . import emit as e
from . import panel
from .emit import Expr
from .epilogue import Epilogue
from .isa_avx512 import Avx512
from .knobs import CpuKnobs
from .outliers import LOW_STEPS, listed_groups
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
        out = self._start_rows(row, rows)
        with e.serial(0, self.spec.groups) as group:
            at = [e.let(c * self.spec.groups + group) for c in range(self.wide)]
            self._group(at, group, row, "", 1.0, out)
        self._finish(first, row, out)

    def _start_rows(self, row: Expr, rows: int) -> list[list[e.Register]]:
        """Make the float32 sums [tile][row]: zero, or the products with the second bytes."""
        zero, tiles = e.const(0.0, "float32", TILE_ROWS), range(self.wide)
        if self.spec.activation != OUTLIERS:
            return [[e.Register("float32", TILE_ROWS, zero) for _ in range(rows)] for _ in tiles]
        kept = [e.scratch(rows * TILE_ROWS, "float32") for _ in tiles]
        with e.serial(0, rows) as r:
            own = e.let(row + r)
            out = [[e.Register("float32", TILE_ROWS, zero)] for _ in tiles]
            with listed_groups(self.buffers, own) as group:
                at = [e.let(c * self.spec.groups + group) for c in tiles]
                self._group(at, group, own, "_low", 1 / LOW_STEPS, out)
            for c in tiles:
                e.store(kept[c], out[c][0].get(), r * TILE_ROWS, lanes=TILE_ROWS)
        return [
            [
                e.Register("float32", TILE_ROWS, e.load(k, r * TILE_ROWS, lanes=TILE_ROWS))
                for r in range(rows)
            ]
            for k in kept
        ]

    def _group(
        self,
        at: list[Expr],
        group: Expr,
        row: Expr,
        suffix: str,
        factor: float,
        out: list[list[e.Register]],
    ) -> None:
        """Add a group's products with one byte of the codes; ``at`` is its place in the panel."""
        rows = len(out[0])
        acc: list[list[e.Register]] = [[] for _ in at]
        for r in range(rows):
            start = self._start(self.buffers[f"sums{suffix}"], row + r, group)
            for registers in acc:
                registers.append(e.Register("int32", TILE_ROWS, start))
        self._products(self.buffers[f"codes{suffix}"], at, group, row, acc)
        w_scales = [e.let(e.load(self.scales, i, 0, lanes=TILE_ROWS)) for i in at]
        for r in range(rows):
            x_scale = e.load(self.buffers["scales"], row + r, group)
            if factor != 1.0:
                x_scale = x_scale * e.const(factor, "float32")
            x_scale = e.let(e.splat(x_scale, TILE_ROWS))
            for c in range(self.wide):
                value = e.cast(acc[c][r].get(), "float32", TILE_ROWS)
                register = out[c][r]
                scaled = e.let(value * w_scales[c])
                register.set(e.fma(scaled, x_scale, register.get(), TILE_ROWS))

    def _start(self, sums: Any, row: Expr, group: Expr) -> Expr:
        """Return what the weights' offset adds to a row's sum, to be taken off up front."""
        if not self.offset:
            return e.const(0, "int32", TILE_ROWS)
        return e.let(e.splat(e.load(sums, row, group) * (-self.offset), TILE_ROWS))

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
