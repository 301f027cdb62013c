"""NVFP4: E2M1 elements in groups of 16 under an E4M3 scale and one float32 for the tensor.

    t = max|tensor| / (6 * 448)      scale = E4M3(max|group| / 6 / t)      value = E2M1 * scale * t

For activations t is one float32 a row (token). Source: NVIDIA's two-level recipe, with t stored as
the multiplier; elements round ties away from zero here, where NVIDIA's converters round to even.
"""

from __future__ import annotations

from amx_tvm.formats import scale_rules
from amx_tvm.formats.mxfp4 import SymmetricE2M1
from amx_tvm.formats.registry import register

register(
    SymmetricE2M1(
        "nvfp4",
        "E2M1, E4M3 scale, float32 a tensor or row",
        scale_rules.E4M3_WITH_TENSOR,
        group_size=16,
    )
)
