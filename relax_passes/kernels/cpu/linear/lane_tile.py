"""The direct kernel's tile where a lane of a register is four columns of x (sdot by element).

The 32 columns of a row and group are two registers for all rows of W, and nothing is repeated.  The
two terms of an AMXFP4 weight, s and t its scales, v its value in half units with its sign,

    s max(v, 0) - t max(-v, 0)  =  t * v  +  (s - t) * max(v, 0)

so that one lookup and a maximum do, where a second lookup would be slower on some cores.  Sums
start at the bits of 1.5 * 2^23 (group_sums.py): subtracting is cheaper than converting.

E5M2 becomes float32 by a shift.  Its exponents are then 112 too small, subnormal ones too: half of
that is made good by x's scales, half in the end, so that nothing overflows.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.base import E2M1_DOUBLED
from relax_passes.kernels.cpu.isa.neon import NeonDot
from relax_passes.spec import GROUP, TILE_ROWS
from relax_passes.terms import Term

from . import merge
from .group_sums import FIRST
from .tile import ActivationCodes, Tile

SIGNED = E2M1_DOUBLED + tuple(-v & 255 for v in E2M1_DOUBLED)
BYTES = 16  # of a vector
UNBIASED = 2.0**56  # twice: 127 - 15


class LaneTile(Tile):
    """Code generator for one tile of 16 rows of W."""

    isa: NeonDot

    def _terms(self) -> tuple[Term, ...]:
        """Choose the terms of W, for a pair of scales those of above."""
        terms = super()._terms()
        types = {t.type.name for t in self.spec.fmt.scale_tensors}
        self.pair = merge.supports(self.spec.fmt) and types == {"E5M2"}
        if not self.pair:
            return terms
        self.by_sign = sorted(terms, key=lambda term: -term.factor)
        factor = abs(terms[0].factor) * UNBIASED
        return Term(SIGNED, "negative", factor, 0), Term(SIGNED, "difference", factor, 0)

    def _prefetch(self, tile: Expr, group: Expr, part: int) -> None:
        """Emit a part's share of a group's prefetches.

        LLVM moves no load in front of them, so that a part's registers are free for the next one.
        """
        share = (part, self.isa.parts)
        self.knobs.prefetch_tile(self.spec, self.buffers, tile, group, share=share)

    def _start(self, term: Term, total: Expr) -> Expr:
        """Return the initial accumulator."""
        return e.const(FIRST, "int32", self.isa.rows) if self.pair else super()._start(term, total)

    def _products(
        self,
        tile: Expr,
        group: Expr,
        part: int,
        row: Expr,
        sub: int,
        xs: list[ActivationCodes],
        sums: list[list[Expr | None]],
    ) -> Any:
        """Emit the integer products of a sub-group: [row][array of x][term of W]."""
        columns, lanes = GROUP // self.sub_groups, self.isa.rows
        acc = [[[self._start(t, s) for t in self.terms] for s in own] for own in sums]
        words = [
            [
                [
                    e.let(e.load(x.codes, row + r, group * GROUP + at, lanes=BYTES))
                    for at in range(sub * columns, (sub + 1) * columns, BYTES)
                ]
                for x in xs
            ]
            for r in range(len(sums))
        ]
        vectors = self.spec.tile_code_bytes // 64 // self.sub_groups
        step = 0
        for v in range(sub * vectors, (sub + 1) * vectors):
            at = v * 64 + part * BYTES
            packed = e.let(e.load(self.buffers["w_codes"], tile, group, at, lanes=BYTES))
            for weights in self._decode(packed):
                register, lane = divmod(step, BYTES // 4)
                step += 1
                for own, arrays in zip(words, acc, strict=True):
                    for x, totals in zip(own, arrays, strict=True):
                        for t, w in enumerate(weights):
                            totals[t] = e.let(self.isa.lane_dot(totals[t], w, x[register], lane))
        return [
            [[e.Register("int32", lanes, total) for total in totals] for totals in arrays]
            for arrays in acc
        ]

    def _decode(self, packed: Expr) -> list[list[Expr]]:
        """Decode a packed vector: [half][term] byte vectors."""
        if not self.pair:
            return super()._decode(packed)
        halves = []
        for index in (self.isa.low(packed), self.isa.high(packed)):
            value = e.let(self.isa.lookup(self.tables[0], e.let(index)))
            halves.append([value, e.let(self.isa.positive(value))])
        return halves

    def _weights(self, tile: Expr, group: Expr, sub: int, part: int) -> dict[str, Expr]:
        """Load the scales that the terms name; a pair's for the whole tile with its first part."""
        if not self.pair:
            return super()._weights(tile, group, sub, part)
        if part == 0:
            self.halves = [
                self._high_bytes(self.reader.stored(t.scale, tile, group, 0, 0, TILE_ROWS))
                for t in self.by_sign
            ]
        lanes = self.isa.rows
        order = [tirx.const(part * lanes + i, "int32") for i in range(lanes)]
        positive, negative = (
            e.let(
                e.bits(
                    e.cast(tirx.Shuffle([half], order), "int32", lanes) << shift, "float32", lanes
                )
            )
            for half in self.halves
            for shift in [e.const(13, "int32", lanes)]
        )
        return {"negative": negative, "difference": e.let(positive - negative)}

    @staticmethod
    def _high_bytes(stored: Expr) -> Expr:
        """Return uint16 of the 16 rows, E5M2 in the high bytes: float16."""
        zeros = e.const(0, "uint8", TILE_ROWS)
        order = [tirx.const(i // 2 + TILE_ROWS * (i % 2), "int32") for i in range(2 * TILE_ROWS)]
        return e.let(e.bits(tirx.Shuffle([zeros, e.let(stored)], order), "uint16", TILE_ROWS))

    def _combine(
        self, acc: list[Expr], weights: dict[str, Expr], x_sum: Expr | None, total: Expr | None
    ) -> Expr:
        """Turn the integer sums of a group into float32, scaled by the weights' scales."""
        if not self.pair:
            return super()._combine(acc, weights, x_sum, total)
        lanes = self.isa.rows
        first = e.const(1.5 * 2**23, "float32", lanes)
        own, positive = (e.let(e.bits(a, "float32", lanes) - first) for a in acc)
        product = own * weights["negative"]
        return e.let(e.fma(positive, weights["difference"], product, lanes))

    def _x_scale(self, x: ActivationCodes, row: Expr, group: Expr, sub: int) -> Expr:
        """Load the scale of one sub-group of x."""
        scale = super()._x_scale(x, row, group, sub)
        return e.let(scale * e.const(UNBIASED, "float32")) if self.pair else scale
