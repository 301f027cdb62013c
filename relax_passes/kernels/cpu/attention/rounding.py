"""Rounding to the 4-bit formats inside attention kernels: values in, the values they stand for out.

The vector twin of ``amx_tvm.formats``: groups along lanes (queries, keys and attention weights) or
one group in every lane (values, whose groups run along the context). What differs is only where a
group's largest magnitude comes from; scales and elements are the same 16-lane arithmetic.

Scales of queries and keys are the format's own, with one float32 a row where the format has one.
Those of weights and values have the type's mantissa and as many exponents as they need: neither
has a row that is complete when it is rounded, so there is nothing to derive a float32 from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from amx_tvm.errors import FormatError
from amx_tvm.formats import e2m1

from . import vector as v

GROUP = 32  # tokens or channels of a group; formats of 16 halve it


class Rounding:
    """Rounds 16-lane vectors to a format.

    Parameters
    ----------
    name : str
        A format of E2M1 elements.

    Raises
    ------
    FormatError
        For a format of other elements.
    """

    def __init__(self, name: str) -> None:
        from amx_tvm import formats

        fmt = formats.get(name)
        if not hasattr(fmt, "rule"):
            raise FormatError(
                f"attention cannot be quantized to {name!r}: only formats of E2M1 elements have a "
                "kernel for it (amxfp4, mxfp4, nvfp4 and their variants)"
            )
        self.rule: Any = fmt.rule
        self.row_scaled, self.size = fmt.row_scaled, fmt.group_size
        self.signs = (0,) if len(fmt.terms) == 1 else (1, -1)

    def along_lanes(self, values: list[Expr], row_scale: Expr | None = None) -> list[Expr]:
        """Round vectors whose lanes are consecutive members of groups: two a group of 32.

        ``row_scale`` is the float32 of the row, in all lanes; without it scales have no bounds.
        """
        out: list[Expr] = []
        step = self.size // v.LANES
        for start in range(0, len(values), step):
            part = values[start : start + step]
            scales = [self._scale(_row_largest(part, sign), row_scale) for sign in self.signs]
            out += [self.element(value, scales) for value in part]
        return out

    def scales(self, count: int, value: Callable[[Expr], Expr]) -> list[Expr]:
        """Scales of groups that run across vectors: ``value(i)`` holds member i of every lane's."""
        scales = []
        for sign in self.signs:
            best = v.Register(v.const(0.0), "best")
            with T.serial(0, count) as i:
                best.set(tirx.max(best.get(), _magnitude(v.hold(value(i), "member"), sign)))
            scales.append(self._scale(best.get(), None))
        return scales

    def row_scale(self, values: list[Expr]) -> Expr:
        """float32 scale of a row from all of its vectors; 1 for formats without one."""
        if not self.row_scaled:
            return v.const(1.0)
        largest = _row_largest(values, 0)
        return v.hold(largest / v.const(e2m1.LARGEST * 448.0), "row_scale")

    @staticmethod
    def element(value: Expr, scales: list[Expr]) -> Expr:
        """Nearest E2M1 multiple of the scale of the value's sign, ties away from zero."""
        scale = scales[0]
        if len(scales) == 2:
            scale = v.hold(tirx.Select(value > v.const(0.0), *scales), "own")
        nothing = scale <= v.const(0.0)
        divisor = v.hold(tirx.Select(nothing, v.const(float("inf")), scale), "divisor")
        ratio = v.hold(tirx.abs(value) / divisor, "ratio")
        total = v.Register(v.const(0.0), "total")
        grid = zip(e2m1.MIDPOINTS, e2m1.MAGNITUDES[:-1], e2m1.MAGNITUDES[1:], strict=True)
        for midpoint, low, high in grid:
            step = v.const(high - low)
            reached = tirx.Select(ratio >= v.const(midpoint), step, v.const(0.0))
            total.set(total.get() + reached)
        rounded = v.hold(total.get() * scale, "rounded")
        return v.hold(tirx.Select(value < v.const(0.0), -rounded, rounded), "element")

    def _scale(self, largest: Expr, row_scale: Expr | None) -> Expr:
        """Scale of a group with this largest magnitude, 0 where it rounds to 0."""
        kind = self.rule.type
        if kind.name == "E8M0":
            return self._power_of_two(largest)
        sixth = v.hold(largest / v.const(e2m1.LARGEST), "sixth")
        if row_scale is None:
            return _rounded(sixth, kind.mantissa_bits)
        if self.row_scaled:
            safe = tirx.Select(row_scale > v.const(0.0), row_scale, v.const(1.0))
            sixth = v.hold(sixth / v.hold(safe, "safe"), "sixth")
        return v.hold(_bounded(sixth, kind) * row_scale, "scale")

    def _power_of_two(self, largest: Expr) -> Expr:
        """2^(floor(log2 largest) - 2), one more where the rule rounds large mantissas up."""
        import numpy as np

        bits = v.hold(tirx.reinterpret("int32x16", largest), "bits")
        exponent = (bits >> _int(23)) - _int(2)
        probe = int(self.rule.round_maximum(np.array([1.75], np.float32))[0])
        if probe > int(self.rule.round_maximum(np.array([1.5], np.float32))[0]):
            up = (bits & _int(0x7FFFFF)) >= _int(0x600000)
            exponent = exponent + tirx.Select(up, _int(1), _int(0))
        exponent = v.hold(tirx.max(tirx.min(exponent, _int(252)), _int(1)), "exponent")
        return v.hold(tirx.reinterpret("float32x16", exponent << _int(23)), "scale")


def _int(value: int) -> Expr:
    return v.const(value, dtype="int32")


def _magnitude(value: Expr, sign: int) -> Expr:
    """Magnitude of the values of a sign, others being at most 0; sign 0 takes both."""
    return tirx.abs(value) if sign == 0 else value if sign > 0 else -value


def _row_largest(values: list[Expr], sign: int) -> Expr:
    """Largest magnitude of a sign in all lanes of vectors, in every lane."""
    best = v.const(0.0)
    for value in values:
        best = v.hold(tirx.max(best, _magnitude(value, sign)), "best")
    return v.hold(v.reduce_lanes(best, tirx.max), "largest")


def _rounded(value: Expr, mantissa: int) -> Expr:
    """Round float32 >= 0 to a number of mantissa bits, ties away from zero; any exponent."""
    drop = 23 - mantissa
    bits = v.hold(tirx.reinterpret("int32x16", value) + _int(1 << (drop - 1)), "bits")
    return v.hold(tirx.reinterpret("float32x16", (bits >> _int(drop)) << _int(drop)), "scale")


def _bounded(value: Expr, kind: Any) -> Expr:
    """Round float32 >= 0 to an 8-bit float: subnormals kept, saturating."""
    normal = _rounded(value, kind.mantissa_bits)
    least = 2.0 ** (1 - kind.bias)
    step = 2.0 ** (1 - kind.bias - kind.mantissa_bits)
    steps = v.hold(tirx.min(value, v.const(least)) * v.const(1 / step), "steps")
    # The largest float32 below one half: with 0.5 itself 0.49999997 would round up.
    count = v.hold(v.cast(steps + v.const(0.5 - 2.0**-25), "int32"), "count")
    subnormal = v.hold(v.cast(count, "float32") * v.const(step), "subnormal")
    rounded = v.hold(tirx.Select(value < v.const(least), subnormal, normal), "rounded")
    return v.hold(tirx.min(rounded, v.const(float(kind.values[kind.largest]))), "bounded")
