"""The linear on int8 activations for many rows of x, with 16-bit words on both sides.

    words of all rows of x (x_words.py), in parallel
    for each pair of row tiles, in parallel
        for each few groups of 32 columns, as many as the L1 cache holds decoded
            decode both tiles to words (pair_words.py)
            for each block of rows of x: int32 sums of both halves of a tile, scaled, in float32
        store all rows of x

A product costs a multiplication and an addition of 16 pairs for both terms of a weight and both
bytes of an activation; a group costs a conversion and two operations that scale, once a row.

    panel words  int16   [tiles, groups, 16 steps, 16 rows * 2]
    panel units  float32 [tiles, groups, 16]
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.spec import TILE_ROWS, LinearSpec

from .epilogue import Epilogue
from .knobs import CpuKnobs
from .pair_words import STEPS, PairWords, supports
from .panel_int8 import panel_width
from .x_words import ROWS, XWords

GROUPS = 24  # of a tile: a KiB each in the L1 cache
BLOCK = ROWS  # of x: their sums with both halves of a tile fit sixteen registers
UNROLLED = 4  # steps


def from_rows(spec: LinearSpec, isa: Any, knobs: CpuKnobs) -> int | None:
    """Return the rows from which on this is a linear's kernel."""
    fits = supports(spec, isa) and isa.word_panels and not spec.experts
    return max(knobs.panel_rows, BLOCK) if fits else None


def emit_panel(spec: LinearSpec, isa: Any, knobs: CpuKnobs, buffers: Any, m: Expr) -> None:
    """Emit the whole linear for M rows, M being worth a panel."""
    wide = panel_width(spec, knobs)
    x = XWords(spec, buffers, m, BLOCK)
    with e.parallel(0, m) as row:
        x.row(row)
    with isa.words_scope(), e.parallel(0, -(-spec.tiles // wide)) as block:
        first = e.let(block * wide)
        kernel = _Panel(spec, isa, knobs, buffers, wide, m, x)
        kernel.clear()
        with e.serial(0, -(-spec.groups // kernel.depth)) as chunk:
            begin = e.let(chunk * kernel.depth)
            depth: Expr = tirx.const(kernel.depth, "int32")
            if spec.groups % kernel.depth:
                depth = e.let(tirx.min(depth, spec.groups - begin))
            kernel.decode(first, begin, depth)
            kernel.products(begin, depth)
        kernel.finish(first)


class _Panel:
    """Decoded tiles of a few groups, and the sums of all rows of x."""

    def __init__(
        self,
        spec: LinearSpec,
        isa: Any,
        knobs: CpuKnobs,
        buffers: Any,
        wide: int,
        m: Expr,
        x: XWords,
    ):
        self.spec, self.isa, self.knobs, self.buffers = spec, isa, knobs, buffers
        self.wide, self.m, self.x = wide, m, x
        self.decoder = PairWords(spec, isa, buffers)
        self.depth = -(-spec.groups // -(-spec.groups // GROUPS))
        self.words = e.workspace((wide * self.depth, STEPS, 2 * TILE_ROWS), "int16")
        self.units = e.workspace((wide * self.depth, TILE_ROWS), "float32")
        # Rows of a last, partly filled block are added up behind the last row.
        self.sums = e.workspace((m + BLOCK, wide * TILE_ROWS), "float32")

    def clear(self) -> None:
        """Set the sums to 0."""
        width = self.wide * TILE_ROWS
        with e.serial(0, self.m + BLOCK) as row:
            e.store(self.sums, e.const(0.0, "float32", width), row, 0, lanes=width)

    def decode(self, first: Expr, begin: Expr, depth: Expr) -> None:
        """Decode the groups ``begin``... of all tiles."""
        spec, isa = self.spec, self.isa
        with e.serial(0, self.wide) as c, e.serial(0, depth) as g:
            tile = first + c
            if spec.tiles % self.wide:
                tile = e.clamped(tile, spec.tiles - 1)
            tile, group = e.let(tile), e.let(begin + g)
            at = e.let(c * self.depth + g)
            self.knobs.prefetch_tile(spec, self.buffers, tile, group)
            for part, (factors, units) in enumerate(self.decoder.scales(tile, group)):
                e.store(self.units, units, at, part * isa.rows, lanes=isa.rows)
                with e.serial(0, spec.tile_code_bytes // 64) as v:
                    source = v * 64 + part * isa.bytes
                    packed = self.buffers["w_codes"]
                    packed = e.let(e.load(packed, tile, group, source, lanes=isa.bytes))
                    for i, word in enumerate(self.decoder.words(packed, factors)):
                        place = part * 2 * isa.rows
                        e.store(self.words, word, at, v * 4 + i, place, lanes=2 * isa.rows)

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
        zero = e.const(0, "int32", lanes)
        acc = [[e.Register("int32", lanes, zero) for _ in range(isa.parts)] for _ in rows]
        with e.serial(0, STEPS // UNROLLED) as some:
            for i in range(UNROLLED):
                step = some * UNROLLED + i
                weights = [
                    e.let(e.load(self.words, at, step, 2 * lanes * part, lanes=2 * lanes))
                    for part in range(isa.parts)
                ]
                for r, own in enumerate(acc):
                    pair = self.x.pair(block, r, group, step, lanes)
                    for total, weight in zip(own, weights, strict=True):
                        total.set(isa.words_dot(total.get(), weight, pair))
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

    def finish(self, first: Expr) -> None:
        """Store all rows; in a last, partly filled panel the tiles beyond W are dropped."""
        spec, lanes, parts = self.spec, self.isa.rows, self.isa.parts
        epilogue = Epilogue(spec, self.buffers, lanes, self.decoder.factor)
        span = 2 if spec.silu_mul else 1

        def load(row: Expr, c: int) -> list[list[Expr]]:
            columns = [c * TILE_ROWS + p * lanes for p in range(parts)]
            return [[e.let(e.load(self.sums, row, at, lanes=lanes)) for at in columns]]

        def store(row: Expr, c: int, tile: Expr) -> None:
            epilogue.rows([load(row, c + i) for i in range(span)], tile, row)

        with e.serial(0, self.m) as row:
            for c in range(0, self.wide, span):
                tile = e.let((first + c) // span if span > 1 else first + c)
                if c and spec.tiles % self.wide:
                    with e.when(tile * span < spec.tiles), e.then():
                        store(row, c, tile)
                else:
                    store(row, c, tile)
