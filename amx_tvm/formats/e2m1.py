"""E2M1, the 4-bit float element: grid, rounding to codes, and the integer tables of its decode.

Code layout: bit 3 is the sign, bits 2..0 the magnitude index.

    index      0    1    2    3    4    5    6    7
    magnitude  0   .5    1   1.5   2    3    4    6
    doubled    0    1    2    3    4    6    8   12     (small integers: what kernels multiply)

There is no Inf and no NaN; larger magnitudes saturate at 6. Code 8 ("minus zero") is never written
and decodes to 0. Rounding is to nearest, ties away from zero, as in the AMXFP4 reference code
(aiha-lab/MX-QLLM, `quantize_elemwise` with `rd_away`) and in OCP MX v1.0 section 5.3.3's value set.
"""

from __future__ import annotations

import numpy as np

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12)
LARGEST = 6.0
SIGN_BIT = 8

# A magnitude at or above the i-th midpoint rounds to index i + 1: ">=" is "ties away from zero".
MIDPOINTS = tuple((low + high) / 2 for low, high in zip(MAGNITUDES, MAGNITUDES[1:], strict=False))

# Unsigned 16-entry tables, indexed by the code; an unsigned operand is what vpdpbusd wants.
POSITIVE_TABLE = DOUBLED + (0,) * 8
NEGATIVE_TABLE = (0,) * 8 + DOUBLED
OFFSET = 12
OFFSET_TABLE = tuple(OFFSET + d for d in DOUBLED) + tuple(OFFSET - d for d in DOUBLED)

# Signed values by code, 0..15; code 8 is a plain 0.
VALUES = MAGNITUDES + (0.0,) + tuple(-m for m in MAGNITUDES[1:])


def round_magnitude(ratio: np.ndarray) -> np.ndarray:
    """Round magnitudes to the E2M1 grid.

    Parameters
    ----------
    ratio : float32 array, every element >= 0 (Inf saturates, NaN gives index 0)

    Returns
    -------
    uint8 array of the same shape: magnitude index 0..7.

    Notes
    -----
    The index is the number of midpoints that the ratio reaches. Seven vectorized comparisons whose
    results are added as bytes cost about 0.8 ns a value, several times less than a searchsorted,
    and are exact: the midpoints are float32 numbers.
    """
    reached = np.empty(ratio.shape, np.bool_)
    as_bytes = reached.view(np.uint8)
    index = np.greater_equal(ratio, np.float32(MIDPOINTS[0])).view(np.uint8)
    for midpoint in MIDPOINTS[1:]:
        np.greater_equal(ratio, np.float32(midpoint), out=reached)
        np.add(index, as_bytes, out=index)
    return index


def encode(ratio: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Codes of magnitudes `ratio` with the signs of `source`.

    Parameters
    ----------
    ratio : float32 array >= 0, the magnitudes already divided by their scale
    source : float32 array of the same shape; only its sign is read

    Returns
    -------
    uint8 codes 0..15. A magnitude that rounds to 0 gets code 0 whatever its sign.
    """
    codes = round_magnitude(ratio)
    sign = np.less(source, np.float32(0)).view(np.uint8)
    sign *= np.not_equal(codes, 0).view(np.uint8)
    sign *= np.uint8(SIGN_BIT)
    codes |= sign
    return codes


def signed_doubled(codes: np.ndarray) -> np.ndarray:
    """Twice the signed E2M1 value of every code, as int8 (-12..12).

    Byte arithmetic instead of a table lookup: NumPy's take on uint8 indices is slower by half.
    The indices 0..4 are their own doubled values; 5, 6 and 7 add 1, 2 and 5.
    """
    index = codes & np.uint8(7)
    doubled = index + np.greater(index, 4).view(np.uint8)
    doubled += np.greater(index, 5).view(np.uint8)
    doubled += np.greater(index, 6).view(np.uint8) * np.uint8(3)
    signed = doubled.view(np.int8)
    # 1 for a positive code, -1 for a negative one.
    signed *= np.int8(1) - ((codes & np.uint8(SIGN_BIT)) >> np.uint8(2)).view(np.int8)
    return signed
