"""Rounding eight numbers of a lane to a four-bit format, as TensorIR expressions.

A group of 32 lies in four neighbouring lanes, one of 16 in two. Rounding follows
``amx_tvm.formats`` bit for bit in float32: extrema of the group, the scale rule, true division,
ties away from zero. What is left is the value that the code and scale stand for: exact in float16
except where a format has a float32 scale a row, whose products are rounded once.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from amx_tvm.formats.scale_rules import Power

from ..intrinsics.base import hold
from .block import PIECE, over_lanes

_STEPS = ((0.25, 0.5), (0.75, 0.5), (1.25, 0.5), (1.75, 0.5), (2.5, 1.0), (3.5, 1.0), (5.0, 2.0))


def _f(value: float) -> tirx.Expr:
    return tirx.const(value, "float32")


def _i(value: int) -> tirx.Expr:
    return tirx.const(value, "int32")


def minifloat(value: tirx.Expr, mantissa: int, bias: int, limit: float) -> tirx.Expr:
    """Round a value >= 0 to a small float of so many bits of mantissa, ties away from zero."""
    drop = 23 - mantissa
    least, step = 2.0 ** (1 - bias), 2.0 ** (1 - bias - mantissa)
    value = hold(value)
    word = tirx.reinterpret("int32", value) + _i(1 << (drop - 1))
    normal = hold(tirx.reinterpret("float32", hold(word & _i(-(1 << drop)))))
    count = tirx.Cast("int32", tirx.min(value, _f(least)) / _f(step) + _f(0.49999997))
    below = tirx.Cast("float32", count) * _f(step)
    return hold(tirx.min(tirx.Select(value < _f(least), below, normal), _f(limit)))


def power(largest: tirx.Expr, nearest: bool) -> tirx.Expr:
    """2^(exponent of the maximum - 2); `nearest` rounds it up from 1.75 times a power on."""
    word = hold(tirx.reinterpret("int32", hold(largest)))
    exponent = tirx.shift_right(word, _i(23)) - 2
    if nearest:
        up = (word & _i(0x7FFFFF)) >= _i(0x600000)
        exponent = exponent + tirx.Cast("int32", up)
    exponent = hold(tirx.max(tirx.min(exponent, _i(252)), _i(0)))
    # below 2^-126 a subnormal: half of the least normal number
    bits = hold(tirx.max(tirx.shift_left(exponent, _i(23)), _i(1 << 22)))
    return hold(tirx.reinterpret("float32", bits))


def stored_byte(kind: Any, scale: tirx.Expr) -> tirx.Expr:
    """Return the byte, int32, of a scale >= 0 that `scale_of` has rounded to an 8-bit float."""
    word = tirx.shift_right(tirx.reinterpret("int32", scale), _i(23 - kind.mantissa_bits))
    normal = word - _i((127 - kind.bias) << kind.mantissa_bits)
    below = tirx.Cast("int32", scale * _f(2.0 ** (kind.bias - 1 + kind.mantissa_bits)))
    return hold(tirx.Select(scale < _f(2.0 ** (1 - kind.bias)), below, normal))


def e2m1_index(ratio: tirx.Expr) -> tirx.Expr:
    """Index, 0 to 7, of the E2M1 magnitude of a ratio >= 0, ties away from zero."""
    total = _i(0)
    for at, _step in _STEPS:
        total = total + tirx.Cast("int32", ratio >= _f(at))
    return hold(total)


def e2m1(ratio: tirx.Expr) -> tirx.Expr:
    """E2M1 magnitude of a ratio >= 0, ties away from zero: steps that it has reached."""

    def reached(size: float) -> tirx.Expr:
        found = [tirx.Cast("int32", ratio >= _f(at)) for at, step in _STEPS if step == size]
        total = found[0]
        for more in found[1:]:
            total = total + more
        return total

    halves = _f(0.5) * tirx.Cast("float32", reached(0.5))
    return halves + tirx.Cast("float32", reached(1.0) + reached(2.0) * 2)


def scale_of(fmt: Any, largest: tirx.Expr, row_scale: tirx.Expr | None) -> tirx.Expr:
    """Scale of a group with this maximum, by the format's rule for activations."""
    rule = fmt.rounding_of("activations")
    kind = rule.type
    if rule.power is not Power.NONE:
        scale = power(largest, rule.power is Power.NEAREST)
    else:
        maximum = largest / _f(6.0)
        if row_scale is not None:
            maximum = tirx.Select(tirx.EQ(row_scale, _f(0.0)), _f(0.0), maximum / row_scale)
        limit = float(kind.values[kind.largest])
        scale = minifloat(maximum, kind.mantissa_bits, kind.bias, limit)
    return scale if row_scale is None else hold(scale * row_scale)


def rounded(value: tirx.Expr, positive: tirx.Expr, negative: tirx.Expr) -> tirx.Expr:
    """Value of E2M1 times a scale that is nearest: the scale for its sign."""
    below = value < _f(0.0)
    scale = positive
    if negative is not positive:
        scale = hold(tirx.Select(below, negative, positive))
    product = hold(e2m1(hold(tirx.abs(value) / scale)) * scale)
    magnitude = hold(tirx.Select(tirx.EQ(scale, _f(0.0)), _f(0.0), product))
    return tirx.Select(below, -magnitude, magnitude)


def round_piece(values: tirx.Buffer, first: int, fmt: Any, row_scale: tirx.Expr | None) -> None:
    """Round values[first .. first + 8] of every lane in place.

    Parameters
    ----------
    values : tirx.Buffer
        float32 registers.
    fmt : Format
        A four-bit format with groups of 16 or 32.
    row_scale : tirx.Expr, optional
        The row's float32 scale, for formats that have one.
    """
    mine = [hold(values[first + j]) for j in range(PIECE)]

    def group_max(numbers: list) -> tirx.Expr:
        largest = _f(0.0)
        for number in numbers:
            largest = tirx.max(largest, number)
        return over_lanes(hold(largest), fmt.group_size // PIECE, tirx.max)

    if len(fmt.scale_tensors) == 2:
        positive = scale_of(fmt, group_max(mine), row_scale)
        negative = scale_of(fmt, group_max([-v for v in mine]), row_scale)
    else:
        positive = negative = scale_of(fmt, group_max([tirx.abs(v) for v in mine]), row_scale)
    for j, v in enumerate(mine):
        T.buffer_store(values, rounded(v, positive, negative), [first + j])
