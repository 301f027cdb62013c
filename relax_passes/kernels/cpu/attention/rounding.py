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

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from amx_tvm import formats
from amx_tvm.formats import e2m1
from relax_passes.kernels.cpu.rounding import (
    divisor_of,
    doubled_magnitude,
    scale_of,
    unbounded_scale_of,
)

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
        fmt = formats.get(name)
        self.rule = fmt.rounding_of("attention")
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
        ratio = v.hold(tirx.abs(value) / divisor_of(scale, v.LANES), "ratio")
        doubled = v.cast(doubled_magnitude(ratio, v.LANES), "float32")
        rounded = v.hold(doubled * (scale * v.const(0.5)), "rounded")
        return v.hold(tirx.Select(value < v.const(0.0), -rounded, rounded), "element")

    def _scale(self, largest: Expr, row_scale: Expr | None) -> Expr:
        """Scale of a group with this largest magnitude, 0 where it rounds to 0."""
        bits = v.hold(tirx.reinterpret("int32x16", largest), "bits")
        if row_scale is None:
            return unbounded_scale_of(self.rule, bits, v.LANES)
        if not self.row_scaled:
            return scale_of(self.rule, bits, None, v.LANES)
        return v.hold(scale_of(self.rule, bits, row_scale, v.LANES) * row_scale, "scale")


def _magnitude(value: Expr, sign: int) -> Expr:
    """Magnitude of the values of a sign, others being at most 0; sign 0 takes both."""
    return tirx.abs(value) if sign == 0 else value if sign > 0 else -value


def _row_largest(values: list[Expr], sign: int) -> Expr:
    """Largest magnitude of a sign in all lanes of vectors, in every lane."""
    best = v.const(0.0)
    for value in values:
        best = v.hold(tirx.max(best, _magnitude(value, sign)), "best")
    return v.hold(v.reduce_lanes(best, tirx.max), "largest")
