"""ggml's block types: to float32, and to codes and scales where a format of ours is the same.

Blocks that pass through without another rounding (``d`` is a little-endian float16)::

    MXFP4  1 byte E8M0 scale, 16 bytes: low nibbles = values 0..15, high nibbles = values 16..31
    NVFP4  4 bytes E4M3 scales, then for each of them 8 bytes: low nibbles = values 0..7 of its 16,
           high nibbles = values 8..15
    Q8_0   2 bytes d, 32 int8
"""

from __future__ import annotations

import numpy as np
from gguf import quants
from gguf.constants import GGMLQuantizationType as GgmlType

from amx_tvm import formats
from amx_tvm.formats.base import Quantized

# The types that are read: all that the gguf package decodes.
SUPPORTED = frozenset(
    {
        GgmlType.F32, GgmlType.F16, GgmlType.BF16,
        GgmlType.Q8_0, GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q5_0, GgmlType.Q5_1,
        GgmlType.Q2_K, GgmlType.Q3_K, GgmlType.Q4_K, GgmlType.Q5_K, GgmlType.Q6_K,
        GgmlType.IQ1_S, GgmlType.IQ1_M, GgmlType.IQ2_XXS, GgmlType.IQ2_XS, GgmlType.IQ2_S,
        GgmlType.IQ3_XXS, GgmlType.IQ3_S, GgmlType.IQ4_NL, GgmlType.IQ4_XS,
        GgmlType.TQ1_0, GgmlType.TQ2_0, GgmlType.MXFP4, GgmlType.NVFP4,
    }
)  # fmt: skip

CHUNK_VALUES = 1 << 18  # a step: the dequantizers' temporaries are several times as large


def dequantize(stored: np.ndarray, kind: GgmlType, shape: tuple[int, ...]) -> np.ndarray:
    """Return the float32 values of a tensor.

    Parameters
    ----------
    stored : numpy.ndarray
        uint8 [rows..., bytes of a row].
    kind : GGMLQuantizationType
        One of SUPPORTED.
    shape : tuple of int
        The tensor's shape in values.

    Notes
    -----
    Works through the rows in steps, so that memory stays at the result plus a few MiB.
    """
    rows = stored.reshape(-1, stored.shape[-1])
    values = np.empty((rows.shape[0], shape[-1]), np.float32)
    step = max(1, CHUNK_VALUES // shape[-1])
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        values[part] = quants.dequantize(rows[part], kind)
    return values.reshape(shape)


def quantized_blocks(
    stored: np.ndarray, kind: GgmlType, shape: tuple[int, ...]
) -> Quantized | None:
    """Return MXFP4 as "mxfp4", NVFP4 as "nvfp4", Q8_0 as "int8", and None for other types.

    The arguments are those of :func:`dequantize`; codes and scale bits are the stored ones.
    """
    groups = (*shape[:-1], shape[-1] // 32)
    if kind == GgmlType.MXFP4:
        blocks = stored.reshape(*groups, 17)
        packed = blocks[..., 1:]
        codes = np.concatenate([packed & 15, packed >> 4], axis=-1)
        scales = {"scale": blocks[..., 0].copy()}
        return Quantized(codes.reshape(shape), scales, formats.get("mxfp4"))
    if kind == GgmlType.NVFP4:
        blocks = stored.reshape(*shape[:-1], shape[-1] // 64, 36)
        packed = blocks[..., 4:].reshape(*blocks.shape[:-1], 4, 8)
        codes = np.concatenate([packed & 15, packed >> 4], axis=-1)
        scales = {"scale": blocks[..., :4].reshape(*shape[:-1], shape[-1] // 16)}
        return Quantized(
            codes.reshape(shape), scales, formats.get("nvfp4"), np.ones((), np.float32)
        )
    if kind == GgmlType.Q8_0:
        blocks = stored.reshape(*groups, 34)
        scale = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0]
        codes = blocks[..., 2:] ^ np.uint8(128)  # the int8 q becomes the byte q + 128
        return Quantized(codes.reshape(shape), {"scale": scale}, formats.get("int8"))
    return None
