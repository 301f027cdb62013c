"""The linear on int8 activations for a few rows of x in 16-bit words: W is decoded once for eight.

For one tile of 16 rows, one group of 32 columns, and each half of the tile's rows

    factors and units of the scales (word_decoders.py)
    the group as words, on the stack
    for each two columns and each row of x: a multiplication and an addition (word_products.py)
    sums of all rows of x, scaled into float32, on the stack

Decoding costs as much as the products of two rows and a half: fewer than eight rows keep the terms
apart (direct.py), four of them in 0.9 of the time.
"""

from __future__ import annotations

from typing import Any

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.base import Isa
from relax_passes.spec import TILE_ROWS, LinearSpec

from .epilogue import Epilogue
from .knobs import CpuKnobs
from .pair_words import STEPS
from .word_decoders import word_decoder
from .word_products import word_products
from .x_words import ROWS, XWords

BLOCK = 2 * ROWS  # of x


def from_rows(spec: LinearSpec, isa: Isa, knobs: CpuKnobs) -> int | None:
    """Return the rows of a block from which on this is the direct kernel's tile."""
    fits = word_decoder(spec, isa) and not spec.experts
    return max(knobs.merge_rows, BLOCK) if fits else None


class WordsTile:
    """Code generator for one tile of 16 rows of W; the interface of ``rows.tile_pair``."""

    def __init__(self, spec: LinearSpec, isa: Any, knobs: CpuKnobs, buffers: Any, x: XWords):
        self.spec, self.isa, self.knobs, self.buffers, self.x = spec, isa, knobs, buffers, x
        kind = word_decoder(spec, isa)
        assert kind is not None
        self.decoder = kind(spec, isa, buffers)
        self.epilogue = Epilogue(spec, buffers, isa.rows, self.decoder.factor)

    def product(self, tile: Expr, row: Expr, rows: int) -> list[list[e.Register]]:
        """Emit the loop over K; returns float32 registers [row][part]."""
        isa, lanes, parts = self.isa, self.isa.rows, self.isa.parts
        tile, unit = e.let(tile), e.let(row // ROWS)
        sums = e.scratch(rows * TILE_ROWS, "float32")
        factors, units = e.scratch(parts * isa.bytes, "int8"), e.scratch(TILE_ROWS, "float32")
        for r in range(rows):
            e.store(sums, e.const(0.0, "float32", TILE_ROWS), r * TILE_ROWS, lanes=TILE_ROWS)
        with e.serial(0, self.spec.groups) as group:
            self.knobs.prefetch_tile(self.spec, self.buffers, tile, group)
            for part, (own, scale) in enumerate(self.decoder.scales(tile, group)):
                if own is not None:
                    e.store(factors, own, part * isa.bytes, lanes=isa.bytes)
                e.store(units, scale, part * lanes, lanes=lanes)
            with e.serial(0, parts) as part:
                own = e.let(e.load(factors, part * isa.bytes, lanes=isa.bytes))
                acc = self._products(tile, group, part, own, unit, rows)
                scale = e.let(e.load(units, part * lanes, lanes=lanes))
                for r, total in enumerate(acc):
                    x_scale = e.splat(e.load(self.buffers["scales"], row + r, group), lanes)
                    value = e.let(e.cast(total.get(), "float32", lanes) * scale)
                    at = e.let(part * lanes + r * TILE_ROWS)
                    before = e.load(sums, at, lanes=lanes)
                    e.store(sums, e.fma(value, x_scale, before, lanes), at, lanes=lanes)
        return [
            [
                e.Register("float32", lanes, e.load(sums, r * TILE_ROWS + p * lanes, lanes=lanes))
                for p in range(parts)
            ]
            for r in range(rows)
        ]

    def _products(
        self, tile: Expr, group: Expr, part: Expr, factors: Expr, unit: Expr, rows: int
    ) -> list[e.Register]:
        """Add up the products of a group and half of the tile's rows, for each row of x."""
        isa, lanes = self.isa, self.isa.rows
        count, vectors = 2 * lanes, self.spec.tile_code_bytes // 64
        kept = e.scratch(STEPS * count, "int16")
        with e.serial(0, vectors) as v:
            at = v * 64 + part * isa.bytes
            packed = e.let(e.load(self.buffers["w_codes"], tile, group, at, lanes=isa.bytes))
            for i, word in enumerate(self.decoder.words(packed, factors)):
                e.store(kept, word, (v * (STEPS // vectors) + i) * count, lanes=count)
        acc = word_products(
            isa,
            rows,
            lambda step: [e.let(e.load(kept, step * count, lanes=count))],
            lambda r, step: self.x.pair(unit + r // ROWS, r % ROWS, group, step, lanes),
        )
        return [total for (total,) in acc]
