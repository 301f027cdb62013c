"""Four-bit activations as integers with second bytes, for kernels of int8 activations.

A quantized group has the doubled E2M1 values 2q of either sign, 0..12, and two scales m * 2^e,
m = 4..7.  With d the difference of the exponents, "big" the side of the larger one, t the power of
two in the small side's m, at most d:

    byte   2q * m * 2^(d - t) of the big side, 2q * m / 2^t of the small one
    word   2q * m * 256 of the big side, 2q * m * 2^(8 - d) of the small one

A byte holds all groups of equal exponents and most whose exponents differ by one.  Others are
words: their high byte is the code, ``codes_low`` the rest, ``outliers`` lists them (outliers.py).
Nothing is rounded unless the exponents differ by more than eight, and then by 2^-11 of the group's
largest value.  Formats with one scale a group already are bytes; their lists are empty.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from amx_tvm.formats.base import Format
from relax_passes.spec import GROUP

from . import emit as e
from .emit import Expr
from .fp4 import LANES, Fp4Quantizer
from .outliers import list_groups

SCALES = {"E5M2", "E8M0"}  # mantissas of three bits at most
NAN_EXPONENT = 255
TRAILING_ZEROS = 0b00_01_00_10  # of m = 4..7, two bits each
LARGEST = 10  # times a side's codes: 12 * 10 fits a byte
BITS = 8  # of a second byte
FAR = 16  # exponents further apart leave nothing of the small side


def supports(fmt: Format) -> bool:
    """Whether activations in this format are such integers."""
    if fmt.group_size != GROUP:
        return False
    return len(fmt.terms) == 1 or (
        {t.type.name for t in fmt.scale_tensors} <= SCALES and not fmt.row_scaled
    )


class Fp4Integers:
    """Quantizes the groups of one row: all scales, what codes are multiplied by, all codes."""

    def __init__(self, fmt: Format, buffers: dict[str, Any], row: Expr, k: int):
        self.fmt, self.buffers, self.row = fmt, buffers, row
        self.groups = -(-k // GROUP)
        self.single = len(fmt.terms) == 1
        if self.single:
            self.quantizer = Fp4Quantizer(fmt, buffers, row, None)
            return
        padded = -(-self.groups // LANES) * LANES
        self.scales = {f"scales_{i}": e.workspace((1, padded), "float32") for i in (0, 1)}
        self.quantizer = Fp4Quantizer(fmt, self.scales, e.const(0), None)
        self.times = e.workspace((2, padded), "int32")  # of the quantizer's signs
        self.units = e.workspace((padded,), "float32")
        self.words = e.workspace((padded,), "int32")  # 1 where a group is words

    def measure(self, group: Expr, values: list[Expr]) -> None:
        """Note the scales of a group."""
        self.quantizer.measure(group, values)

    def choose_scales(self) -> None:
        """Choose bytes or words for all groups and list the latter."""
        if self.single:
            e.store(self.buffers["outliers"], e.const(0), self.row, 0)
            return
        with e.serial(0, -(-self.groups // LANES)) as i:
            self._choose(e.let(i * LANES))
        listed = self.buffers["outliers"]
        list_groups(listed, self.row, self.groups, lambda group: e.load(self.words, group))

    def _choose(self, first: Expr) -> None:
        """Choose for 16 groups from ``first`` on."""

        def c(value: int) -> Expr:
            return e.const(value, "int32", LANES)

        def pick(mask: Expr, one: Expr, other: Expr) -> Expr:
            return e.let((one & mask) | (other & (mask ^ c(-1))))

        words = [e.load(self.scales[f"scales_{i}"], 0, first, lanes=LANES) for i in (0, 1)]
        words = [e.let(e.bits(w, "int32", LANES) & c(0x7FFFFFFF)) for w in words]
        fields = [e.let(w >> c(23)) for w in words]
        none = [e.let((f - c(1)) >> c(31)) for f in fields]  # all ones where a scale is 0
        one, other = (
            e.let((((w >> c(21)) & c(3)) + c(4)) & (n ^ c(-1)))
            for w, n in zip(words, none, strict=True)
        )
        # A side that does not occur takes the other's exponent.
        exponents = [pick(none[i], fields[1 - i], fields[i]) for i in (0, 1)]
        flip = e.let((exponents[0] - exponents[1]) >> c(31))  # all ones: the second side is big
        high = e.let(tirx.max(*exponents))
        apart = e.let(tirx.min(high - tirx.min(*exponents), c(FAR)))
        big, small = pick(flip, other, one), pick(flip, one, other)
        zeros = (c(TRAILING_ZEROS) >> ((small & c(3)) * c(2))) & c(3)
        zeros = e.let(tirx.min(zeros, apart))
        more = e.let(apart - zeros)
        byte = e.let(big << more)
        wide = e.let((c(LARGEST) - byte) >> c(31))
        half = (c(1) << apart) >> c(1)
        low = ((small << c(BITS)) + half) >> apart
        big_times = pick(wide, e.let(big << c(BITS)), byte)
        small_times = pick(wide, e.let(low), e.let(small >> zeros))
        signs = self.quantizer.signs
        for i, (mask, sign) in enumerate(zip((flip, e.let(flip ^ c(-1))), signs, strict=True)):
            times = pick(mask, small_times, big_times)
            times = times if sign > 0 else c(0) - times
            e.store(self.times, times, i, first, lanes=LANES)
        exponent = high - (more & (wide ^ c(-1)))
        word = tirx.Select(high >= c(NAN_EXPONENT), c(0x7FC00000), exponent << c(23))
        unit = e.bits(e.opaque(word, "int32", LANES), "float32", LANES)
        e.store(self.units, unit * e.const(0.25, "float32", LANES), first, lanes=LANES)
        e.store(self.words, wide & c(1), first, lanes=LANES)

    def store(self, group: Expr, values: list[Expr]) -> None:
        """Store the codes, the scale and the sums of a group."""
        if self.single:
            self.quantizer.store(group, values)
            return
        buffers, row = self.buffers, self.row
        divisors = self.quantizer.divisors(group)
        times = [e.let(e.splat(e.load(self.times, i, group), LANES)) for i in (0, 1)]
        word = e.load(self.words, group)
        shift = e.let(e.splat(word * e.const(BITS), LANES))
        half = e.let(e.splat(word << e.const(BITS - 1), LANES))
        totals = [e.const(0, "int32", LANES)] * 2
        for j, value in enumerate(values):
            sides = self.quantizer.codes(value, divisors)
            total = e.let(sides[0] * times[0] + sides[1] * times[1])
            high = e.let((total + half) >> shift)
            low = e.let(total - (high << shift))
            for i, (name, code) in enumerate((("codes", high), ("codes_low", low))):
                at = group * GROUP + j * LANES
                e.store(buffers[name], e.cast(code, "int8", LANES), row, at, lanes=LANES)
                totals[i] = totals[i] + code
        e.store(buffers["scales"], e.load(self.units, group), row, group)
        for name, total in zip(("sums", "sums_low"), totals, strict=True):
            if name in buffers:
                value = e.llvm("int32", "llvm.vector.reduce.add", e.let(total))
                e.store(buffers[name], value, row, group)
