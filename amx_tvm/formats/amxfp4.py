"""AMXFP4: E2M1 elements with one scale for the positive and one for the negative values of a group.

Source: arXiv 2411.09909 and its reference code (aiha-lab/MX-QLLM). Both scales come from the
group's extrema by one rule; a value > 0 uses the positive scale, every other value the negative:

    positive = rule(max(group))     negative = rule(|min(group)|)     value = +-E2M1 * its scale

    name                 rule(m)                                        scale bytes a group
    amxfp4               E5M2(m / 6), the paper's main format           2
    amxfp4-e4m3          E4M3(m / 6), saturating at 448                 2
    amxfp4-e4m3-tensor   E4M3(m / 6 / t), t = largest / (6 * 448)       2, and a float32 t
    amxfp4-pot           2^(floor(log2 m) - 2)                          2
    amxfp4-pot-r         the same, exponent + 1 when m's mantissa is >= 1.75

A sign that does not occur has scale byte 0; a scale that rounds to 0 flushes its half to 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from amx_tvm.formats import e2m1, scale_rules
from amx_tvm.formats.base import Format
from amx_tvm.formats.data import DecodeTerm, ScaleTensor
from amx_tvm.formats.registry import register


class AMXFP4(Format):
    """AMXFP4 under one of the scale rules."""

    terms = (
        DecodeTerm(e2m1.POSITIVE_TABLE, "positive", 0.5, 0),
        DecodeTerm(e2m1.NEGATIVE_TABLE, "negative", -0.5, 0),
    )

    rule: scale_rules.ScaleRule

    def __init__(self, name: str, title: str, rule: scale_rules.ScaleRule):
        self.name = name
        self.title = title
        self.rule = rule
        self.row_scaled = rule.tensor_scaled
        self.scale_tensors = (
            ScaleTensor("positive", rule.type),
            ScaleTensor("negative", rule.type),
        )

    def tensor_scale_of(self, largest: np.ndarray) -> np.ndarray:
        """float32 tensor scale for a largest magnitude, by the scale rule."""
        return self.rule.tensor_scale(largest)

    def group_scales(
        self, high: np.ndarray, depth: np.ndarray, tensor_scale: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """Stored scale pair of groups with extrema `high` and -`depth`."""
        return {
            "positive": self.rule.stored(high, tensor_scale),
            "negative": self.rule.stored(depth, tensor_scale),
        }

    @np.errstate(over="ignore")  # a quotient beyond float32 is Inf and saturates
    def encode(
        self,
        values: np.ndarray,
        scales: Mapping[str, np.ndarray],
        tensor_scale: np.ndarray | None = None,
    ) -> np.ndarray:
        """Codes of float32 [R, G, 32] under a stored scale pair [R, G]."""
        positive = self.rule.divisor(scales["positive"], tensor_scale)[..., None]
        negative = self.rule.divisor(scales["negative"], tensor_scale)[..., None]
        # One of the two quotients is >= 0: the one by the value's own scale. Two divisions and a
        # maximum are several times faster than choosing the divisor value by value.
        ratio = values / positive
        np.maximum(ratio, values / -negative, out=ratio)
        return e2m1.encode(ratio, values)

    def decode(
        self,
        codes: np.ndarray,
        scales: Mapping[str, np.ndarray],
        tensor_scale: np.ndarray | None = None,
    ) -> np.ndarray:
        """float32 values; equals the sum of the terms, without table lookups."""
        half = np.float32(0.5)
        doubled = e2m1.signed_doubled(codes)
        out = np.maximum(doubled, 0).astype(np.float32)
        out *= (self.rule.type.decode(scales["positive"]) * half)[..., None]
        other = np.minimum(doubled, 0).astype(np.float32)
        other *= (self.rule.type.decode(scales["negative"]) * half)[..., None]
        out += other
        if tensor_scale is not None:
            out *= tensor_scale[..., None]
            out += np.float32(0)  # a product that underflows to -0
        return out


AMXFP4_E5M2 = register(AMXFP4("amxfp4", "E2M1, E5M2 scale pair", scale_rules.E5M2_OF_SIXTH))
register(AMXFP4("amxfp4-e4m3", "E2M1, E4M3 scale pair", scale_rules.E4M3_OF_SIXTH))
register(
    AMXFP4(
        "amxfp4-e4m3-tensor",
        "E2M1, E4M3 scale pair, float32 a tensor or row",
        scale_rules.E4M3_WITH_TENSOR,
    )
)
register(AMXFP4("amxfp4-pot", "E2M1, power-of-two scale pair", scale_rules.POT))
register(AMXFP4("amxfp4-pot-r", "E2M1, rounded power-of-two scale pair", scale_rules.POT_R))

# The reference code's own E4M3, which reaches 480. Not registered: its byte 0x7F is NaN elsewhere,
# so nothing may store it. It exists to reproduce that code's numbers.
AMXFP4_E4M3_480 = AMXFP4(
    "amxfp4-e4m3-480",
    "E2M1, E4M3 scale pair up to 480 (never stored)",
    scale_rules.E4M3_480_OF_SIXTH,
)
