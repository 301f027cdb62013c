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
        if len(self.fmt.terms) == 1:
            transform, scale = self._single(tile, group)
            e.store(scales, scale, at, 0, lanes=16)
            self._vectors(tile, group, codes, at, transform)
            return
        merge = _Merge(self.fmt, self.reader, tile, group)
        e.store(scales, merge.scale, at, 0, lanes=16)
        with e.when(merge.far_apart > 0):
            with e.then():
                self._vectors(tile, group, codes, at, merge.rounded())
            with e.otherwise():
                self._vectors(tile, group, codes, at, merge.exact())

    def _vectors(self, tile: Expr, group: Expr, codes: Any, at: Expr, transform: Any) -> None:
        """Emit the loop over the packed vectors of a tile and group."""
        with e.serial(0, self.spec.tile_code_bytes // 64) as v:
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


class _Merge:
    """The two scales of a tile and group as one: multipliers of either table and a common scale.

    Sixteen-bit words hold two bytes of one row.  Products with multipliers of either sign and
    their sum are exact modulo 2^16, and the sum's bytes lie in 0..255, so no carry survives.
    """

    def __init__(self, fmt: Any, reader: ScaleReader, tile: Expr, group: Expr):
        self.order = [0, 1] if fmt.terms[0].factor > 0 else [1, 0]
        mantissa_bits, bias = POWERS[fmt.scale_tensors[0].type.name]
        c = self._c

        def parts(name: str) -> tuple[Expr, Expr]:
            stored = e.let(e.cast(reader.stored(name, tile, group, 0, 0, 16), "int32", 16))
            if mantissa_bits == 0:
                return c(4), stored
            exponent = e.let(stored >> c(mantissa_bits))
            low = stored & c((1 << mantissa_bits) - 1)
            mantissa = e.let(low + (tirx.min(exponent, c(1)) << c(2)))
            return mantissa, e.let(tirx.max(exponent, c(1)))

        positive, negative = (fmt.terms[i].scale for i in self.order)
        (self.mp, ep), (self.mn, en) = parts(positive), parts(negative)
        # All ones where the negative side is the big one. TVM 0.27 cannot bind vectors of bool.
        self.flip = e.let((ep - en) >> c(31))
        high = e.let(tirx.max(ep, en))
        d = e.let(high - tirx.min(ep, en))
        self.apart = e.let(tirx.min(d, c(1)))
        self.shift = e.let(tirx.min(d - self.apart, c(7)))
        self.far_apart = e.let(e.llvm("int32", "llvm.vector.reduce.smax", self.shift))
        # The unit is a normal float32 as long as the stored exponents are above 2^-126.
        unit = tirx.max(high - self.apart + c(127 - bias), c(0))
        self.scale = e.bits((unit << c(23)) | (self.flip & c(-(2**31))), "float32", 16)
        self.base = e.const(MERGED_OFFSET * 0x0101, "uint16", 32)

    @staticmethod
    def _c(value: int) -> Expr:
        return e.const(value, "int32", 16)

    def _words(self, value: Expr) -> Expr:
        return e.bits(value, "uint16", 32)

    def _twice(self, value: Expr) -> Expr:
        """Repeat a number in both 16-bit halves of a row's lane."""
        return e.let(self._words((value & self._c(0xFFFF)) * self._c(0x00010001)))

    def _pick(self, one: Expr, other: Expr) -> Expr:
        return (one & self.flip) | (other & (self.flip ^ self._c(-1)))

    def exact(self) -> Any:
        """Return looked-up tables -> bytes, for scales whose exponents differ by one at most."""
        sign = e.let(self.flip | self._c(1))  # 1, or -1 where the byte holds the negated weight
        times_p = self._twice(sign * (self.mp << (self.apart & (self.flip ^ self._c(-1)))))
        times_n = self._twice((self._c(0) - sign) * (self.mn << (self.apart & self.flip)))

        def transform(looked: list[Expr]) -> Expr:
            p, n = (self._words(looked[i]) for i in self.order)
            return e.bits(self.base + p * times_p + n * times_n, "uint8", 64)

        return transform

    def rounded(self) -> Any:
        """Return looked-up tables -> bytes, the small side divided by 2^shift and rounded."""
        c, pick = self._c, self._pick
        big_times = self._twice(pick(self.mn, self.mp) << self.apart)
        small_times = self._twice(pick(self.mp, self.mn))
        rounding = e.let(self._words(((c(1) << self.shift) >> c(1)) * c(0x01010101)))
        mask = e.let(self._words((c(255) >> self.shift) * c(0x01010101)))
        shifts = self._twice(self.shift)

        def transform(looked: list[Expr]) -> Expr:
            p, n = (e.let(e.bits(looked[i], "int32", 16)) for i in self.order)
            big = e.let(self._words(pick(n, p)) * big_times)
            small = e.let(self._words(pick(p, n)) * small_times)
            small = e.let(((small + rounding) >> shifts) & mask)
            return e.bits(self.base + big - small, "uint8", 64)

        return transform
