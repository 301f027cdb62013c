"""Four-bit activations as signed bytes without any rounding, for W4A4 with many rows.

A quantized group of x has the doubled E2M1 values 2q of either sign, 0..12, and two scales
m * 2^e, m = 4..7.  With d the difference of the exponents, "big" the side of the larger one, the
sign of the group turned so that the big side is positive, and "near" while the small side's m
divided by 2^(d - 1) is an integer (always for d <= 1):

    near   2q * m * (d ? 2 : 1) of the big side less 2q * m / 2^(d - 1) of the small one, -84..168
    far    2q * m of the big side; codes_low has 2q * m of the small one

    codes, codes_low    int8 [M, Kp]      the integers above less OFFSET: -126..126
    scales, scales_low  float32 [M, G]    what one is worth, with its sign
    starts, starts_low  int32 [M, G]      sums of the bytes, times less the offset of W; starts also
                                          what group_sums.py begins with
    listed              int32 [G, 1 + M]  how many rows are far in a group, then their numbers

    turned codes        int8 [M / 16, G, 8 steps, 64]    lane r of 32 bits: row r, four columns
    turned scales       float32 [M / 16, G, 16]

Formats with one scale a group already are such bytes (2q, offset 0); they only get their starts and
turned copies.  Scales below 2^-126 count as 0.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.fp4_integers import NAN_EXPONENT, TRAILING_ZEROS
from relax_passes.spec import GROUP, TILE_ROWS, LinearSpec

from . import group_sums
from .low_bytes import list_rows
from .panel import STEPS, Words

OFFSET = 42


class ExactActivations:
    """The bytes, in workspaces that are filled in front of the products.

    Attributes
    ----------
    offset : int
        What is missing from every byte.
    words, low : Words
        The bytes; ``low`` is None for formats of one scale a group.
    listed : Buffer
        In which rows of a group ``low`` is set.
    turned_codes, turned_scales : Buffer
        Rows as lanes, for groups of W that are multiplied row by row; if ``turn``.
    """

    def __init__(
        self, spec: LinearSpec, buffers: Any, m: Expr, blocks: Expr, w_offset: int, turn: bool
    ):
        self.spec, self.buffers, self.m, self.w_offset = spec, buffers, m, w_offset
        self.turn, groups = turn, spec.groups
        if turn:
            self.turned_codes = e.workspace((blocks, groups, STEPS, TILE_ROWS), "int32")
            self.turned_scales = e.workspace((blocks, groups, TILE_ROWS), "float32")
        starts = e.workspace((m, groups), "int32")
        self.low: Words | None = None
        if "codes" in buffers:
            self.offset = 0
            self.words = Words(buffers["codes"], buffers["scales"], starts, 1)
            return
        fmt = spec.activation.fmt
        self.order = ("_0", "_1") if fmt.terms[0].factor > 0 else ("_1", "_0")
        self.offset = OFFSET
        self.words = self._allocate(starts)
        self.low = self._allocate(e.workspace((m, groups), "int32"))
        self.far = e.workspace((m, groups), "int32")
        self.listed: Any = None

    def _allocate(self, starts: Any) -> Words:
        codes = e.workspace((self.m, self.spec.k_padded), "int8")
        return Words(codes, e.workspace((self.m, self.spec.groups), "float32"), starts, 1)

    def emit(self) -> None:
        """Fill the workspaces, rows in parallel, then the lists, groups in parallel."""
        with e.parallel(0, self.m) as row, e.serial(0, self.spec.groups) as group:
            if self.low is None:
                codes = e.load(self.words.codes, row, group * GROUP, lanes=GROUP)
                self._store_start(self.words, row, group, e.let(e.cast(codes, "int16", GROUP)))
                self._turn(row, group, codes, e.load(self.words.scales, row, group))
            else:
                self._group(row, group)
        if self.low is not None:
            self.listed = list_rows(self.far, self.m, self.spec.groups)

    def _group(self, row: Expr, group: Expr) -> None:
        column, (mp, ep), (mn, en) = group * GROUP, *self._scales(row, group)
        sides = [e.load(self.buffers[f"codes{i}"], row, column, lanes=GROUP) for i in self.order]
        sides = [e.let(e.cast(s, "int16", GROUP)) for s in sides]
        flip = e.let((ep - en) >> e.const(31))  # all ones where the negative side is the big one
        high, least = e.let(tirx.max(ep, en)), e.let(tirx.min(ep, en))
        small, d = e.let(_pick(flip, mp, mn)), e.let(high - least)
        apart = e.let(tirx.min(d, e.const(1)))
        zeros = (e.const(TRAILING_ZEROS) >> ((small & e.const(3)) * 2)) & e.const(3)
        far = e.let((zeros - (d - apart)) >> e.const(31))  # all ones or zeros
        near = far ^ e.const(-1)
        shift = e.let((d - apart) & near)
        apart = e.let(apart & near)
        big = e.let(_pick(flip, mn, mp) << apart)
        minus = e.let(e.const(0) - ((small >> shift) & near))
        scale = e.let(_unit(high - apart, flip))
        times = _pick(flip, minus, big), _pick(flip, big, minus)
        self._turn(row, group, self._store(self.words, row, group, sides, times), scale)
        e.store(self.words.scales, scale, row, group)
        listed = e.let(far & small)
        e.store(self.far, e.cast(listed != 0, "int32"), row, group)
        with e.when(listed != 0), e.then():
            assert self.low is not None
            other = e.let(flip ^ e.const(-1))
            self._store(self.low, row, group, sides, (flip & small, other & small))
            e.store(self.low.scales, _unit(least, other), row, group)

    def _scales(self, row: Expr, group: Expr) -> list[tuple[Expr, Expr]]:
        """Return mantissa 4..7 (0: scale 0) and exponent field of both scales, positive first."""
        stored = [e.load(self.buffers[f"scales{i}"], row, group) for i in self.order]
        words = [e.let(e.bits(s, "int32") & e.const(0x7FFFFFFF)) for s in stored]
        fields = [e.let(w >> e.const(23)) for w in words]
        out = []
        for i, (word, field) in enumerate(zip(words, fields, strict=True)):
            mantissa = ((word >> e.const(21)) & e.const(3)) + e.const(4)
            zero = field == e.const(0)
            # A side that does not occur takes the other's exponent.
            mantissa = e.opaque(tirx.Select(zero, e.const(0), mantissa), "int32")
            out.append((mantissa, e.opaque(tirx.Select(zero, fields[1 - i], field), "int32")))
        return out

    def _store(
        self, to: Words, row: Expr, group: Expr, sides: list[Expr], times: tuple[Expr, Expr]
    ) -> Expr:
        """Store both sides' codes times a number of theirs, less OFFSET, and their start."""
        one, other = (e.splat(e.cast(t, "int16"), GROUP) for t in times)
        value = sides[0] * one + sides[1] * other - e.const(OFFSET, "int16", GROUP)
        value = e.let(value)
        codes = e.let(e.cast(value, "int8", GROUP))
        e.store(to.codes, codes, row, group * GROUP, lanes=GROUP)
        self._store_start(to, row, group, value)
        return codes

    def _store_start(self, to: Words, row: Expr, group: Expr, codes: Expr) -> None:
        """Store what accumulators start with; the sum of 32 bytes fits 16 bits."""
        total = e.cast(e.llvm("int16", "llvm.vector.reduce.add", codes), "int32")
        begin = group_sums.first(self.spec.fmt) if to is self.words else 0
        e.store(to.sums, total * e.const(-self.w_offset) + begin, row, group)

    def _turn(self, row: Expr, group: Expr, codes: Expr, scale: Expr) -> None:
        if not self.turn:
            return
        block, lane = e.let(row >> e.const(4)), e.let(row & e.const(15))
        words = e.let(e.bits(codes, "int32", STEPS))
        for step in range(STEPS):
            word = tirx.Shuffle([words], [tirx.const(step, "int32")])
            e.store(self.turned_codes, word, block, group, step, lane)
        e.store(self.turned_scales, scale, block, group, lane)


def _pick(mask: Expr, one: Expr, other: Expr) -> Expr:
    return (one & mask) | (other & (mask ^ e.const(-1)))


def _unit(exponent: Expr, negative: Expr) -> Expr:
    """Return the float32 that is worth 1 under an exponent field whose mantissas are 4..7."""
    infinite = exponent >= e.const(NAN_EXPONENT)  # NaN stays NaN
    word = tirx.Select(infinite, e.const(0x7FC00000), exponent << e.const(23))
    signed = e.opaque(word | (negative & e.const(-(2**31))), "int32")
    return e.let(e.bits(signed, "float32") * e.const(0.25, "float32"))
