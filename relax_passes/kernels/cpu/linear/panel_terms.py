"""The linear on int8 activations for many rows of x, where vectors are shorter than a tile's rows.

    for each pair of row tiles, in parallel
        for each few groups of 32 columns, as many as the L1 cache holds decoded
            decode both tiles: bytes and scales of every term
            the products with second bytes of x, by lists of rows (low_bytes.py)
            for each block of rows of x: sums of 8 rows of W (a part of a tile), scaled, in float32
        store all rows of x

Terms stay apart: tables of small bytes let the sums of a whole group stay in 16 bits where the
instruction set adds products in pairs (E2M1 in half units: 8 x 2 x 12 x 128 = 24576), so that a
product costs a multiplication and an addition of 32 bytes.  Sums of R rows of x and all terms are
in registers for one group; those over groups are in memory between two parts of K.

    panel codes   uint8   [tiles, groups, parts, 8 steps, terms, 4 * rows]
    panel scales  float32 [tiles, groups, vectors, 16]   (sub-group, term), then the offsets
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tvm import tirx

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.avx2 import Avx2
from relax_passes.kernels.cpu.isa.base import Isa
from relax_passes.kernels.cpu.scale_reader import ScaleReader
from relax_passes.spec import GROUP, TILE_ROWS, LinearSpec
from relax_passes.terms import Term, common_factor

from .direct import ActivationCodes
from .epilogue import Epilogue
from .knobs import CpuKnobs
from .low_bytes import turn_lists
from .panel_int8 import panel_width
from .sums import Sum, narrow_steps, scope

STEPS = GROUP // 4
L1_BYTES = 16384  # of decoded codes of one vector of W's rows
BLOCK = 4  # rows of x whose sums of two terms fit sixteen registers


def from_rows(spec: LinearSpec, isa: Isa, knobs: CpuKnobs) -> int | None:
    """Return the rows from which on this is a linear's kernel."""
    fits = isinstance(isa, Avx2) and spec.activation.integer and not spec.experts
    if not fits or spec.format == "none" or spec.terms[0].table is None:
        return None
    return max(knobs.panel_rows, BLOCK)


def emit_panel(spec: LinearSpec, isa: Isa, knobs: CpuKnobs, buffers: Any, m: Expr) -> None:
    """Emit the whole linear for M rows, M being worth a panel."""
    wide = panel_width(spec, knobs)
    rows_of_groups = None
    if spec.activation.outliers:
        rows_of_groups = turn_lists(buffers["outliers"], m, spec.groups)
    with scope(isa, spec), e.parallel(0, -(-spec.tiles // wide)) as block:
        first = e.let(block * wide)
        kernel = _Panel(spec, isa, knobs, buffers, wide, m)
        kernel.clear()
        chunks = -(-spec.groups // kernel.depth)
        with e.serial(0, chunks) as chunk:
            begin = e.let(chunk * kernel.depth)
            depth = tirx.min(tirx.const(kernel.depth, "int32"), spec.groups - begin)
            depth = kernel.depth if spec.groups % kernel.depth == 0 else e.let(depth)
            kernel.decode(first, begin, depth)
            if rows_of_groups is not None:
                kernel.second_bytes(rows_of_groups, begin, depth)
            kernel.products(begin, depth)
        kernel.finish(first)


class _Panel:
    """Decoded tiles of a few groups, and the sums of all rows of x."""

    def __init__(
        self, spec: LinearSpec, isa: Isa, knobs: CpuKnobs, buffers: Any, wide: int, m: Expr
    ):
        self.spec, self.isa, self.knobs, self.buffers = spec, isa, knobs, buffers
        self.wide, self.m = wide, m
        self.terms: tuple[Term, ...] = isa.adapt(spec.terms)
        self.factor = common_factor(self.terms)
        self.reader = ScaleReader(spec.fmt, buffers["w_scales"])
        self.tables = [isa.table(t.table) for t in self.terms if t.table is not None]
        self.subs, count = self.reader.sub_groups, len(self.terms)
        self.offsets = any(t.offset != 0 for t in self.terms)
        self.vectors = self.subs * count + self.offsets
        self.depth = min(spec.groups, max(1, L1_BYTES // (count * STEPS * isa.bytes)))
        shape = (wide * self.depth * isa.parts, STEPS * count, isa.bytes)
        self.codes = e.workspace(shape, "uint8")
        self.scales = e.workspace((wide * self.depth, self.vectors, TILE_ROWS), "float32")
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
            with e.serial(0, isa.parts) as part, e.serial(0, STEPS // 2) as v:
                source = v * 64 + part * isa.bytes
                packed = self.buffers["w_codes"]
                packed = e.let(e.load(packed, tile, group, source, lanes=isa.bytes))
                for half, index in enumerate((e.let(isa.low(packed)), e.let(isa.high(packed)))):
                    for t, table in enumerate(self.tables):
                        step = (v * 2 + half) * len(self.terms) + t
                        value = isa.lookup(table, index)
                        e.store(self.codes, value, at * isa.parts + part, step, 0, lanes=isa.bytes)
            self._scales(tile, group, at)

    def _scales(self, tile: Expr, group: Expr, at: Expr) -> None:
        """Decode the scales of one tile and group, and what offsets make of x's sum."""
        lanes = TILE_ROWS
        offset: Expr = None
        for sub in range(self.subs):
            for t, term in enumerate(self.terms):
                args = (tile, group, sub, 0, lanes)
                scale = self.reader.scale(term.scale, *args)
                relative = term.factor / self.factor
                if relative != 1.0:
                    scale = scale * e.const(relative, "float32", lanes)
                scale = e.let(scale)
                e.store(self.scales, scale, at, sub * len(self.terms) + t, 0, lanes=lanes)
                if term.offset == 0:
                    continue
                zero = (
                    self.reader.zero_point(term.offset, *args)
                    if isinstance(term.offset, str)
                    else e.const(float(term.offset), "float32", lanes)
                )
                part = e.let(zero * scale)
                offset = part if offset is None else e.let(offset + part)
        if offset is not None:
            e.store(self.scales, offset, at, self.vectors - 1, 0, lanes=lanes)

    def products(self, begin: Expr, depth: Expr) -> None:
        """Add the products of all rows of x."""
        x = ActivationCodes("", self.buffers, 1)
        blocks = tirx.floordiv(self.m + (BLOCK - 1), tirx.const(BLOCK, "int32"))
        with self._vectors() as (c, part), e.serial(0, e.let(blocks)) as block:
            to = [e.let(block * BLOCK + i) for i in range(BLOCK)]
            rows = [to[0], *(e.let(tirx.min(t, self.m - 1)) for t in to[1:])]
            self._block(x, rows, to, c, part, begin, 0, depth)

    def second_bytes(self, rows_of_groups: Any, begin: Expr, depth: Expr) -> None:
        """Add the products of second bytes of x: of a group's rows, some at once."""
        x = ActivationCodes("_low", self.buffers, 1)
        with e.serial(0, depth) as g:
            group = e.let(begin + g)
            count = e.let(e.load(rows_of_groups, group, 0))
            blocks = tirx.floordiv(count + (BLOCK - 1), tirx.const(BLOCK, "int32"))
            with self._vectors() as (c, part), e.serial(0, e.let(blocks)) as block:
                places = [e.let(block * BLOCK + i) for i in range(BLOCK)]
                found = [e.load(rows_of_groups, group, tirx.min(p, count - 1) + 1) for p in places]
                rows = [e.let(row) for row in found]
                to = [
                    e.let(tirx.Select(p < count, row, self.m + i))
                    for i, (p, row) in enumerate(zip(places, rows, strict=True))
                ]
                self._block(x, rows, to, c, part, begin, g, 1)

    @contextmanager
    def _vectors(self) -> Iterator[tuple[Expr, Expr]]:
        """Open the loops over the vectors of W's rows: (tile of the panel, part).

        They are the outer ones: one vector's codes stay in the L1 cache for all rows of x.
        """
        with e.serial(0, self.wide) as c, e.serial(0, self.isa.parts) as part:
            yield c, part

    def _block(
        self,
        x: ActivationCodes,
        rows: list[Expr],
        to: list[Expr],
        c: Expr,
        part: Expr,
        begin: Expr,
        first: Expr,
        count: Expr,
    ) -> None:
        """Add the products of a vector of W's rows with ``rows`` of x to the sums of rows ``to``.

        They are of ``count`` groups of the panel from ``first`` on.
        """
        lanes = self.isa.rows
        column = e.let(c * TILE_ROWS + part * lanes)
        out = [e.Register("float32", lanes, e.load(self.sums, t, column, lanes=lanes)) for t in to]
        with e.serial(0, count) as g:
            place = e.let(c * self.depth + (first + g))
            self._group(x, rows, place, part, e.let(begin + (first + g)), out)
        for t, register in zip(to, out, strict=True):
            e.store(self.sums, register.get(), t, column, lanes=lanes)

    def _group(
        self,
        x: ActivationCodes,
        rows: list[Expr],
        place: Expr,
        part: Expr,
        group: Expr,
        out: list[e.Register],
    ) -> None:
        """Add one group's products to ``out``, of as many rows."""
        isa, lanes, count = self.isa, self.isa.rows, len(self.terms)
        at, steps = e.let(place * isa.parts + part), STEPS // self.subs
        totals: list[Expr] = [None] * len(rows)
        for sub in range(self.subs):
            zero = e.const(0, "int32", lanes)
            sums = [[Sum(isa, narrow_steps(isa, t), zero) for t in self.terms] for _ in rows]
            for step in range(sub * steps, (sub + 1) * steps):
                weights = [
                    isa.prepare(e.let(e.load(self.codes, at, step * count + t, 0, lanes=isa.bytes)))
                    for t in range(count)
                ]
                for row, own in zip(rows, sums, strict=True):
                    a = isa.activation(x.codes, row, group * GROUP + step * 4)
                    for one, weight in zip(own, weights, strict=True):
                        one.add(weight, a)
            for t in range(count):
                vector = sub * count + t
                scale = e.let(e.load(self.scales, place, vector, part * lanes, lanes=lanes))
                for r, own in enumerate(sums):
                    value = e.cast(own[t].get(), "float32", lanes)
                    before = totals[r]
                    more = value * scale if before is None else e.fma(value, scale, before, lanes)
                    totals[r] = e.let(more)
        for r, row in enumerate(rows):
            x_scale = e.let(e.splat(x.scale(row, group, 0), lanes))
            if self.offsets:
                offset = e.load(self.scales, place, self.vectors - 1, part * lanes, lanes=lanes)
                total = e.cast(e.const(0) - x.sum(row, group, 0), "float32")
                totals[r] = e.let(e.fma(offset, e.splat(total, lanes), totals[r], lanes))
            out[r].set(e.fma(totals[r], x_scale, out[r].get(), lanes))

    def finish(self, first: Expr) -> None:
        """Store all rows; in a last, partly filled panel the tiles beyond W are dropped."""
        spec, lanes, parts = self.spec, self.isa.rows, self.isa.parts
        epilogue = Epilogue(spec, self.buffers, lanes, self.factor)
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
