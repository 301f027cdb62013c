"""How stored 8-bit scales become floats, and float16 for scaled registers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .arithmetic import BYTE, HIGH, POWER, as_half2


@dataclass(frozen=True)
class ScaleType:
    """How stored 8-bit scales become numbers.

    floats, halves : C++ of bytes {i} and {j} as two floats and as two float16
    factor : what the floats lack
    gain : power of two that the halves lack, to hold value * 2^exponent
    exponent : E of decode.py's docstring
    as_floats, as_halves : meanings, of (rec, i, j)
    """

    floats: str
    halves: str
    factor: float
    gain: int
    exponent: int
    as_floats: Callable[..., np.ndarray]
    as_halves: Callable[..., np.ndarray]


def _powers(rec: np.ndarray, i: int, j: int) -> np.ndarray:
    bits = np.stack([BYTE.meaning(rec, place) for place in (i, j)], -1)
    return (bits.astype(np.uint32) << np.uint32(23)).view(np.float32)


SCALES = {
    # a byte of E5M2 is the upper half of a float16
    "E5M2": ScaleType(
        "__half22float2(amx_h2(amx_high(rec, {i}, {j})))",
        "amx_high(rec, {i}, {j})",
        1.0,
        7,
        7,
        lambda rec, i, j: as_half2(HIGH.meaning(rec, i, j)).astype(np.float32),
        lambda rec, i, j: as_half2(HIGH.meaning(rec, i, j)),
    ),
    # exponent and mantissa at a float16's place: the value times 2^-8, subnormals included
    "E4M3": ScaleType(
        "__half22float2(amx_h2(amx_high(rec, {i}, {j}) >> 1))",
        "(amx_high(rec, {i}, {j}) >> 1)",
        256.0,
        13,
        5,
        lambda rec, i, j: as_half2(HIGH.meaning(rec, i, j) >> np.uint32(1)).astype(np.float32),
        lambda rec, i, j: as_half2(HIGH.meaning(rec, i, j) >> np.uint32(1)),
    ),
    "E8M0": ScaleType(
        "make_float2(__uint_as_float(amx_byte(rec, {i}) << 23), "
        "__uint_as_float(amx_byte(rec, {j}) << 23))",
        "(amx_power(amx_byte(rec, {i})) | amx_power(amx_byte(rec, {j})) << 16)",
        1.0,
        0,
        8,
        _powers,
        lambda rec, i, j: np.stack(
            [as_half2(POWER.meaning(BYTE.meaning(rec, p)))[..., 0] for p in (i, j)], -1
        ),
    ),
}
