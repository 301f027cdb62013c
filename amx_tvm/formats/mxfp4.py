"""MXFP4: E2M1 elements in groups of 32 under one scale for both signs.

    mxfp4        E8M0 scale 2^(floor(log2 max|x|) - 2)         OCP Microscaling Formats v1.0
    mxfp4-e5m2   E5M2(max|x| / 6), the symmetric half of AMXFP4's idea, for comparison

Elements round to nearest with ties away from zero, as everywhere in this package.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from amx_tvm.formats import e2m1, scale_rules
from amx_tvm.formats.base import Format
from amx_tvm.formats.data import DecodeTerm, ScaleTensor
from amx_tvm.formats.registry import register


class SymmetricE2M1(Format):
    """E2M1 elements under one scale a group, with any scale rule and group size."""

    terms = (DecodeTerm(e2m1.OFFSET_TABLE, "scale", 0.5, e2m1.OFFSET),)

    rule: scale_rules.ScaleRule

    def __init__(self, name: str, title: str, rule: scale_rules.ScaleRule, group_size: int = 32):
        self.name = name
        self.title = title
        self.rule = rule
        self.group_size = group_size
        self.row_scaled = rule.tensor_scaled
        self.scale_tensors = (ScaleTensor("scale", rule.type),)

    def tensor_scale_of(self, largest: np.ndarray) -> np.ndarray:
        """float32 tensor scale for a largest magnitude, by the scale rule."""
        return self.rule.tensor_scale(largest)

    def group_scales(
        self, high: np.ndarray, depth: np.ndarray, tensor_scale: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """Stored scale of groups with extrema `high` and -`depth`."""
        return {"scale": self.rule.stored(np.maximum(high, depth), tensor_scale)}

    @np.errstate(over="ignore")  # a quotient beyond float32 is Inf and saturates
    def encode(
        self,
        values: np.ndarray,
        scales: Mapping[str, np.ndarray],
        tensor_scale: np.ndarray | None = None,
    ) -> np.ndarray:
        """Codes of float32 [R, G, group_size] under stored scales [R, G]."""
        ratio = values / self.rule.divisor(scales["scale"], tensor_scale)[..., None]
        return e2m1.encode(np.abs(ratio, out=ratio), values)

    def decode(
        self,
        codes: np.ndarray,
        scales: Mapping[str, np.ndarray],
        tensor_scale: np.ndarray | None = None,
    ) -> np.ndarray:
        """float32 values; equals the terms, without a table lookup."""
        out = e2m1.signed_doubled(codes).astype(np.float32)
        out *= (self.rule.type.decode(scales["scale"]) * np.float32(0.5))[..., None]
        if tensor_scale is not None:
            out *= tensor_scale[..., None]
        return np.add(out, np.float32(0), out=out)  # a negative code that underflows is -0


register(SymmetricE2M1("mxfp4", "E2M1, power-of-two scale", scale_rules.POT))
register(SymmetricE2M1("mxfp4-e5m2", "E2M1, E5M2 scale", scale_rules.E5M2_OF_SIXTH))
