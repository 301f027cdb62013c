"""Weights of E2M1 elements as E4M3 numbers: the table that GPUs multiply by, and its layout.

Tensor cores that multiply E4M3 take weights with their scales inside. For a weight, one power of
two brings the largest scale times 6 to at most 448; a code under a stored scale then stands for

    E4M3(magnitude * scale * 2^shift), nearest, ties away from zero, subnormals kept

and products are multiplied by 2^-shift. There are only 256 stored scales and 8 magnitudes, so that
is a table, made when a weight is packed:

    layout "cuda-fragment-e4m3"
        codes, scales, tile_scale   as in "cuda-fragment", codes in the order "nibbles"
        table   uint32 [513]        8 bytes for each of 256 stored scales, then float32 2^-shift

Of AMXFP4's products only 1.75 * 1.5 is rounded, as long as a scale is within eleven binades of the
largest; below these, numbers become subnormal and err by at most 2^-18 of the largest magnitude.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from amx_tvm.formats import cuda_layout
from amx_tvm.formats.base import Format
from amx_tvm.formats.data import Quantized
from amx_tvm.formats.e2m1 import LARGEST, MAGNITUDES
from amx_tvm.formats.packing import Arrays, Layout, Shapes, register_layout
from amx_tvm.formats.scales import E4M3

LAYOUT = "cuda-fragment-e4m3"
LARGEST_E4M3 = 448.0
ENTRIES = 256
FACTOR = 2 * ENTRIES  # word of the table that holds 2^-shift
WORDS = FACTOR + 1


def holds(fmt: Format) -> bool:
    """Whether a format's weights can be such a table: E2M1 elements under 8-bit scales."""
    return fmt.rule is not None


def table(fmt: Format, scales: Mapping[str, np.ndarray]) -> np.ndarray:
    """Table of a weight, uint32 [513].

    Parameters
    ----------
    fmt : Format
        A format of E2M1 elements.
    scales : mapping of str to uint8 array
        The weight's stored scales.
    """
    kind = fmt.scale_tensors[0].type
    values = kind.decode(np.arange(kind.largest + 1, dtype=np.uint8)).astype(np.float64)
    largest = max(float(values[stored.max()]) for stored in scales.values())
    shift = int(np.floor(np.log2(LARGEST_E4M3 / (LARGEST * largest)))) if largest else 0
    products = np.zeros((ENTRIES, len(MAGNITUDES)))
    # scales above the largest do not occur; they saturate
    np.minimum(
        np.ldexp(np.outer(values, MAGNITUDES), shift), LARGEST_E4M3, out=products[: len(values)]
    )
    made = np.zeros(WORDS, np.uint32)
    made[:FACTOR] = E4M3.encode(products.astype(np.float32)).view(np.uint32).reshape(-1)
    made[FACTOR:] = np.float32(np.ldexp(1.0, -shift)).view(np.uint32)
    return made


def decoded(quantized: Quantized) -> np.ndarray:
    """Oracle: the weight that kernels multiply by, float32 [N, K], its tensor scale included."""
    fmt = quantized.format
    made = table(fmt, quantized.scales)
    numbers = E4M3.decode(made[:FACTOR].view(np.uint8)).reshape(ENTRIES, -1)
    numbers = numbers * made[FACTOR:].view(np.float32)
    stored = [quantized.scales[s.name] for s in fmt.scale_tensors]
    n, k = quantized.codes.shape
    wide = [np.repeat(s, fmt.group_size, axis=1)[:, :k] for s in stored]
    negative = quantized.codes >> 3 != 0
    scale = np.where(negative, wide[-1], wide[0])
    magnitude = numbers[scale, quantized.codes & 7]
    signed = np.where(negative, -magnitude, magnitude).astype(np.float32)
    if quantized.tensor_scale is not None:
        signed *= np.reshape(quantized.tensor_scale, (-1, 1))
    return signed


def round_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Oracle: rows of x rounded to E4M3 under one scale each, as the GPU rounds them.

    Parameters
    ----------
    x : float16 [M, K], finite

    Returns
    -------
    numbers float32 [M, K], all of them E4M3's, and float32 scales [M]; x is nearly their product.
    """
    x = x.astype(np.float32)
    largest = np.abs(x).max(1)
    limit = np.float32(LARGEST_E4M3)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest > 0, limit / largest, np.float32(0))
    scaled = x * inverse[:, None].astype(np.float32)
    _, exponent = np.frexp(scaled)
    step = np.ldexp(np.float32(1), np.maximum(exponent - 1, -6) - 3)
    return np.clip(np.rint(scaled / step) * step, -limit, limit), largest / limit


def interleaved(x: np.ndarray) -> np.ndarray:
    """Columns of x [.., K] in the order of the operand: the halves of 16 take turns."""
    halves = x.reshape(*x.shape[:-1], -1, 2, 8)
    return np.ascontiguousarray(halves.swapaxes(-1, -2)).reshape(x.shape)


def _pack(fmt: Format, quantized: Quantized) -> Arrays:
    arrays = cuda_layout.pack(fmt, quantized, nibbles=True)
    return {**arrays, "table": table(fmt, quantized.scales)}


def _shapes(fmt: Format, n: int, k: int) -> Shapes:
    return {**cuda_layout.shapes(fmt, n, k, nibbles=True), "table": ((WORDS,), "uint32")}


register_layout(
    Layout(
        LAYOUT,
        _pack,
        partial(cuda_layout.unpack, nibbles=True),
        _shapes,
        compute="float16",
        columns=16,  # bytes of x
        takes=holds,
    )
)
