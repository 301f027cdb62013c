"""The linear on int8 activations for many rows of x, with 16-bit words on both sides.

    words of all rows of x (x_words.py), in parallel
    the loops of decoded_panel.py: W as words (word_decoders.py); for each block of four rows of x
        int32 sums of both halves of a tile in eight registers, scaled, in float32

A product costs a multiplication and an addition of 16 pairs for both terms of a weight and both
bytes of an activation; a group costs a conversion and two operations that scale, once a row.

    panel words  int16   [tiles, groups, 16 steps, 16 rows * 2]
    panel units  float32 [tiles, groups, 16]
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import tirx

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.spec import TILE_ROWS, LinearSpec

from .decoded_panel import BLOCK, DecodedPanel, emit_panels
from .knobs import CpuKnobs
from .pair_words import STEPS
from .word_decoders import word_decoder
from .word_products import word_products
from .x_words import XWords

GROUPS = 24  # of a tile: a KiB each in the L1 cache


def from_rows(spec: LinearSpec, isa: Any, knobs: CpuKnobs) -> int | None:
    """Return the rows from which on this is a linear's kernel."""
    fits = word_decoder(spec, isa) and isa.word_panels and not spec.experts
    return max(knobs.panel_rows, BLOCK) if fits else None


def emit_panel(spec: LinearSpec, isa: Any, knobs: CpuKnobs, buffers: Any, m: Expr) -> None:
    """Emit the whole linear for M rows, M being worth a panel."""
    x = XWords(spec, buffers, m, BLOCK)
    with e.parallel(0, m) as row:
        x.row(row)
    with isa.words_scope():
        emit_panels(partial(_Panel, x), spec, isa, knobs, buffers, m)


class _Panel(DecodedPanel):
    """Tiles as words, and units of their scales."""

    isa: Any

    def __init__(self, x: XWords, *args: Any):
        self.x = x
        super().__init__(*args)

    def allocate(self) -> None:
        """Make room for words and units."""
        spec, wide = self.spec, self.wide
        kind = word_decoder(spec, self.isa)
        assert kind is not None
        self.decoder = kind(spec, self.isa, self.buffers)
        self.factor = self.decoder.factor
        self.depth = -(-spec.groups // -(-spec.groups // GROUPS))
        self.words = e.workspace((wide * self.depth, STEPS, 2 * TILE_ROWS), "int16")
        self.units = e.workspace((wide * self.depth, TILE_ROWS), "float32")

    def decode_group(self, tile: Expr, group: Expr, at: Expr) -> None:
        """Decode the words and units of one tile and group."""
        isa, vectors = self.isa, self.spec.tile_code_bytes // 64
        for part, (factors, units) in enumerate(self.decoder.scales(tile, group)):
            e.store(self.units, units, at, part * isa.rows, lanes=isa.rows)
            with e.serial(0, vectors) as v:
                source = v * 64 + part * isa.bytes
                packed = self.buffers["w_codes"]
                packed = e.let(e.load(packed, tile, group, source, lanes=isa.bytes))
                for i, word in enumerate(self.decoder.words(packed, factors)):
                    place = (v * (STEPS // vectors) + i, part * 2 * isa.rows)
                    e.store(self.words, word, at, *place, lanes=2 * isa.rows)

    def products(self, begin: Expr, depth: Expr) -> None:
        """Add the products of all rows of x; one tile's words stay in the L1 cache for them."""
        blocks = tirx.floordiv(self.m + (BLOCK - 1), tirx.const(BLOCK, "int32"))
        with e.serial(0, self.wide) as c, e.serial(0, e.let(blocks)) as block:
            to = [e.let(block * BLOCK + i) for i in range(BLOCK)]
            rows = [to[0], *(e.let(tirx.min(t, self.m - 1)) for t in to[1:])]
            with e.serial(0, depth) as g:
                at = e.let(c * self.depth + g)
                self._group(block, rows, to, c, at, e.let(begin + g))

    def _group(
        self, block: Expr, rows: list[Expr], to: list[Expr], c: Expr, at: Expr, group: Expr
    ) -> None:
        """Add one group's products with a block of x to the sums of rows ``to``.

        ``rows`` are those of the block, the last one again where the block is not full.
        """
        isa, lanes = self.isa, self.isa.rows

        def words(step: Expr) -> list[Expr]:
            columns = [2 * lanes * part for part in range(isa.parts)]
            return [e.let(e.load(self.words, at, step, i, lanes=2 * lanes)) for i in columns]

        acc = word_products(
            isa, BLOCK, words, lambda r, step: self.x.pair(block, r, group, step, lanes)
        )
        units = [
            e.let(e.load(self.units, at, part * lanes, lanes=lanes)) for part in range(isa.parts)
        ]
        for row, place, own in zip(rows, to, acc, strict=True):
            scale = e.let(e.splat(e.load(self.buffers["scales"], row, group), lanes))
            for part, (total, unit) in enumerate(zip(own, units, strict=True)):
                value = e.let(e.cast(total.get(), "float32", lanes) * unit)
                column = e.let(c * TILE_ROWS + part * lanes)
                before = e.load(self.sums, place, column, lanes=lanes)
                e.store(self.sums, e.fma(value, scale, before, lanes), place, column, lanes=lanes)
