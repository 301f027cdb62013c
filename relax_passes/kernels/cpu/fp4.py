"""Quantization of activations to four bits, in TensorIR.

Bit for bit what ``amx_tvm.formats`` does to a row: group extrema, then rounding.py.  What is
written is what W4A4 kernels multiply: for each term of the format an array of small integers
(doubled E2M1 values) and float32 scales.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from amx_tvm.formats import e2m1

from . import emit as e
from .emit import Expr
from .rounding import divisor_of, doubled_magnitude, scale_of

LANES = 16
SIGN = -(2**31)


def extrema(values: list[Expr], signs: tuple[int, ...]) -> list[Expr]:
    """Largest magnitude among the values of each sign, as int32 bits; sign 0 takes both.

    Magnitudes of float32 compare like their bits; NaN is larger than infinity.
    """
    out = []
    for sign in signs:
        best = e.const(0, "int32", LANES)
        for v in values:
            word = e.bits(v, "int32", LANES)
            if sign == 0:
                word = word & e.const(0x7FFFFFFF, "int32", LANES)
            elif sign < 0:
                word = word ^ e.const(SIGN, "int32", LANES)
            best = e.opaque(tirx.max(best, word), "int32", LANES)
        out.append(e.opaque(e.llvm("int32", "llvm.vector.reduce.smax", best), "int32"))
    return out


def squared_error(values: list[Expr], sign: int, scale: Expr) -> Expr:
    """Squared error of the values of a sign (0: of all) under a scale, float32."""
    zero = e.const(0.0, "float32", LANES)
    divisor = e.let(e.splat(divisor_of(scale), LANES))
    half = e.let(e.splat(scale * e.const(0.5, "float32"), LANES))
    total = e.Register("float32", LANES, zero)
    for value in values:
        part = tirx.abs(value) if sign == 0 else tirx.max(value if sign > 0 else -value, zero)
        part = e.opaque(part, "float32", LANES)
        doubled = doubled_magnitude(e.let(part / divisor), LANES)
        difference = e.cast(doubled, "float32", LANES) * half - part
        difference = e.opaque(difference, "float32", LANES)
        total.set(total.get() + difference * difference)
    start = e.const(0.0, "float32")
    added = e.llvm("float32", "llvm.vector.reduce.fadd", start, e.let(total.get()))
    return e.opaque(added, "float32")


def stretched(largest: Expr) -> Expr:
    """Return int32 bits of 1.5 times a largest magnitude: under its scale the largest becomes 4."""
    more = e.bits(largest, "float32") * e.const(1.5, "float32")
    return e.opaque(e.bits(more, "int32"), "int32")


class Fp4Quantizer:
    """Quantizes the scale groups of a row: first all scales, then all codes.

    A scale is a chain of reductions and divisions; on its own a group's chain runs beside those of
    its neighbours, in one pass with the codes it would not.
    """

    def __init__(self, fmt: Any, buffers: dict[str, Any], row: Expr, tensor_scale: Expr | None):
        self.fmt, self.buffers, self.row, self.tensor_scale = fmt, buffers, row, tensor_scale
        self.rule = fmt.rounding_of("activations")
        count = len(fmt.terms)
        self.suffixes = [""] if count == 1 else [f"_{i}" for i in range(count)]
        self.signs = (0,) if count == 1 else tuple(1 if t.factor > 0 else -1 for t in fmt.terms)

    def measure(self, group: Expr, values: list[Expr]) -> None:
        """Store the scales of scale group ``group`` (16-lane vectors of its values)."""
        for suffix, sign, largest in zip(
            self.suffixes, self.signs, extrema(values, self.signs), strict=True
        ):
            scale = self._scale(largest)
            if self.fmt.four_over_six:
                four = self._scale(stretched(largest))
                better = squared_error(values, sign, four) < squared_error(values, sign, scale)
                scale = e.opaque(tirx.Select(better, four, scale), "float32")
            stored = scale * e.const(self._factor(sign), "float32")
            e.store(self.buffers[f"scales{suffix}"], stored, self.row, group)

    def _factor(self, sign: int) -> float:
        """Return what a sign's scales are stored times: a power of two, so nothing is lost."""
        half = abs(float(self.fmt.terms[0].factor))
        return half if sign >= 0 else -half

    def store(self, group: Expr, values: list[Expr]) -> None:
        """Store the codes and sums of a measured group."""
        divisors = self.divisors(group)
        totals = [e.const(0, "int32", LANES) for _ in self.suffixes]
        for j, value in enumerate(values):
            for i, code in enumerate(self.codes(value, divisors)):
                at = group * self.fmt.group_size + j * LANES
                narrow = e.cast(code, "int8", LANES)
                codes = self.buffers[f"codes{self.suffixes[i]}"]
                e.store(codes, narrow, self.row, at, lanes=LANES)
                totals[i] = totals[i] + code
        for suffix, total in zip(self.suffixes, totals, strict=True):
            if f"sums{suffix}" in self.buffers:
                value = e.llvm("int32", "llvm.vector.reduce.add", e.let(total))
                e.store(self.buffers[f"sums{suffix}"], value, self.row, group)

    def divisors(self, group: Expr) -> list[Expr]:
        """Return what the values of a measured group are divided by, for each sign."""
        divisors = []
        for suffix, sign in zip(self.suffixes, self.signs, strict=True):
            stored = e.load(self.buffers[f"scales{suffix}"], self.row, group)
            scale = e.let(stored * e.const(1 / self._factor(sign), "float32"))
            divisors.append(e.let(e.splat(divisor_of(scale), LANES)))
        return divisors

    def _scale(self, largest: Expr) -> Expr:
        """Scale of a group by the format's rule, the tensor scale included."""
        scale = scale_of(self.rule, largest, self.tensor_scale)
        if self.tensor_scale is not None:
            scale = e.opaque(scale * self.tensor_scale, "float32")
        return scale

    def codes(self, value: Expr, divisors: list[Expr]) -> list[Expr]:
        """Return int32 codes of each term: of both signs, or 0 where a value has another sign."""
        ones = e.const(-1, "int32", LANES)
        word = e.let(e.bits(value, "int32", LANES))
        negative = e.let(word >> e.const(31, "int32", LANES))  # all ones or all zeros
        magnitude = e.bits(word & e.const(0x7FFFFFFF, "int32", LANES), "float32", LANES)
        if len(divisors) == 1:
            code = doubled_magnitude(e.let(magnitude / divisors[0]), LANES)
            return [e.let((code ^ negative) - negative)]
        own = [negative ^ ones if sign > 0 else negative for sign in self.signs]
        one, other = (
            e.bits(d, "int32", LANES) & mask for d, mask in zip(divisors, own, strict=True)
        )
        divisor = e.bits(one | other, "float32", LANES)
        code = doubled_magnitude(e.let(magnitude / divisor), LANES)
        return [e.let(code & mask) for mask in own]


def row_tensor_scale(largest: Expr) -> Expr:
    """float32 scale of a whole row, largest / (6 * 448), for formats with a tensor scale."""
    return e.let(largest / e.const(e2m1.LARGEST * 448.0, "float32"))
