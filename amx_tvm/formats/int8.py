"""int8: symmetric 8-bit integers in groups of 32 under a float16 scale, GGUF's Q8_0 as storage.

    scale = float16(max|x| / 127)      q = round(x / scale), |q| <= 127      byte = q + 128

For language-model heads and embeddings. A tensor that lies on a Q8_0 grid (each group's largest |q|
is 127, as Q8_0 quantizers leave it) comes back bit for bit. q is rounded by the scale that is
stored, where llama.cpp rounds by the scale before its rounding to float16: never worse, and much
better where the scale is a float16 subnormal. The byte is unsigned for the sake of vpdpbusd.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from amx_tvm.formats import scales as scale_types
from amx_tvm.formats.base import Format
from amx_tvm.formats.data import DecodeTerm, ScaleTensor
from amx_tvm.formats.registry import register

LARGEST = 127
BYTE_OFFSET = 128


class Int8(Format):
    """Symmetric 8-bit integers, for layers that 4 bits would hurt."""

    name = "int8"
    title = "symmetric integers, float16 scale (GGUF Q8_0)"
    code_bits = 8
    scale_tensors = (ScaleTensor("scale", scale_types.FLOAT16),)
    terms = (DecodeTerm(None, "scale", 1.0, BYTE_OFFSET),)

    def group_scales(
        self, high: np.ndarray, depth: np.ndarray, tensor_scale: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """Stored scale of groups with extrema `high` and -`depth`."""
        largest = np.maximum(high, depth)
        return {"scale": scale_types.FLOAT16.encode(largest / np.float32(LARGEST))}

    @np.errstate(over="ignore")  # a quotient beyond float32 is Inf and clips
    def encode(
        self,
        values: np.ndarray,
        scales: Mapping[str, np.ndarray],
        tensor_scale: np.ndarray | None = None,
    ) -> np.ndarray:
        """Bytes q + 128 of float32 [R, G, 32]; 128 where the scale is 0."""
        scale = scale_types.FLOAT16.decode(scales["scale"])
        steps = values / np.where(scale == 0, np.float32(np.inf), scale)[..., None]
        limit = np.float32(LARGEST)
        steps = scale_types.round_away(np.clip(steps, -limit, limit, out=steps))
        steps += np.float32(BYTE_OFFSET)
        return steps.astype(np.uint8)


register(Int8())
