"""Kernels on whole rows of x [m, K] float16: norms, GELU, and rounding to a four-bit format (W4A4).

One block a row. W4A4 on CUDA multiplies the values that the four-bit codes stand for: weights are
decoded to float16 in registers anyway, and float16 holds the rounded activations.
"""

from __future__ import annotations

import math

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from amx_tvm import formats

from ..intrinsics.base import hold, local
from ..intrinsics.sync import LAUNCH_DEPENDENTS, WAIT_PREREQUISITES
from .block import PIECE, Pieces, over_block
from .rounding import round_piece

_DEPENDENT = "tirx.use_programtic_dependent_launch"  # TVM 0.27's own spelling


def row_kernel(
    k: int,
    m: int | None,
    *,
    norm_eps: float | None = None,
    centred: bool = False,
    gelu: str = "",
    format_name: str = "",
    dependent: bool = False,
) -> tirx.PrimFunc:
    """Build y = round(gelu(norm(x))); arguments x [m, K], [weight, [bias]], y, all float16.

    Parameters
    ----------
    k, m : int
        Columns (a multiple of 8) and rows; None for any number of rows.
    norm_eps : float, optional
        Normalize by the root mean square of the row plus this, times weight [K].
    centred : bool
        LayerNorm: the row's mean is taken away before, and a bias [K] added.
    gelu : str
        "erf" or "tanh", the form of GELU; "" for none.
    format_name : str
        Four-bit format of the registry to round to; "" keeps float16.
    dependent : bool
        Programmatic dependent launch (sm_90 and later).

    Raises
    ------
    ValueError
        For a K that is no multiple of 8.
    """
    if k % PIECE:
        raise ValueError(f"rows of {k} numbers: a multiple of {PIECE} was expected")
    fmt = formats.get(format_name) if format_name else None
    warps = min(16, max(1, -(-k // PIECE // 32)))
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("rows")
            attrs: dict = {"tirx.noalias": True, "tirx.is_scheduled": True}
            if dependent:
                attrs["tirx.kernel_launch_params"] = [_DEPENDENT]
            T.func_attr(attrs)
            extent = tirx.Var("m", "int64") if m is None else m
            rows = tirx.const(m, "int32") if m is not None else tirx.Cast("int32", extent)
            x = T.arg("x", T.Buffer((extent, k), "float16"))
            names = ("weight", "bias")[: 1 + centred] if norm_eps is not None else ()
            factors = [T.arg(name, T.Buffer((k,), "float16")) for name in names]
            y = T.arg("y", T.Buffer((extent, k), "float16"))
            threads = [
                T.thread_binding(rows, thread="blockIdx.x"),
                T.thread_binding(warps * 32, thread="threadIdx.x"),
            ]
            with T.frame_scope(threads) as (row, tid):
                with T.sblock("rows"):
                    T.reads()
                    T.writes()
                    if dependent:
                        LAUNCH_DEPENDENTS()
                        WAIT_PREREQUISITES()
                    _row(x, factors, y, row, tid, warps, norm_eps, gelu, fmt)
    return builder.get().without_attr("global_symbol")


def _row(x, factors, y, row, tid, warps: int, norm_eps, gelu: str, fmt) -> None:  # noqa: ANN001
    """Emit one row's work; its numbers stay in registers from the first read on."""
    k = int(x.shape[1])
    pieces = Pieces(k // PIECE, warps * 32, tid)
    v = local(pieces.each * PIECE)
    for p in range(pieces.each):
        pieces.load(p, x, (row,), v, p * PIECE)
    if norm_eps is not None:
        if len(factors) > 1:
            _centre(v, k, pieces, warps, tid)
        inverse = _inverse_rms(v, k, norm_eps, warps, tid)
        w = [local(PIECE) for _ in factors]
        for p in range(pieces.each):
            for factor, piece in zip(factors, w, strict=True):
                pieces.load(p, factor, (), piece, 0)
            for j in range(PIECE):
                i = p * PIECE + j
                scaled = v[i] * (inverse * w[0][j])
                T.buffer_store(v, scaled + w[1][j] if len(w) > 1 else scaled, [i])
    if gelu:
        for i in range(pieces.each * PIECE):
            T.buffer_store(v, _gelu(v[i], gelu), [i])
    scale = None
    if fmt is not None and fmt.row_scaled:
        largest = tirx.const(0.0, "float32")
        for i in range(pieces.each * PIECE):
            largest = tirx.max(largest, tirx.abs(v[i]))
        largest = over_block(hold(largest), warps, tid, tirx.max)
        scale = hold(largest / tirx.const(6.0 * 448.0, "float32"))
    for p in range(pieces.each):
        if fmt is not None:
            round_piece(v, p * PIECE, fmt, scale)
        pieces.store(p, y, (row,), v, p * PIECE)


def _inverse_rms(v, k: int, eps: float, warps: int, tid) -> tirx.Expr:  # noqa: ANN001
    """1 / sqrt(mean of squares + eps) of a row of k numbers."""
    total = local(1)
    T.buffer_store(total, tirx.const(0.0, "float32"), [0])
    for i in range(int(v.shape[0])):
        T.buffer_store(total, total[0] + v[i] * v[i], [0])
    squares = over_block(total[0], warps, tid, lambda a, b: a + b)
    mean = squares / tirx.const(k, "float32")
    return hold(tirx.rsqrt(mean + tirx.const(eps, "float32")))


def _centre(v, k: int, pieces: Pieces, warps: int, tid) -> None:  # noqa: ANN001
    """Take the mean of a row of k numbers from each; what lies beyond its end stays 0."""
    total = local(1)
    T.buffer_store(total, tirx.const(0.0, "float32"), [0])
    for i in range(int(v.shape[0])):
        T.buffer_store(total, total[0] + v[i], [0])
    total = over_block(total[0], warps, tid, lambda a, b: a + b)
    mean = hold(total / tirx.const(k, "float32"))
    for p in range(pieces.each):
        whole = (p + 1) * pieces.threads <= pieces.count
        inside = tid + p * pieces.threads < pieces.count
        for i in range(p * PIECE, (p + 1) * PIECE):
            left = v[i] - mean
            zero = tirx.const(0.0, "float32")
            T.buffer_store(v, left if whole else tirx.Select(inside, left, zero), [i])


def _gelu(x: tirx.Expr, form: str) -> tirx.Expr:
    """GELU of a float32 number, by the error function or by tanh."""

    def c(value: float) -> tirx.Expr:
        return tirx.const(value, "float32")

    if form == "erf":
        inner = tirx.erf(x * c(0.5**0.5))
    else:
        inner = tirx.tanh(c((2 / math.pi) ** 0.5) * (x + c(0.044715) * x * x * x))
    return c(0.5) * x * (c(1.0) + inner)
