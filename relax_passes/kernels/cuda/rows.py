"""Kernels on whole rows of x [m, K] float16: RMSNorm, and rounding to a four-bit format (W4A4).

One block a row. W4A4 on CUDA multiplies the values that the four-bit codes stand for: weights are
decoded to float16 in registers anyway, and float16 holds the rounded activations.
"""

from __future__ import annotations

from zlib import crc32

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from .intrinsics import at, call
from .rows_text import ROWS, format_text

_DEPENDENT = "tirx.use_programtic_dependent_launch"  # TVM 0.27's own spelling
PIECE = 8  # numbers of a 16-byte access


def row_kernel(
    k: int,
    m: int | None,
    *,
    norm_eps: float | None = None,
    format_name: str = "",
    dependent: bool = False,
) -> tirx.PrimFunc:
    """Build y = round(norm(x)); arguments x [m, K], [weight [K]], y [m, K], all float16.

    Parameters
    ----------
    k, m : int
        Columns (a multiple of 8) and rows; None for any number of rows.
    norm_eps : float, optional
        Normalize by the root mean square of the row plus this, times weight.
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
    warps = min(16, max(1, -(-k // PIECE // 32)))
    name, text = _row_text(k, warps, norm_eps, format_name, dependent)
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
            weight = None
            if norm_eps is not None:
                weight = T.arg("weight", T.Buffer((k,), "float16"))
            y = T.arg("y", T.Buffer((extent, k), "float16"))
            threads = [
                T.thread_binding(rows, thread="blockIdx.x"),
                T.thread_binding(warps * 32, thread="threadIdx.x"),
            ]
            with T.frame_scope(threads) as (row, tid):
                with T.sblock("rows"):
                    T.reads()
                    T.writes()
                    zero = tirx.const(0, "int32")
                    shared = T.sblock_alloc_buffer((2 * warps,), "float32", scope="shared")
                    T.buffer_store(shared, tirx.const(0.0, "float32"), [2 * warps - 1])
                    w = at(x, row, zero) if weight is None else at(weight, zero)
                    call(name, at(x, row, zero), w, at(y, row, zero), at(shared, 0), tid, text=text)
    return builder.get().without_attr("global_symbol")


def _row_text(
    k: int, warps: int, norm_eps: float | None, format_name: str, dependent: bool
) -> tuple[str, str]:
    """Name and text of the function of a block."""
    text, scaled = ROWS, False
    rounding = ""
    if format_name:
        from amx_tvm import formats

        fmt = formats.get(format_name)
        rounding = "amx_round_" + "".join(c if c.isalnum() else "_" for c in format_name)
        text, scaled = format_text(fmt, rounding), fmt.row_scaled
    ident = crc32(repr((k, warps, norm_eps, format_name, dependent)).encode())
    name = f"amx_row_{ident:08x}"
    pieces = -(-k // PIECE // (warps * 32))
    steps = []
    if dependent:
        steps += ["  amx_launch_dependents();", "  amx_wait_prerequisites();"]
    if norm_eps is not None:
        steps.append(
            f"  const float inverse = amx_inverse_rms<{k}, {warps}>(x, {norm_eps!r}f, shared, tid);"
        )
    steps.append(f"""  float v[{pieces}][8], largest = 0.f, row_scale = 1.f;
#pragma unroll
  for (int p = 0; p < {pieces}; ++p) {{
    const int i = tid + p * {warps * 32};
    amx_row_unpack(i < {k // PIECE} ? ((const uint4*)x)[i] : make_uint4(0u, 0u, 0u, 0u), v[p]);""")
    if norm_eps is not None:
        steps.append(f"""    float w[8];
    amx_row_unpack(i < {k // PIECE} ? ((const uint4*)weight)[i] : make_uint4(0u, 0u, 0u, 0u), w);
    for (int j = 0; j < 8; ++j) v[p][j] *= inverse * w[j];""")
    if scaled:
        steps.append("    for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fabsf(v[p][j]));")
    steps.append("  }")
    if scaled:
        largest = f"amx_row_reduce<{warps}, true>(largest, shared + {warps}, tid)"
        steps.append(f"  row_scale = {largest} / {6.0 * 448.0!r}f;")
    steps.append(f"""#pragma unroll
  for (int p = 0; p < {pieces}; ++p) {{
    const int i = tid + p * {warps * 32};""")
    if rounding:
        steps.append(f"    {rounding}(v[p], row_scale);")
    steps.append(f"    if (i < {k // PIECE}) ((uint4*)y)[i] = amx_row_pack(v[p]);\n  }}")
    body = "\n".join(steps)
    signature = "const void* x, const void* weight, void* y, float* shared, int tid"
    return (
        name,
        f"""{text}
#ifndef {name.upper()}
#define {name.upper()}
__device__ __forceinline__ void {name}({signature}) {{
{body}
}}
#endif
""",
    )
