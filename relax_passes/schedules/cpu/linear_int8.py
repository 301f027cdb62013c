"""The linear on int8 activations: integer products a group, float32 sums over groups.

For one tile of 16 rows and one group of 32 columns (the "pn8" kernel):

    for each packed vector v (columns 8v..8v+3 in low nibbles, 8v+4..8v+7 in high ones)
        bytes = table lookup;  lane r of the int32 accumulator += four bytes . four activations
    y[r] += x_scale * sum over terms of  sign * w_scale[r] * (accumulator[r] - offset * x_sum)

Weights are unsigned bytes, activations signed, so vpdpbusd needs no bias and no sign trick.  A
group's four activations are one 32-bit broadcast; a row of W is one lane: no horizontal sums.
M > 1 runs the same text on blocks of rows of x, so that decoded bytes are used several times.
"""

from __future__ import annotations

from typing import Any

from ..spec import GROUP, TILE_ROWS, LinearSpec
from . import emit as e
from . import panel
from .emit import Expr
from .epilogue import Epilogue
from .isa import Isa
from .knobs import CpuKnobs
from .linear_panel import emit_panel
from .rows import either, row_blocks
from .terms import ScaleReader, Term, common_factor


def linear_int8(spec: LinearSpec, isa: Isa, knobs: CpuKnobs) -> Any:
    """Build the PrimFunc for activation "int8".

    Parameters
    ----------
    spec : LinearSpec
        What to compute; its ``buffers()`` are the arguments.
    isa : Isa
        Table lookup and dot product.
    knobs : CpuKnobs
        Row blocks, prefetch distance and the like.

    Returns
    -------
    tvm.tirx.PrimFunc
    """
    with e.function("linear_int8", spec.buffers(), spec.m) as (buffers, m):

        def few() -> None:
            _emit_direct(spec, isa, knobs, buffers, m)

        def many() -> None:
            emit_panel(spec, isa, knobs, buffers, m)

        if isa.panels and panel.supports(spec.fmt):
            either(m, spec, knobs.panel_rows, few, many)
        else:
            few()
    return buffers["func"]


def _emit_direct(spec: LinearSpec, isa: Isa, knobs: CpuKnobs, buffers: Any, m: Expr) -> None:
    """Emit the kernel that decodes a tile again for every block of rows of x."""
    terms = isa.terms(spec.fmt)
    with e.parallel(0, spec.tiles // 2 if spec.silu_mul else spec.tiles) as t:
        kernel = _Tile(spec, isa, knobs, buffers, terms)

        def body(row: Expr, rows: int) -> None:
            row = e.let(row)
            tile_pair(spec, kernel, t, row, rows)

        row_blocks(m, knobs.blocks(isa.block, spec.m), body)


def tile_pair(spec: LinearSpec, kernel: Any, t: Expr, row: Expr, rows: int) -> None:
    """Emit product and epilogue of tile t, or of the tiles 2t and 2t + 1 of silu * up.

    The pair is a loop, not two copies: lowering time grows with the text. Its sums wait on the
    stack for the epilogue.
    """
    if not spec.silu_mul:
        kernel.epilogue.rows([[[p.get() for p in r] for r in kernel.product(t, row, rows)]], t, row)
        return
    lanes, parts = kernel.isa.rows, kernel.isa.parts
    kept = e.scratch_rows(rows, 2 * TILE_ROWS)
    with e.serial(0, 2) as s:
        for r, registers in enumerate(kernel.product(t * 2 + s, row, rows)):
            for p, register in enumerate(registers):
                e.store(kept[r], register.get(), s * TILE_ROWS + p * lanes, lanes=lanes)
    sums = [
        [
            [e.load(buffer, s * TILE_ROWS + p * lanes, lanes=lanes) for p in range(parts)]
            for buffer in kept
        ]
        for s in range(2)
    ]
    kernel.epilogue.rows(sums, t, row)


class _Tile:
    """Code generator for one tile of 16 rows of W."""

    def __init__(
        self, spec: LinearSpec, isa: Isa, knobs: CpuKnobs, buffers: Any, terms: tuple[Term, ...]
    ):
        self.spec, self.isa, self.knobs, self.buffers = spec, isa, knobs, buffers
        self.terms = terms
        self.reader = ScaleReader(spec.fmt, buffers["w_scales"])
        self.factor = common_factor(terms)
        self.tables = [None if t.table is None else isa.table(t.table) for t in terms]
        self.eight_bit = terms[0].table is None
        self.epilogue = Epilogue(spec, buffers, isa.rows, self.factor)

    def product(self, tile: Expr, row: Expr, rows: int) -> list[list[e.Register]]:
        """Emit the loop over K; returns float32 registers [row][part]."""
        lanes = self.isa.rows
        zero = e.const(0.0, "float32", lanes)
        tile = e.let(tile)
        out = [
            [e.Register("float32", lanes, zero) for _ in range(self.isa.parts)] for _ in range(rows)
        ]
        with e.serial(0, self.spec.groups) as group:
            self.knobs.prefetch_tile(self.spec, self.buffers, tile, group)
            x_scales = [e.let(e.load(self.buffers["scales"], row + r, group)) for r in range(rows)]
            x_sums: list[Expr] = []
            if self.spec.needs_sums:
                x_sums = [e.let(e.load(self.buffers["sums"], row + r, group)) for r in range(rows)]
            for part in range(self.isa.parts):
                self._group(tile, group, part, row, rows, x_scales, x_sums, out)
        return out

    def _group(
        self,
        tile: Expr,
        group: Expr,
        part: int,
        row: Expr,
        rows: int,
        x_scales: list[Expr],
        x_sums: list[Expr],
        out: list[list[e.Register]],
    ) -> None:
        """Emit one group of 32 columns for the rows of one vector part."""
        isa, lanes = self.isa, self.isa.rows
        vectors = self.spec.tile_code_bytes // 64
        per_sub = vectors // self.reader.sub_groups
        totals: list[Expr | None] = [None] * rows
        for sub in range(self.reader.sub_groups):
            acc = [
                [e.Register("int32", lanes, self._start(t, x_sums, r)) for t in self.terms]
                for r in range(rows)
            ]
            with e.serial(sub * per_sub, (sub + 1) * per_sub) as v:
                at = v * 64 + part * isa.bytes
                packed = e.let(e.load(self.buffers["w_codes"], tile, group, at, lanes=isa.bytes))
                for half, decoded in enumerate(self._decode(packed)):
                    column = group * GROUP + (v * 4 if self.eight_bit else v * 8 + 4 * half)
                    prepared = [isa.prepare(w) for w in decoded]
                    for r in range(rows):
                        a = isa.activation(self.buffers["codes"], row + r, column)
                        for i, w in enumerate(prepared):
                            acc[r][i].set(isa.dot(acc[r][i].get(), w, a))
            weights = self._weights(tile, group, sub, part)
            for r in range(rows):
                totals[r] = self._combine(
                    [a.get() for a in acc[r]], weights, x_sums[r] if x_sums else None, totals[r]
                )
        for r in range(rows):
            register = out[r][part]
            register.set(e.fma(e.splat(x_scales[r], lanes), totals[r], register.get(), lanes))

    def _start(self, term: Term, x_sums: list[Expr], r: int) -> Expr:
        """Return the initial accumulator: a constant offset is subtracted up front, in integers."""
        if isinstance(term.offset, int) and term.offset:
            return e.let(e.splat(x_sums[r] * (-term.offset), self.isa.rows))
        return e.const(0, "int32", self.isa.rows)

    def _decode(self, packed: Expr) -> list[list[Expr]]:
        """Decode a packed vector: [half][term] byte vectors."""
        if self.eight_bit:
            return [[self.isa.eight_bit(packed)]]
        isa = self.isa
        return [
            [e.let(isa.lookup(t, index)) for t in self.tables]
            for index in (e.let(isa.low(packed)), e.let(isa.high(packed)))
        ]

    def _weights(self, tile: Expr, group: Expr, sub: int, part: int) -> dict[str, Expr]:
        """Load the scales and zero points that the terms name, once each."""
        lanes, values = self.isa.rows, {}
        for t in self.terms:
            if t.scale not in values:
                args = (tile, group, sub, part * lanes, lanes)
                values[t.scale] = e.let(self.reader.scale(t.scale, *args))
            if isinstance(t.offset, str) and t.offset not in values:
                values[t.offset] = e.let(
                    self.reader.zero_point(t.offset, tile, group, sub, part * lanes, lanes)
                )
        return values

    def _combine(
        self, acc: list[Expr], weights: dict[str, Expr], x_sum: Expr | None, total: Expr | None
    ) -> Expr:
        """Turn the integer sums of a (sub-)group into float32, scaled by the weights' scales."""
        lanes = self.isa.rows
        for t, value in zip(self.terms, acc, strict=True):
            value = e.cast(value, "float32", lanes)
            if isinstance(t.offset, str):
                minus = e.splat(e.cast(e.const(0) - x_sum, "float32"), lanes)
                value = e.fma(weights[t.offset], minus, value, lanes)
            relative = t.factor / self.factor
            scale = weights[t.scale]
            if relative == -1.0:
                value, relative = e.const(0.0, "float32", lanes) - value, 1.0
            if relative != 1.0:
                scale = scale * e.const(relative, "float32", lanes)
            product = value * scale if total is None else e.fma(value, scale, total, lanes)
            total = e.let(product)
        return total
