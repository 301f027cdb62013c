"""Kernels around the products, by scheme: quantization of activations, RMSNorm, embedding rows.

The passes ask here; the hardware's own files answer.
"""

from __future__ import annotations

from typing import Any

from relax_passes.activation import E4M3_ROWS, Activation, Scheme
from relax_passes.kernels.base import TargetInfo
from relax_passes.kernels.cpu import activations as cpu
from relax_passes.kernels.cpu import embedding as cpu_table
from relax_passes.kernels.cpu import layer_norm as cpu_layer_norm
from relax_passes.kernels.cpu import pool as cpu_pool
from relax_passes.kernels.cuda.rows import embedding as cuda_table
from relax_passes.kernels.cuda.rows import pool as cuda_pool
from relax_passes.kernels.cuda.rows.e4m3 import round_rows
from relax_passes.kernels.cuda.rows.kernels import PIECE as ROW_PIECE
from relax_passes.kernels.cuda.rows.kernels import row_kernel
from relax_passes.ops import EmbeddingAttrs

__all__ = ["ROW_PIECE", "compute_type", "embedding", "mean_rows", "on_rows", "quantize", "rms_norm"]


def compute_type(target: Any) -> str:
    """Type of the activations on a target."""
    return "float16" if TargetInfo.of(target).kind == "cuda" else "float32"


def _dependent(target: Any) -> bool:
    gpu = TargetInfo.of(target).gpu
    return gpu is not None and gpu.clusters


def rms_norm(k: int, m: int | None, eps: float, target: Any) -> Any:
    """Build y = x / sqrt(mean(x^2) + eps) * weight; arguments x [M, K], weight [K], y [M, K]."""
    if compute_type(target) == "float16":
        return row_kernel(k, m, norm_eps=eps, dependent=_dependent(target))
    return cpu.rms_norm(k, m, eps)


def on_rows(kind: str, k: int, m: int | None, eps: float | None, target: Any) -> Any:
    """Build what is done with rows [M, K] between linears.

    Parameters
    ----------
    kind : str
        "layer_norm" (arguments x, weight and bias [K], y), "gelu" or "gelu_tanh" (x, y).
    k, m, eps
        K; M, None for any; LayerNorm's epsilon.
    target : tvm.target.Target
        What the kernel is made for.
    """
    if compute_type(target) == "float16":
        form = {"gelu": "erf", "gelu_tanh": "tanh"}.get(kind, "")
        dependent = _dependent(target)
        return row_kernel(
            k, m, norm_eps=eps, centred=eps is not None, gelu=form, dependent=dependent
        )
    if kind != "layer_norm":
        return cpu.gelu_rows(k, m, kind)
    return cpu_layer_norm.layer_norm(k, m, eps or 0.0)


def mean_rows(k: int, target: Any) -> Any:
    """Build the means of spans of rows; arguments x [M, K], spans int32 [n, 2], means [n, K]."""
    pool = cuda_pool if compute_type(target) == "float16" else cpu_pool
    return pool.mean_rows(k)


def embedding(attrs: EmbeddingAttrs, m: int | None, target: Any) -> Any:
    """Build the lookup of rows of a packed table; arguments ids int32 [M], its parts, y [M, K]."""
    size = attrs.rows, attrs.k, attrs.format, m
    if compute_type(target) == "float16":
        return cuda_table.embedding(*size)
    return cpu_table.embedding(*size, attrs.out_dtype)


def quantize(
    m: int | None,
    target: Any,
    *,
    scheme: Activation,
    k: int,
    sums: bool,
    prologue: str,
    eps: float,
    source: str = "float32",
) -> Any:
    """Build the quantization of an activation [M, K].

    Parameters
    ----------
    m : int or None
        Rows; None compiles for any.
    target : tvm.target.Target
        What the kernel is made for.
    scheme : Activation
        Integers or four bits on CPUs, rounded values or E4M3 on CUDA.
    k, sums, prologue, eps
        As ``relax_passes.ops.QuantizeAttrs``.
    source : str
        Type of the activation on CPUs.

    Returns
    -------
    tvm.tirx.PrimFunc
    """
    if scheme.scheme is Scheme.ROUNDED:
        norm_eps = eps if prologue == "rms_norm" else None
        name, dependent = scheme.format, _dependent(target)
        return row_kernel(k, m, norm_eps=norm_eps, format_name=name, dependent=dependent)
    if scheme.scheme is Scheme.E4M3:
        return round_rows(k, m, least=E4M3_ROWS, dependent=_dependent(target))
    return cpu.quantize(k, m, scheme, sums, prologue, eps, source)
