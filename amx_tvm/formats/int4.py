"""int4: asymmetric 4-bit integers in groups of 32, a float16 scale and a 4-bit integer zero point.

    scale = float16((max - min) / 15)    zero = round(-min / scale)    value = scale * (code - zero)

with max >= 0 >= min, so that 0 is always exact. Integers round to nearest, ties away from zero, by
the scale that is stored. The zero point fills a byte: 4 + 24/32 = 4.75 stored bits a value.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from amx_tvm.formats import scales as scale_types
from amx_tvm.formats.base import Format
from amx_tvm.formats.data import DecodeTerm, ScaleTensor
from amx_tvm.formats.registry import register
from amx_tvm.formats.scale_rules import quotient

LARGEST_CODE = 15


class Int4(Format):
    """Asymmetric 4-bit integers."""

    name = "int4"
    title = "asymmetric integers, float16 scale, 4-bit zero point"
    scale_tensors = (
        ScaleTensor("scale", scale_types.FLOAT16),
        ScaleTensor("zero", scale_types.ZERO_POINT),
    )
    terms = (DecodeTerm(tuple(range(16)), "scale", 1.0, "zero"),)

    def group_scales(
        self, high: np.ndarray, depth: np.ndarray, tensor_scale: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """Stored scale and zero point of groups with extrema `high` and -`depth`."""
        with np.errstate(over="ignore"):  # a range beyond float32 saturates like one beyond float16
            scale = scale_types.FLOAT16.encode((high + depth) / np.float32(LARGEST_CODE))
        steps = quotient(depth, scale_types.FLOAT16.decode(scale))
        zero = scale_types.round_away(np.minimum(steps, np.float32(LARGEST_CODE)))
        return {"scale": scale, "zero": zero.astype(np.uint8)}

    @np.errstate(over="ignore")  # a quotient beyond float32 is Inf and clips
    def encode(
        self,
        values: np.ndarray,
        scales: Mapping[str, np.ndarray],
        tensor_scale: np.ndarray | None = None,
    ) -> np.ndarray:
        """Codes 0..15 of float32 [R, G, 32]; the zero point where the scale is 0."""
        scale = scale_types.FLOAT16.decode(scales["scale"])
        steps = values / np.where(scale == 0, np.float32(np.inf), scale)[..., None]
        limit = np.float32(LARGEST_CODE)  # codes beyond it clip anyway, and 2^22 is out of reach
        steps = scale_types.round_away(np.clip(steps, -limit, limit, out=steps))
        steps += scales["zero"].astype(np.float32)[..., None]
        return np.clip(steps, 0, limit, out=steps).astype(np.uint8)


register(Int4())
