"""Kernels around the products, by scheme: quantization of activations, RMSNorm, embedding rows.

The passes ask here; the hardware's own files answer.
"""

from __future__ import annotations

from typing import Any

from relax_passes.schedules.cpu import activations as cpu
from relax_passes.schedules.cpu.embedding import embedding

__all__ = ["embedding", "quantize", "rms_norm"]

rms_norm = cpu.rms_norm


def quantize(m: int | None, *, scheme: str, k: int, sums: bool, prologue: str, eps: float) -> Any:
    """Build the quantization of an activation [M, K].

    Parameters
    ----------
    m : int or None
        Rows; None compiles for any.
    scheme : str
        "int8" or "fp4:<format>".
    k, sums, prologue, eps
        As ``relax_passes.ops.QuantizeAttrs``.

    Returns
    -------
    tvm.tirx.PrimFunc
    """
    return cpu.quantize(k, m, scheme, sums, prologue, eps)
