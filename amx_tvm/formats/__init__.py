"""Number formats: quantize, dequantize, decode terms for kernels, and packed layouts.

    fmt = formats.get("amxfp4")
    quantized = fmt.quantize(weight)          # codes, stored scales
    restored = fmt.dequantize(quantized)      # float32
    arrays = packing.pack(fmt, quantized, "tile16x32")

A format is one file here that registers itself; importing this package registers them all. NumPy
is the only dependency; the TIR decode imports TVM when it is asked for.
"""

from __future__ import annotations

import numpy as np

# The order of the first five is the order in which tables list the formats.
from amx_tvm.formats import (  # isort: skip
    amxfp4,  # noqa: F401
    mxfp4,  # noqa: F401
    nvfp4,  # noqa: F401
    int4,  # noqa: F401
    int8,  # noqa: F401
    packing,
    tile16x32,  # noqa: F401
    dense16,  # noqa: F401
    cuda_layout,  # noqa: F401
    e4m3,  # noqa: F401
)
from amx_tvm.formats.base import Format
from amx_tvm.formats.data import DecodeTerm, Quantized, ScaleTensor, concatenate
from amx_tvm.formats.registry import FormatSummary, get, names, register, summary

__all__ = [
    "DecodeTerm",
    "Format",
    "FormatSummary",
    "Quantized",
    "ScaleTensor",
    "concatenate",
    "get",
    "names",
    "packing",
    "quantize_dequantize",
    "register",
    "summary",
]


def quantize_dequantize(
    fmt: str | Format, array: np.ndarray, *, name: str | None = None, activation: bool = False
) -> np.ndarray:
    """Round an array [..., K] to a format's values: `Format.quantize_dequantize` by name."""
    return get(fmt).quantize_dequantize(array, name=name, activation=activation)
