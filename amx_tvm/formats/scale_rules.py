"""Scale rules of the E2M1 formats: from a group's largest magnitude to a stored scale.

A rule is shared by AMXFP4, which applies it to each sign, and by MXFP4 and NVFP4, which apply it to
both together. Divisions are true float32 divisions; nothing is ever divided by 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from amx_tvm.formats import e2m1, scales

LARGEST_ELEMENT = np.float32(e2m1.LARGEST)
# The tensor scale places the largest group's scale at E4M3's end: t = largest / (6 * 448).
TENSOR_RANGE = np.float32(e2m1.LARGEST * 448)


def quotient(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """True float32 division, and 0 where the denominator is 0."""
    safe = np.where(denominator == 0, np.float32(np.inf), denominator)
    with np.errstate(over="ignore"):
        return numerator / safe


class Power(Enum):
    """Whether a scale is a power of two, and which one of a group's largest magnitude m.

    NONE : no power of two: m / 6, rounded to the stored type
    DOWN : 2^(floor(log2 m) - 2)
    NEAREST : the same, the exponent one larger when m's mantissa is >= 1.75
    """

    NONE = "none"
    DOWN = "down"
    NEAREST = "nearest"


@dataclass(frozen=True)
class ScaleRule:
    """How one scale is made; kernels that quantize read it and emit the same.

    type : the stored type
    power : how the largest magnitude of a group becomes a number of that type
    tensor_scaled : a float32 tensor scale multiplies every group scale
    """

    type: Any  # a ScaleType with encode
    power: Power = Power.NONE
    tensor_scaled: bool = False

    def tensor_scale(self, largest: np.ndarray) -> np.ndarray:
        """float32 tensor scale for the largest magnitude of a tensor or row."""
        return largest / TENSOR_RANGE

    def stored(self, maximum: np.ndarray, tensor_scale: np.ndarray | None) -> np.ndarray:
        """Stored scales of group maxima float32 [R, G] >= 0; the tensor scale is [R, 1]."""
        if self.power is not Power.NONE:
            return self.type.encode(maximum, round_up=self.power is Power.NEAREST)
        sixth = maximum / LARGEST_ELEMENT
        return self.type.encode(sixth if tensor_scale is None else quotient(sixth, tensor_scale))

    def divisor(self, stored: np.ndarray, tensor_scale: np.ndarray | None) -> np.ndarray:
        """float32 scales to divide by: Inf where the scale is 0, so that the half flushes to 0."""
        scale = self.type.decode(stored)
        if tensor_scale is not None:
            scale = scale * tensor_scale
        return np.where(scale == 0, np.float32(np.inf), scale)


E5M2_OF_SIXTH = ScaleRule(scales.E5M2)
E4M3_OF_SIXTH = ScaleRule(scales.E4M3)
E4M3_480_OF_SIXTH = ScaleRule(scales.E4M3_480)
E4M3_WITH_TENSOR = ScaleRule(scales.E4M3, tensor_scaled=True)
POT = ScaleRule(scales.POWER_OF_TWO, Power.DOWN)
POT_R = ScaleRule(scales.POWER_OF_TWO, Power.NEAREST)
