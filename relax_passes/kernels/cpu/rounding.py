"""Rounding to formats of E2M1 elements, in TensorIR: the twin of the formats' NumPy code.

A group's largest magnitude becomes its scale by the format's rule (``formats.scale_rules``), a
ratio to the scale becomes an E2M1 magnitude, ties away from zero.  What differs between kernels is
where a group's largest magnitude comes from: one number a group, or one in each lane.

Values that are used more than once are hidden from TVM's simplifier, see ``emit.opaque``.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from amx_tvm.formats import e2m1
from amx_tvm.formats.scale_rules import Power, ScaleRule

from . import emit as e
from .emit import Expr

INFINITY = 0x7F800000
NAN = 0x7FC00000


def scale_of(rule: ScaleRule, largest: Expr, tensor_scale: Expr | None, lanes: int = 1) -> Expr:
    """Decoded float32 scales (without the tensor scale) from int32 bits of groups' maxima.

    ``largest`` at or above NaN gives NaN, so that the group becomes NaN; infinity saturates.
    """
    if rule.power is not Power.NONE:
        value = _power_of_two(rule, largest, lanes)
    else:
        value = _minifloat(rule.type, _sixth(largest, tensor_scale, lanes), lanes)
    nan = e.bits(e.const(NAN, lanes=lanes), "float32", lanes)
    infinity = e.const(INFINITY, lanes=lanes)
    return e.opaque(tirx.Select(largest > infinity, nan, value), "float32", lanes)


def unbounded_scale_of(rule: ScaleRule, largest: Expr, lanes: int = 1) -> Expr:
    """Scales as ``scale_of``, with as many exponents as they need in place of a tensor scale."""
    if rule.power is not Power.NONE:
        return scale_of(rule, largest, None, lanes)
    return e.let(_rounded(rule.type.mantissa_bits, _sixth(largest, None, lanes), lanes))


def doubled_magnitude(ratio: Expr, lanes: int) -> Expr:
    """Round magnitudes >= 0 to the E2M1 grid; int32 lanes of twice the value, 0..12."""
    zero = e.const(0, "int32", lanes)
    total = e.Register("int32", lanes, zero)
    grid = zip(e2m1.MIDPOINTS, e2m1.DOUBLED[:-1], e2m1.DOUBLED[1:], strict=True)
    for midpoint, low, high in grid:
        reached = ratio >= e.const(midpoint, "float32", lanes)
        step = e.const(high - low, "int32", lanes)
        total.set(total.get() + tirx.Select(reached, step, zero))
    return e.let(total.get())


def magnitude_index(ratio: Expr, lanes: int) -> Expr:
    """Round magnitudes >= 0 to the E2M1 grid; int32 lanes of the magnitude's index, 0..7."""
    zero, one = e.const(0, "int32", lanes), e.const(1, "int32", lanes)
    total = e.Register("int32", lanes, zero)
    for midpoint in e2m1.MIDPOINTS:
        reached = ratio >= e.const(midpoint, "float32", lanes)
        total.set(total.get() + tirx.Select(reached, one, zero))
    return e.let(total.get())


def stored_byte(kind: Any, scale: Expr) -> Expr:
    """Return the byte of a scale >= 0 that ``scale_of`` has rounded to an 8-bit float, uint8."""
    drop = 23 - kind.mantissa_bits
    normal = (e.bits(scale, "int32") >> e.const(drop)) - e.const(
        (127 - kind.bias) << kind.mantissa_bits
    )
    least = e.const(2.0 ** (1 - kind.bias), "float32")
    steps = scale * e.const(2.0 ** (kind.bias - 1 + kind.mantissa_bits), "float32")
    subnormal = e.cast(tirx.min(steps, e.const(255.0, "float32")), "int32")
    byte = e.opaque(tirx.Select(scale < least, subnormal, normal), "int32")
    return e.opaque(e.cast(byte, "uint8"), "uint8")


def divisor_of(scale: Expr, lanes: int = 1) -> Expr:
    """Return what to divide by under a scale: infinity where it is 0, so that all becomes 0."""
    zero = scale == e.const(0.0, "float32", lanes)
    infinity = e.bits(e.const(INFINITY, lanes=lanes), "float32", lanes)
    return e.opaque(tirx.Select(zero, infinity, scale), "float32", lanes)


def _sixth(largest: Expr, tensor_scale: Expr | None, lanes: int) -> Expr:
    """Return maxima over 6, and over the tensor scale."""
    six, zero, one = (e.const(v, "float32", lanes) for v in (e2m1.LARGEST, 0.0, 1.0))
    maximum = e.opaque(e.bits(largest, "float32", lanes) / six, "float32", lanes)
    if tensor_scale is not None:
        nothing = tensor_scale == zero
        safe = e.opaque(tirx.Select(nothing, one, tensor_scale), "float32", lanes)
        maximum = tirx.Select(nothing, zero, maximum / safe)
    return e.opaque(maximum, "float32", lanes)


def _rounded(mantissa_bits: int, value: Expr, lanes: int) -> Expr:
    """Round float32 >= 0 to a number of mantissa bits, ties away from zero; any exponent."""
    drop = 23 - mantissa_bits
    word = e.bits(value, "int32", lanes) + e.const(1 << (drop - 1), lanes=lanes)
    cut = (word >> e.const(drop, lanes=lanes)) << e.const(drop, lanes=lanes)
    return e.bits(cut, "float32", lanes)


def _minifloat(kind: Any, value: Expr, lanes: int) -> Expr:
    """Round float32 >= 0 to an 8-bit float: ties away, subnormals kept, saturating."""

    def c(number: float) -> Expr:
        return e.const(number, "float32", lanes)

    normal = _rounded(kind.mantissa_bits, value, lanes)
    least = 2.0 ** (1 - kind.bias)
    step = 2.0 ** (1 - kind.bias - kind.mantissa_bits)
    below = tirx.min(value, c(least)) * c(1 / step)
    # The largest float32 below one half: with 0.5 itself 0.49999997 would round up.
    count = e.cast(below + c(0.5 - 2.0**-25), "int32", lanes)
    subnormal = e.cast(count, "float32", lanes) * c(step)
    rounded = e.opaque(tirx.Select(value < c(least), subnormal, normal), "float32", lanes)
    return e.let(tirx.min(rounded, c(float(kind.values[kind.largest]))))


def _power_of_two(rule: ScaleRule, largest: Expr, lanes: int) -> Expr:
    """2^(floor(log2 largest) - 2), one more where the rule rounds large mantissas up."""

    def c(number: int) -> Expr:
        return e.const(number, "int32", lanes)

    exponent = (largest >> c(23)) - c(2)
    if rule.power is Power.NEAREST:
        mantissa = largest & c(0x7FFFFF)
        exponent = exponent + e.cast(mantissa >= c(0x600000), "int32", lanes)
    exponent = e.opaque(tirx.max(tirx.min(exponent, c(252)), c(0)), "int32", lanes)
    return e.let(e.bits(tirx.max(exponent << c(23), c(1 << 22)), "float32", lanes))
