"""The linear on int8 activations for a few rows of x: a group is decoded once for all of them.

For one tile of 16 rows and one group of 32 columns

    eight vectors of bytes and one vector of scales (panel.py) in registers
    for each row of x: int32 sums of 8 products, scaled into float32

Beside one product a weight and row there is the decode, so this pays from a few rows on; with one
row the "pn8" kernel (linear_integer.py) is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..spec import GROUP, TILE_ROWS, LinearSpec
from . import emit as e
from . import panel
from .emit import Expr
from .epilogue import Epilogue
from .isa_avx512 import Avx512
from .knobs import CpuKnobs


class MergedTile:
    """Code generator for one tile of 16 rows of W; the interface of ``rows.tile_pair``."""

    def __init__(
        self,
        spec: LinearSpec,
        isa: Avx512,
        knobs: CpuKnobs,
        buffers: Any,
        add_second_bytes: Callable[[Expr, Expr, list[list[e.Register]]], None],
    ):
        self.spec, self.isa, self.knobs, self.buffers = spec, isa, knobs, buffers
        self.add_second_bytes = add_second_bytes  # of the direct kernel
        self.decoder = panel.PanelDecoder(spec, isa, buffers)
        self.offset = panel.offset(spec.fmt)
        self.epilogue = Epilogue(spec, buffers, TILE_ROWS, self.decoder.factor)

    def product(self, tile: Expr, row: Expr, rows: int) -> list[list[e.Register]]:
        """Emit the loop over K; returns float32 registers [row][part]."""
        tile, zero = e.let(tile), e.const(0.0, "float32", TILE_ROWS)
        out = [[e.Register("float32", TILE_ROWS, zero)] for _ in range(rows)]
        with e.serial(0, self.spec.groups) as group:
            self.knobs.prefetch_tile(self.spec, self.buffers, tile, group)
            self._group(tile, group, row, [r[0] for r in out])
        self.add_second_bytes(tile, row, out)
        return out

    def _group(self, tile: Expr, group: Expr, row: Expr, out: list[e.Register]) -> None:
        """Emit a group: decode and products in turn, so that they run side by side."""
        decoder = self.decoder
        count = self.spec.tile_code_bytes // 64
        sums = self._starts(group, row, len(out))

        def at_once(transform: Any) -> None:
            for v in range(count):
                for i, weight in enumerate(decoder.vector(tile, group, v, transform)):
                    self._products(weight, v * (panel.STEPS // count) + i, group, row, sums)

        def in_turn(transform: Any) -> None:  # the same in little text
            with e.serial(0, count) as v:
                for i, weight in enumerate(decoder.vector(tile, group, v, transform)):
                    self._products(weight, v * (panel.STEPS // count) + i, group, row, sums)

        w_scale = e.let(decoder.choose(tile, group, at_once, in_turn))
        for r, total in enumerate(sums):
            x_scale = e.splat(e.load(self.buffers["scales"], row + r, group), TILE_ROWS)
            scaled = e.let(e.cast(total.get(), "float32", TILE_ROWS) * w_scale)
            out[r].set(e.fma(scaled, x_scale, out[r].get(), TILE_ROWS))

    def _starts(self, group: Expr, row: Expr, rows: int) -> list[e.Register]:
        """Make the int32 sums of a group; the bytes' offset is taken off up front."""
        sums = []
        for r in range(rows):
            start = e.const(0, "int32", TILE_ROWS)
            if self.offset:
                total = e.load(self.buffers["sums"], row + r, group)
                start = e.let(e.splat(total * (-self.offset), TILE_ROWS))
            sums.append(e.Register("int32", TILE_ROWS, start))
        return sums

    def _products(
        self, weight: Expr, step: Expr, group: Expr, row: Expr, sums: list[e.Register]
    ) -> None:
        """Add the products of four columns, for each row."""
        for r, total in enumerate(sums):
            a = self.isa.activation(self.buffers["codes"], row + r, group * GROUP + step * 4)
            total.set(self.isa.dot(total.get(), weight, a))
