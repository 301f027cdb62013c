"""The two scales of an AMXFP4 group as one: weights become unsigned bytes, one product each.

A scale is m * 2^e with m in 0..7, so in units of a common power of two a weight is an integer.
Per row and group, with d the difference of the two exponents and the larger side the big one:

    unit = 2^e (d = 0) or 2^(e_big - 1)        12 * m * 2 = 168 at most on the big side,
    byte = 84 + big * m * (2 if d else 1)      12 * m = 84 on the small one: 0..252
              - round(small * m / 2^(d - 1))   exact for d <= 1; else off by half a unit at most

Where the negative side is the big one the byte holds the negated weight and the scale its sign.
The step is within 1/96 of the group's largest weight even when it is inexact, and most groups are
exact.

Nearly all groups have d <= 2 and normal scales.  Then a byte is one lookup of 128 entries,

    index bits 2..4  magnitude of the code        m = 4 + bits 0..1 (mantissa of its sign's scale)
    bits 5..6        84 + 2q m, 84 + 2 * 2q m, 84 - 2q m, 84 - (2q m + 1) / 2

of which bits 0, 1, 5 and 6 are a row's constants: those of its positive codes, flipped for negative
ones where the two differ.  So a vector of codes takes a vpermb that spreads the sign over those
bits, a vpternlogd and the lookup; compares into mask registers would wait for the port that
multiplies (on Zen 4).  A tile and group with any other row takes a path of multiplications and
shifts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

from tvm import tirx

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.avx512 import Avx512
from relax_passes.kernels.cpu.isa.base import E2M1_DOUBLED, byte_vector
from relax_passes.kernels.cpu.scale_reader import ScaleReader

OFFSET = 84
POWERS = {"E5M2": (2, 17), "E8M0": (0, 129)}  # mantissa bits, power of two of mantissa 4 at e = 0
POSITIVE = E2M1_DOUBLED + (0,) * 8
NEGATIVE = (0,) * 8 + E2M1_DOUBLED
MAGNITUDE, ROW = 0b0011100, 0b1100011  # bits of the index
SPREAD = tuple((code & 7) << 2 | (ROW if code & 8 else 0) for code in range(16))
# By d = -2, -1, 0, 1, 2 (exponent of the positive scale less that of the negative one): which of
# the four forms codes of either sign take, and the unit's power of two beside the negative scale's.
FORM_POSITIVE, FORM_NEGATIVE, UNIT = (3, 2, 0, 1, 1), (1, 1, 2, 2, 3), (-1, -1, 0, 0, 1)


def supports(fmt: Any) -> bool:
    """Whether a format is E2M1 with one scale a sign that can be merged."""
    types = {t.type.name for t in fmt.scale_tensors}
    tables = [tuple(int(v) for v in t.table) for t in fmt.terms if t.table is not None]
    return len(types) == 1 and types <= set(POWERS) and sorted(tables) == [NEGATIVE, POSITIVE]


def tables(fmt: Any, isa: Avx512) -> list[Expr]:
    """Load the tables that a loop keeps: either sign's, the large one's two halves, SPREAD."""
    entries = []
    for form, q, m in product(range(4), E2M1_DOUBLED, range(4, 8)):
        v = q * m
        entries.append([OFFSET + v, OFFSET + 2 * v, OFFSET - v, OFFSET - ((v + 1) >> 1)][form])
    halves = [e.let(byte_vector(entries[i : i + 64])) for i in (0, 64)]
    return [*(isa.table(t) for t in (POSITIVE, NEGATIVE)), *halves, isa.table(SPREAD)]


@dataclass(frozen=True)
class Near:
    """What ``near_pair`` needs of one tile and group.

    Attributes
    ----------
    row, flips : Expr
        uint8 of 64: the constants of a row's positive codes; MAGNITUDE and what negative ones flip.
    scale : Expr
        float32 of 16 rows.
    rare : Expr
        int32, not 0 where ``any_pair`` has to be used in place of all this.
    """

    row: Expr
    flips: Expr
    scale: Expr
    rare: Expr

    def transform(self, isa: Avx512, tables: list[Expr]) -> Callable[[Expr], Expr]:
        """Return codes -> bytes for normal scales whose exponents differ by two at most."""

        def look_up(codes: Expr) -> Expr:
            index = (isa.lookup(tables[4], codes) & self.flips) ^ self.row
            return isa.lookup_128(tables[2], tables[3], index)

        return look_up


class Ahead:
    """``Near`` in registers: made while the group before is multiplied.

    Some 30 cycles pass from a group's scales to its first bytes, as long as three steps of products
    for eight rows; without this, they would not overlap with the products before.
    """

    def __init__(self) -> None:
        self._registers = [
            e.Register(dtype, lanes)
            for dtype, lanes in (("uint8", 64), ("uint8", 64), ("float32", 16), ("int32", 1))
        ]

    def set(self, near: Near) -> None:
        """Keep what the next group needs."""
        values = near.row, near.flips, near.scale, near.rare
        for register, value in zip(self._registers, values, strict=True):
            register.set(value)

    def get(self) -> Near:
        """Read it."""
        return Near(*(e.let(register.get()) for register in self._registers))


class Merge:
    """The scales of one tile and group.

    Attributes
    ----------
    rare : Expr
        Not 0 where ``near_pair`` does not hold and ``any_pair`` has to be used.
    scale : Expr
        Float32 of 16 rows; in a register variable that the chosen path sets.
    """

    def __init__(
        self,
        fmt: Any,
        reader: ScaleReader,
        isa: Avx512,
        tables: list[Expr],
        tile: Expr,
        group: Expr,
    ):
        self.isa, self.tables = isa, tables
        self.mantissa_bits, self.bias = POWERS[fmt.scale_tensors[0].type.name]
        positive = fmt.terms[0 if fmt.terms[0].factor > 0 else 1].scale
        negative = fmt.terms[1 if fmt.terms[0].factor > 0 else 0].scale
        self.stored = [
            e.let(e.cast(reader.stored(name, tile, group, 0, 0, 16), "int32", 16))
            for name in (positive, negative)
        ]
        c = self._c
        self.exponents = [
            e.let(s >> c(self.mantissa_bits)) if self.mantissa_bits else s for s in self.stored
        ]
        self.d = e.let(self.exponents[0] - self.exponents[1])
        self.rare = e.let(e.llvm("int32", "llvm.vector.reduce.or", self.find_rare()))
        self._scale = e.Register("float32", 16, e.const(0.0, "float32", 16))

    @property
    def scale(self) -> Expr:
        """Read the scales."""
        return self._scale.get()

    def find_rare(self) -> Expr:
        """Return int32 of 16 rows, not 0 where ``near_pair`` does not hold."""
        c = self._c
        least = 1 if self.mantissa_bits else 4  # normal scales and units
        lowest = tirx.min(*self.stored) < c(least << self.mantissa_bits)
        distance = e.cast(self.d + c(2), "uint32", 16) > e.const(4, "uint32", 16)
        return tirx.Select(lowest, c(1), c(0)) | tirx.Select(distance, c(1), c(0))

    @staticmethod
    def _c(value: int) -> Expr:
        return e.const(value, "int32", 16)

    def near(self) -> Near:
        """Make the constants of the usual case."""
        c = self._c
        # Negated bytes have a negative scale: its sign bit is added like the exponent.
        units = [((u + 127 - self.bias) << 23) + (d < 0) * 2**31 for d, u in enumerate(UNIT, -2)]
        unit = self._by_distance([(u + 2**31) % 2**32 - 2**31 for u in units])
        scale = e.let(e.bits((self.exponents[1] << c(23)) + unit, "float32", 16))
        pairs = zip(FORM_POSITIVE, FORM_NEGATIVE, strict=True)
        row = self._bytes([p << 5 for p in FORM_POSITIVE], self.stored[0])
        flips = self._bytes([MAGNITUDE | (p ^ n) << 5 for p, n in pairs], self._differ())
        return Near(row, flips, scale, self.rare)

    def _differ(self) -> Expr:
        return e.let(self.stored[0] ^ self.stored[1])

    def _bytes(self, forms: list[int], mantissas: Expr) -> Expr:
        """Make a row's byte, four times: one of five by its d, and the mantissa in bits 0 and 1."""
        value = self._by_distance([form * 0x01010101 for form in forms])
        if self.mantissa_bits:
            repeated = self.isa.repeat_bytes(e.let(e.bits(mantissas, "uint8", 64)))
            value = value | (e.bits(e.let(repeated), "int32", 16) & self._c(0x03030303))
        return e.let(e.bits(value, "uint8", 64))

    def near_pair(self) -> Callable[[Expr], Expr]:
        """Return codes -> bytes for normal scales whose exponents differ by two at most."""
        near = self.near()
        self._scale.set(near.scale)
        return near.transform(self.isa, self.tables)

    def _by_distance(self, values: list[int]) -> Expr:
        """Look up one of five values for every row, by its d = -2 .. 2."""
        items = [0] * 16
        for d, value in zip(range(-2, 3), values, strict=True):
            items[d % 16] = value
        table = tirx.Shuffle([tirx.const(v, "int32") for v in items], list(range(16)))
        return e.let(e.llvm("int32x16", "llvm.x86.avx512.permvar.si.512", table, self.d))

    # any scales: 16-bit words hold two bytes of one row; products with multipliers and their sums
    # are exact modulo 2^16, and the result's bytes lie in 0..255, so no carry survives

    def any_pair(self) -> Callable[[Expr], Expr]:
        """Return codes -> bytes; the small side is divided by a power of two and rounded."""
        c = self._c
        (mp, ep), (mn, en) = (self._parts(i) for i in (0, 1))
        flip = e.let((ep - en) >> c(31))  # all ones where the negative side is the big one

        def pick(one: Expr, other: Expr) -> Expr:
            return self.pick(flip, one, other)

        high = e.let(tirx.max(ep, en))
        d = e.let(high - tirx.min(ep, en))
        apart = e.let(tirx.min(d, c(1)))
        shift = e.let(tirx.min(d - apart, c(7)))
        # The unit is a normal float32 as long as the stored exponents are above 2^-126.
        unit = tirx.max(high - apart + c(127 - self.bias), c(0))
        self._scale.set(e.bits((unit << c(23)) | (flip & c(-(2**31))), "float32", 16))
        base = e.const(OFFSET * 0x0101, "uint16", 32)
        big_times = self._twice(pick(mn, mp) << apart)
        small_times = self._twice(pick(mp, mn))
        rounding = e.let(self._words(((c(1) << shift) >> c(1)) * c(0x01010101)))
        mask = e.let(self._words((c(255) >> shift) * c(0x01010101)))
        shifts = self._twice(shift)

        def transform(codes: Expr) -> Expr:
            p, n = (e.let(e.bits(self.isa.lookup(t, codes), "int32", 16)) for t in self.tables[:2])
            big = e.let(self._words(pick(n, p)) * big_times)
            small = e.let(self._words(pick(p, n)) * small_times)
            small = e.let(((small + rounding) >> shifts) & mask)
            return e.bits(base + big - small, "uint8", 64)

        return transform

    def pick(self, mask: Expr, one: Expr, other: Expr) -> Expr:
        """Select by all ones or all zeros; TVM 0.27 cannot bind vectors of bool."""
        return (one & mask) | (other & (mask ^ self._c(-1)))

    def _parts(self, i: int) -> tuple[Expr, Expr]:
        """Return mantissa and exponent of a scale, subnormal ones included."""
        c, exponent = self._c, self.exponents[i]
        if self.mantissa_bits == 0:
            return c(4), exponent
        low = self.stored[i] & c((1 << self.mantissa_bits) - 1)
        mantissa = e.let(low + (tirx.min(exponent, c(1)) << c(2)))
        return mantissa, e.let(tirx.max(exponent, c(1)))

    def _words(self, value: Expr) -> Expr:
        return e.bits(value, "uint16", 32)

    def _twice(self, value: Expr) -> Expr:
        """Repeat a number in both 16-bit halves of a row's lane."""
        return e.let(self._words((value & self._c(0xFFFF)) * self._c(0x00010001)))
