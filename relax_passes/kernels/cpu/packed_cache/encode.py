"""Rounding keys and values to stored codes and scales: bit for bit the NumPy oracle's.

What a scale is and which code is nearest are the rules of ``kernels/cpu/rounding.py``, which round
activations too; here they end in the bytes that are stored.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr

from amx_tvm.formats import e2m1, scales
from amx_tvm.formats.int8 import BYTE_OFFSET, LARGEST
from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.attention import vector as v
from relax_passes.kernels.cpu.fp4 import extrema, squared_error, stretched
from relax_passes.kernels.cpu.rounding import divisor_of, magnitude_index, scale_of, stored_byte

from .layout import Layout


@dataclass(frozen=True)
class Encoded:
    """A group of 32 channels.

    Attributes
    ----------
    codes : tuple of Expr
        Two vectors int32x16.
    scales : tuple of Expr
        What is stored, uint8 or uint16, in the order of the layout's scale parts.
    """

    codes: tuple[Expr, ...]
    scales: tuple[Expr, ...]


def encoded(layout: Layout, values: list[Expr]) -> Encoded:
    """Round 32 channels, two vectors float32x16.

    Scales have the range of their type: none is taken of a whole row.
    """
    if layout.format.code_bits == 8:
        return _int8(values)
    size = 2 // layout.subgroups
    groups = [_e2m1(layout, values[i : i + size]) for i in range(0, 2, size)]
    codes = [code for group in groups for code in group.codes]
    parts = range(len(layout.format.scale_tensors))
    return Encoded(tuple(codes), tuple(group.scales[i] for i in parts for group in groups))


def _e2m1(layout: Layout, values: list[Expr]) -> Encoded:
    rule = layout.format.rounding_of("the KV cache")
    signs = (1, -1) if len(layout.format.scale_tensors) == 2 else (0,)
    found = []
    for sign, largest in zip(signs, extrema(values, signs), strict=True):
        scale = scale_of(rule, largest, None)
        if layout.format.four_over_six:
            four = scale_of(rule, stretched(largest), None)
            better = squared_error(values, sign, four) < squared_error(values, sign, scale)
            scale = e.opaque(tirx.Select(better, four, scale), "float32")
        found.append(scale)
    divisors = [e.let(e.splat(divisor_of(scale), v.LANES), "divisor") for scale in found]
    codes = []
    for value in values:
        own = divisors[0]
        if len(divisors) == 2:
            own = v.hold(tirx.Select(value > v.const(0.0), *divisors), "own")
        index = magnitude_index(v.hold(tirx.abs(value) / own, "ratio"), v.LANES)
        zero = v.const(0, dtype="int32")
        minus = tirx.And(value < v.const(0.0), index > zero)
        sign = tirx.Select(minus, v.const(e2m1.SIGN_BIT, dtype="int32"), zero)
        codes.append(e.let(index + sign, "code"))
    return Encoded(tuple(codes), tuple(stored_byte(rule.type, scale) for scale in found))


def _int8(values: list[Expr]) -> Encoded:
    (largest,) = extrema(values, (0,))
    step = e.bits(largest, "float32") / e.const(float(LARGEST), "float32")
    half = e.cast(tirx.min(step, e.const(65504.0, "float32")), "float16")
    stored = e.opaque(e.bits(half, "uint16"), "uint16")
    scale = e.opaque(e.cast(e.bits(stored, "float16"), "float32"), "float32")
    divisor = e.let(e.splat(divisor_of(scale), v.LANES), "divisor")
    codes = []
    for value in values:
        limit = float(LARGEST)
        steps = tirx.max(tirx.min(value / divisor, v.const(limit)), v.const(-limit))
        steps = v.hold(steps, "steps")
        # round_away of amx_tvm.formats.scales: nearest, ties away from zero
        nearest = float(scales.HALF)
        towards = tirx.Select(steps < v.const(0.0), v.const(-nearest), v.const(nearest))
        rounded = v.cast(v.hold(steps + towards, "away"), "int32")
        codes.append(e.let(rounded + v.const(BYTE_OFFSET, dtype="int32"), "code"))
    return Encoded(tuple(codes), (stored,))
