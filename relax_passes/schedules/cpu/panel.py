"""Tiles of W decoded once for many rows of x: unsigned bytes with one offset, one scale a group.

The pn8 kernel pays two products a weight for AMXFP4, one a sign.  For a block of rows of x it is
cheaper to merge the two scales first.  An E5M2 scale is m * 2^e with m in 0..7, so in units of the
scales' common power of two a weight is an integer:

    big = the side with the larger exponent, d = the exponents' difference
    unit = 2^e (d = 0) or 2^(e_big - 1)        12 * m * 2 = 168 at most on the big side,
    byte = 84 + big * m * (2 if d else 1)      12 * m = 84 on the small one: 0..252
              - round(small * m / 2^(d - 1))   exact for d <= 1; else off by half a unit at most

and where the negative side is the big one the byte holds the negated weight and the scale its sign.
The step is within 1/96 of the group's largest weight even when it is inexact, and most groups are
exact.  One vpdpbusd a weight is left, and 84 times the sum of the activations is the accumulator's
start.  One-term formats need no such trick: their table is the byte (zero points are folded in).

    panel codes   uint8   [tiles, G, 8 steps, 64]   step = columns 4 * step .. 4 * step + 3
    panel scales  float32 [tiles, G, 16]
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from ..spec import GROUP, LinearSpec
from . import emit as e
from .emit import Expr
from .isa_avx512 import Avx512
from .terms import ScaleReader, common_factor

MERGED_OFFSET = 84
ZERO_POINT_OFFSET = 16
POWERS = {"E5M2": (2, 17), "E8M0": (0, 129)}  # mantissa bits, power of two of mantissa 4 at e = 0
STEPS = GROUP // 4


def supports(fmt: Any) -> bool:
    """Whether a format's tiles can be bytes with one scale a group."""
    if fmt.group_size != GROUP:
        return False
    if len(fmt.terms) == 1:
        return True
    types = {t.type.name for t in fmt.scale_tensors}
    return len(fmt.terms) == 2 and len(types) == 1 and types <= set(POWERS)


def offset(fmt: Any) -> int:
    """Return what is added to every weight to make it an unsigned byte."""
    if len(fmt.terms) == 2:
        return MERGED_OFFSET
    constant = fmt.terms[0].offset
    return ZERO_POINT_OFFSET if isinstance(constant, str) else constant


class PanelDecoder:
    """Emits the decode of one tile and group into the panel."""

    def __init__(self, spec: LinearSpec, isa: Avx512, buffers: Any):
        self.spec, self.isa, self.buffers, self.fmt = spec, isa, buffers, spec.fmt
        self.reader = ScaleReader(spec.fmt, buffers["w_scales"])
        self.factor = common_factor(spec.fmt.terms)
        self.tables = [None if t.table is None else isa.table(t.table) for t in spec.fmt.terms]

    def decode(self, tile: Expr, group: Expr, codes: Any, scales: Any, at: Expr) -> None:
        """Decode tile ``tile``, group ``group`` to codes[at, step, :] and scales[at, :]."""
        if len(self.fmt.terms) == 2:
            transform, scale = self._merged(tile, group)
        else:
            transform, scale = self._single(tile, group)
        e.store(scales, scale, at, 0, lanes=16)
        for v in range(self.spec.tile_code_bytes // 64):
            packed = e.let(e.load(self.buffers["w_codes"], tile, group, v * 64, lanes=64))
            halves = [packed] if self.tables[0] is None else self._halves(packed)
            for h, index in enumerate(halves):
                looked = [index if t is None else self.isa.lookup(t, index) for t in self.tables]
                step = v * len(halves) + h
                e.store(codes, transform([e.let(w) for w in looked]), at, step, 0, lanes=64)

    def _halves(self, packed: Expr) -> list[Expr]:
        return [e.let(self.isa.low(packed)), e.let(self.isa.high(packed))]

    def _single(self, tile: Expr, group: Expr) -> tuple[Any, Expr]:
        term = self.fmt.terms[0]
        scale = self.reader.scale(term.scale, tile, group, 0, 0, 16)
        if term.factor < 0:
            scale = e.const(0.0, "float32", 16) - scale
        if not isinstance(term.offset, str):
            return (lambda looked: looked[0]), scale
        zero = self.reader.stored(term.offset, tile, group, 0, 0, 16)
        shift = e.const(ZERO_POINT_OFFSET, "int32", 16) - e.cast(zero, "int32", 16)
        shift = e.let(e.bits(shift * e.const(0x01010101, "int32", 16), "uint8", 64))
        return (lambda looked: looked[0] + shift), scale

    def _merged(self, tile: Expr, group: Expr) -> tuple[Any, Expr]:
        """Prepare the multipliers of the two signs' tables, see the module's docstring."""
        mantissa_bits, bias = POWERS[self.fmt.scale_tensors[0].type.name]

        def c(v: int) -> Expr:
            return e.const(v, "int32", 16)

        def parts(name: str) -> tuple[Expr, Expr]:
            stored = e.cast(self.reader.stored(name, tile, group, 0, 0, 16), "int32", 16)
            stored = e.let(stored)
            if mantissa_bits == 0:
                return c(4), stored
            exponent = e.let(stored >> c(mantissa_bits))
            low = stored & c((1 << mantissa_bits) - 1)
            mantissa = e.let(low + (tirx.min(exponent, c(1)) << c(2)))
            return mantissa, e.let(tirx.max(exponent, c(1)))

        positive, negative = (t.scale for t in sorted(self.fmt.terms, key=lambda t: -t.factor))
        tables = [0, 1] if self.fmt.terms[0].factor > 0 else [1, 0]
        (mp, ep), (mn, en) = parts(positive), parts(negative)
        # All ones where the negative side is the big one. TVM 0.27 cannot bind vectors of bool.
        flip = e.let((ep - en) >> c(31))

        def pick(one: Expr, other: Expr) -> Expr:
            return (one & flip) | (other & (flip ^ c(-1)))

        high = e.let(tirx.max(ep, en))
        d = e.let(high - tirx.min(ep, en))
        apart = e.let(tirx.min(d, c(1)))
        twice = c(0x00010001)  # repeat a number in both 16-bit halves of a row's lane
        big_times = e.let((pick(mn, mp) << apart) * twice)
        small_times = e.let(pick(mp, mn) * twice)
        shift = e.let(tirx.min(d - apart, c(7)))
        rounding = e.let(((c(1) << shift) >> c(1)) * c(0x01010101))
        mask = e.let((c(255) >> shift) * c(0x01010101))
        shifts = e.let(e.bits(shift * twice, "uint16", 32))
        unit = high - apart + c(127 - bias)
        sign = flip & c(-(2**31))
        # The unit is a normal float32 as long as the stored exponents are above 2^-126.
        scale = e.bits(tirx.max(unit, c(0)) << c(23) | sign, "float32", 16)
        base = e.const(MERGED_OFFSET * 0x0101, "uint16", 32)

        def words(value: Expr) -> Expr:
            return e.bits(value, "uint16", 32)

        def transform(looked: list[Expr]) -> Expr:
            p, n = (e.let(e.bits(looked[i], "int32", 16)) for i in tables)
            big = e.let(words(pick(n, p)) * words(big_times))
            small = e.let(words(pick(p, n)) * words(small_times))
            small = e.let(((small + words(rounding)) >> shifts) & words(mask))
            return e.bits(base + big - small, "uint8", 64)

        return transform, scale
