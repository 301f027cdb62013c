"""Tiles of W as signed bytes with one offset and one scale a group, for vectors of 16 bytes.

Formats of one term are their table less its offset or zero point: no offset is left.  The two
scales of an AMXFP4 group become one by the arithmetic of merge.py, here in bytes.  With m and e of
either scale, the big one that with the larger exponent, d the difference of the exponents,

    byte = big's magnitude * m * (2 if d else 1)  -  44         wraps around to -128..124
           - small's magnitude * m / 2^(d - 1)                  rounded

where the negative side is the big one both have the other sign, and the scale is negative.  A row's
multipliers and shifts of either sign are bytes; codes choose between them by their sign.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.base import E2M1_DOUBLED
from relax_passes.kernels.cpu.isa.neon import Neon
from relax_passes.kernels.cpu.scale_reader import ScaleReader
from relax_passes.spec import GROUP, TILE_ROWS, LinearSpec

from . import merge, panel

OFFSET = merge.OFFSET - 128  # of merged bytes
Transform = Callable[[Expr], Expr]  # a vector of indices (or of codes of eight bits) -> bytes


class SignedBytes:
    """Emits the decode of one tile and group."""

    def __init__(self, spec: LinearSpec, isa: Neon, reader: ScaleReader):
        self.isa, self.reader, self.terms = isa, reader, spec.fmt.terms
        self.eight_bit = self.terms[0].table is None
        self.merged = len(self.terms) == 2
        self.steps = GROUP // 4 // (spec.tile_code_bytes // 64)  # of a packed vector
        if self.merged:
            self.table = isa.table(E2M1_DOUBLED * 2)
        elif not self.eight_bit:
            offset = self.terms[0].offset
            minus = offset if isinstance(offset, int) else 0
            self.table = isa.table(tuple(int(v) - minus & 255 for v in self.terms[0].table))

    def prepare(self, tile: Expr, group: Expr) -> tuple[list[Transform], Expr]:
        """Return the decoders of each four rows of a tile, and float32 scales of 16 rows."""
        return self._merge(tile, group) if self.merged else self._single(tile, group)

    def bytes(self, packed: Expr, transform: Transform) -> list[Expr]:
        """Decode a packed vector: int8 of 16, for each four columns that it holds."""
        halves = [packed] if self.eight_bit else [self.isa.low(packed), self.isa.high(packed)]
        return [e.bits(transform(e.let(half)), "int8", 16) for half in halves]

    def _single(self, tile: Expr, group: Expr) -> tuple[list[Transform], Expr]:
        term, isa = self.terms[0], self.isa
        scale = self.reader.scale(term.scale, tile, group, 0, 0, TILE_ROWS)
        if term.factor < 0:
            scale = e.const(0.0, "float32", TILE_ROWS) - scale
        if self.eight_bit:
            return [isa.eight_bit] * isa.parts, scale
        if not isinstance(term.offset, str):
            return [lambda index: isa.lookup(self.table, index)] * isa.parts, scale
        stored = e.let(self.reader.stored(term.offset, tile, group, 0, 0, TILE_ROWS))

        def less(zero: Expr) -> Transform:
            return lambda index: isa.lookup(self.table, index) - zero

        return [less(_of_four(stored, part)) for part in range(isa.parts)], scale

    def _merge(self, tile: Expr, group: Expr) -> tuple[list[Transform], Expr]:
        c = _byte
        mantissa_bits, bias = merge.POWERS[self.reader.fmt.scale_tensors[0].type.name]
        by_sign = sorted(self.terms, key=lambda term: -term.factor)
        (mp, ep), (mn, en) = (
            self._parts(
                e.let(self.reader.stored(t.scale, tile, group, 0, 0, TILE_ROWS)), mantissa_bits
            )
            for t in by_sign
        )
        flip = e.let(tirx.Select(en > ep, c(255), c(0)))
        high = e.let(tirx.max(ep, en))
        d = e.let(high - tirx.min(ep, en))
        apart = e.let(tirx.min(d, c(1)))
        shift = e.let(_negative(tirx.min(d - apart, c(7))))
        big = e.let(_pick(flip, mn, mp) * (apart + c(1)))
        small = e.let(_negative(_pick(flip, mp, mn)))
        lanes = TILE_ROWS
        unit = e.cast(high - apart, "int32", lanes) + e.const(127 - bias, "int32", lanes)
        unit = tirx.max(unit, e.const(0, "int32", lanes)) << e.const(23, "int32", lanes)
        sign = e.cast(flip, "int32", lanes) << e.const(24, "int32", lanes)
        scale = unit | (sign & e.const(-(2**31), "int32", lanes))
        rows = [
            e.let(v)
            for v in (
                _pick(flip, small, big),
                _pick(flip, big, small),
                shift & flip,
                shift & (flip ^ c(255)),
            )
        ]
        transforms = [
            self._merged(*(_of_four(v, part) for v in rows)) for part in range(self.isa.parts)
        ]
        return transforms, e.bits(scale, "float32", lanes)

    def _merged(self, positive: Expr, negative: Expr, right: Expr, right_n: Expr) -> Transform:
        """Return codes -> bytes, given multipliers and shifts of positive and negative codes."""

        def transform(index: Expr) -> Expr:
            codes = self.isa.lookup(self.table, index)
            value = codes * tirx.Select(index >= _byte(8), negative, positive)
            shift = tirx.Select(index >= _byte(8), right_n, right)
            return self.isa.shift_rounded(value, shift) + _byte(OFFSET & 255)

        return transform

    @staticmethod
    def _parts(stored: Expr, mantissa_bits: int) -> tuple[Expr, Expr]:
        """Return mantissa and exponent of scales, subnormal ones included."""
        if mantissa_bits == 0:
            return _byte(4), stored
        exponent = e.let(stored >> _byte(mantissa_bits))
        normal = e.let(tirx.min(exponent, _byte(1)))
        low = stored & _byte((1 << mantissa_bits) - 1)
        return e.let(low + (normal << _byte(2))), e.let(tirx.max(exponent, _byte(1)))


def supports(spec: LinearSpec, isa: Any) -> bool:
    """Whether a linear's tiles can be such bytes."""
    fits = isinstance(isa, Neon) and spec.activation.integer and spec.format != "none"
    return fits and panel.supports(spec.fmt)


def offset(fmt: Any) -> int:
    """Return what a byte is above the weight in units of its scale."""
    return OFFSET if len(fmt.terms) == 2 else 0


def _byte(value: int) -> Expr:
    return e.const(value, "uint8", TILE_ROWS)


def _negative(value: Expr) -> Expr:
    """Negate; TVM 0.27's bounds of 0 - x would be errors for unsigned numbers."""
    return (value ^ _byte(255)) + _byte(1)


def _pick(mask: Expr, one: Expr, other: Expr) -> Expr:
    """Select by all ones or all zeros."""
    return (one & mask) | (other & (mask ^ _byte(255)))


def _of_four(value: Expr, part: int) -> Expr:
    """Repeat each of four rows' bytes in the four bytes of its lane."""
    order = [4 * part + i // 4 for i in range(16)]
    return e.let(tirx.Shuffle([value], [tirx.const(i, "int32") for i in order]))
