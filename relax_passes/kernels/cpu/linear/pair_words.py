"""The two terms of an AMXFP4 group as one: weights become 16-bit words, one product each.

For vectors of eight rows that add products of 16-bit pairs (vpmaddwd).  A scale is m * 2^e with m
in 4..7, so per row and group, with E the larger of the two exponents,

    word = p * Bp - n * Bn      p, n: magnitudes in half units, B = m * 2^(4 - (E - e)) up to 112
    unit = 2^(E - 4)

Words are at most 12 * 112 = 1344.  They are exact while the exponents are at most four apart;
beyond that B is rounded, and the small side is off by 1/128 of the group's largest weight at most.

A row's two factors lie in turn in the bytes of its 32-bit lane.  Codes are spread to the same
places, with the sign flipped on every second: one lookup finds p and n, and vpmaddubsw multiplies
both and adds them.  A packed vector (low nibbles columns 0..3, high ones 4..7) becomes words of
the columns

    0 2 | 1 3 | 4 6 | 5 7

which is the order of ORDER that x has to have as well (x_words.py).
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.avx2 import Avx2
from relax_passes.kernels.cpu.isa.base import byte_vector
from relax_passes.kernels.cpu.scale_reader import ScaleReader
from relax_passes.spec import GROUP, TILE_ROWS, LinearSpec
from relax_passes.terms import common_factor

from . import merge

STEPS = GROUP // 2  # vectors of words of a group: two columns of eight rows each
ORDER = (0, 2, 1, 3)  # of four neighbouring columns
LOW_STEPS_BITS = 8  # words of x are 2^8 times the codes (x_words.py)
BYTES = 2 * TILE_ROWS  # of a group's scales: 16 positive ones, 16 negative ones


def supports(spec: LinearSpec, isa: Any) -> bool:
    """Whether a linear's weights can be words."""
    if not isinstance(isa, Avx2) or not spec.activation.integer or spec.format == "none":
        return False
    fmt = spec.fmt
    types = {t.type.name for t in fmt.scale_tensors}
    first_positive = fmt.terms[0].factor > 0 and fmt.terms[0].scale == fmt.scale_tensors[0].name
    return merge.supports(fmt) and types == {"E5M2"} and fmt.group_size == GROUP and first_positive


def _factors() -> list[int]:
    """Return B of 4 (E - e) + m - 4, exponents up to seven apart."""
    return [((4 + m) * 32 // 2**d + 1) // 2 for d in range(8) for m in range(4)]


# Subnormal scales (0 to 3) are m * 2^1 without m's leading bit: what makes 4 (E - e) + m - 4 of
# them, added to the stored byte; 0 gives no table's index.
SUBNORMAL = (127, 3, 254, 255, *(0,) * 12)


class PairWords:
    """Emits the decode of one tile and group.

    Attributes
    ----------
    factor : float
        What the sums have to be multiplied by in the end.
    """

    def __init__(self, spec: LinearSpec, isa: Avx2, buffers: Any):
        self.isa, self.buffers = isa, buffers
        self.reader = ScaleReader(spec.fmt, buffers["w_scales"])
        self.factor = common_factor(spec.fmt.terms)
        factors = _factors()
        halves = []
        for values in (factors[:16], factors[16:]):
            halves.append(e.let(byte_vector([*values, *(256 - v & 255 for v in values)])))
        self.near, self.far = halves
        self.subnormal = isa.table(SUBNORMAL)
        self.magnitudes = isa.table(merge.POSITIVE)

    def scales(self, tile: Expr, group: Expr) -> list[tuple[Expr, Expr]]:
        """Return (factors int8 of 32, units float32 of eight) of the two halves of a tile's rows.

        The units include the 2^-8 of x's words.
        """
        c = _bytes
        stored = e.let(e.load(self.buffers["w_scales"], tile, group, 0, lanes=BYTES))
        exponent = e.let(stored & c(0xFC))  # times four
        other = _shuffle(exponent, [(i + TILE_ROWS) % BYTES for i in range(BYTES)])
        top = e.let(tirx.max(exponent, other))
        fix = self.isa.lookup(self.subnormal, _saturated(stored, c(0x70)))
        index = e.let(top + stored - exponent - exponent + fix)
        # Saturation sets bit 7 of what is no index of a table: vpshufb writes 0 there.
        near = self.isa.lookup(self.near, _saturated(index, c(0x70)))
        far = self.isa.lookup(self.far, _saturated(index - c(16), c(0x70)))
        factors = e.let(near | far)
        parts = []
        for first in range(0, TILE_ROWS, self.isa.rows):
            rows = range(first, first + self.isa.rows)
            own = [i for row in rows for i in (row, row + TILE_ROWS) * 2]
            exponents = e.cast(_shuffle(top, list(rows)), "int32", self.isa.rows)
            unit = (exponents << e.const(21, "int32", self.isa.rows)) + e.const(
                (127 - 17 - 4 - LOW_STEPS_BITS) << 23, "int32", self.isa.rows
            )
            parts.append(
                (
                    e.let(e.bits(_shuffle(factors, own), "int8", BYTES)),
                    e.let(e.bits(unit, "float32", self.isa.rows)),
                )
            )
        return parts

    def words(self, packed: Expr, factors: Expr) -> list[Expr]:
        """Decode a packed vector: int16 of 16, of the columns in ORDER, then those four on."""
        flip = byte_vector([0, 0x88] * (BYTES // 2))
        low: list[Expr] = []
        high: list[Expr] = []
        for first in (0, 1):
            twice = _shuffle(packed, [4 * i + first + j for i in range(8) for j in (0, 0, 2, 2)])
            twice = e.let(twice ^ flip)
            for nibbles, found in ((self.isa.low, low), (self.isa.high, high)):
                codes = self.isa.lookup(self.magnitudes, nibbles(twice))
                found.append(e.let(self.isa.words_of(codes, factors)))
        return low + high


def _bytes(value: int) -> Expr:
    return e.const(value, "uint8", BYTES)


def _saturated(value: Expr, more: Expr) -> Expr:
    """Add unsigned bytes with saturation."""
    return e.let(e.llvm("uint8x32", "llvm.uadd.sat", value, more))


def _shuffle(value: Expr, order: list[int]) -> Expr:
    return e.let(tirx.Shuffle([value], [tirx.const(i, "int32") for i in order]))
