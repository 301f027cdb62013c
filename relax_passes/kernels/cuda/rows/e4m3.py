# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""x [m, K] float16 as bytes of E4M3 under one float32 scale a row.

    scale = max |x| / 448,   code = E4M3(x * (448 / max |x|)), nearest, ties to even

(amx_tvm.formats.e4m3.round_rows is the oracle). Columns c and c + 8 of 16 take turns in the codes,
the order of the products (intrinsics/e4m3.py). A row of zeros has scale 0; NaN or Inf in a row
makes all of its products NaN.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from amx_tvm.formats.e4m3 import LARGEST_E4M3

from ..intrinsics.base import Intrinsic, at
from ..intrinsics.sync import LAUNCH_DEPENDENTS, WAIT_PREREQUISITES

_DEPENDENT = "tirx.use_programtic_dependent_launch"  # TVM 0.27's own spelling
PIECE = 16  # columns of a thread

PACK_E4M3 = Intrinsic(
    "amx_pack_e4m3",
    """
  unsigned short low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return (unsigned)high << 16 | low;""",
    signature="unsigned(float a, float b, float c, float d)",
)
ROUND_ROW = Intrinsic(
    "amx_round_row",
    f"""
  constexpr int COUNT = K / {PIECE}, EACH = (COUNT + WARPS * 32 - 1) / (WARPS * 32);
  uint4 words[EACH][2];
  __half2 found = __float2half2_rn(0.0f);
#pragma unroll
  for (int p = 0; p < EACH; ++p) {{
    const int piece = tid + p * WARPS * 32;
    words[p][0] = words[p][1] = make_uint4(0u, 0u, 0u, 0u);
    if (piece < COUNT) {{
      words[p][0] = ((const uint4*)x)[2 * piece];
      words[p][1] = ((const uint4*)x)[2 * piece + 1];
    }}
    const __half2* v = (const __half2*)words[p];
#pragma unroll
    for (int j = 0; j < 8; ++j) found = __hmax2(found, __habs2(v[j]));
  }}
  float largest = fmaxf(__low2float(found), __high2float(found));
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, mask));
  if (WARPS > 1) {{
    __shared__ float parts[WARPS];
    if (tid % 32 == 0) parts[tid / 32] = largest;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < WARPS; ++i) largest = fmaxf(largest, parts[i]);
  }}
  const float inverse = largest > 0.0f ? {LARGEST_E4M3}f / largest : 0.0f;
  if (tid == 0) *(float*)scale = largest / {LARGEST_E4M3}f;
#pragma unroll
  for (int p = 0; p < EACH; ++p) {{
    const int piece = tid + p * WARPS * 32;
    const __half2 *low = (const __half2*)&words[p][0], *high = (const __half2*)&words[p][1];
    unsigned out[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {{  // columns 2 j, 2 j + 8, 2 j + 1, 2 j + 9
      const float2 a = __half22float2(low[j]), b = __half22float2(high[j]);
      out[j] = amx_pack_e4m3(a.x * inverse, b.x * inverse, a.y * inverse, b.y * inverse);
    }}
    if (piece < COUNT) ((uint4*)codes)[piece] = make_uint4(out[0], out[1], out[2], out[3]);
  }}""",
    (PACK_E4M3,),
    "void(const void* x, void* codes, void* scale, int tid)",
    "int K, int WARPS",
)


def round_rows(k: int, m: int | None, *, least: int = 1, dependent: bool = False) -> tirx.PrimFunc:
    """Build the rounding; arguments x [m, K] float16, codes [m, K] uint8, scales [m] float32.

    Parameters
    ----------
    k, m : int
        Columns (a multiple of 16) and rows; None for any number of rows.
    least : int
        With fewer rows nothing is launched: nobody reads the results.
    dependent : bool
        Programmatic dependent launch (sm_90 and later).

    Raises
    ------
    ValueError
        For a K that is no multiple of 16.
    """
    if k % PIECE:
        raise ValueError(f"rows of {k} numbers: a multiple of {PIECE} was expected")
    warps = min(16, max(1, -(-k // PIECE // 32)))
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("round_rows")
            attrs: dict = {"tirx.noalias": True, "tirx.is_scheduled": True}
            if dependent:
                attrs["tirx.kernel_launch_params"] = [_DEPENDENT]
            T.func_attr(attrs)
            extent = tirx.Var("m", "int64") if m is None else m
            rows = tirx.const(m, "int32") if m is not None else tirx.Cast("int32", extent)
            x = T.arg("x", T.Buffer((extent, k), "float16"))
            codes = T.arg("codes", T.Buffer((extent, k), "uint8"))
            scales = T.arg("scales", T.Buffer((extent,), "float32"))

            def launch() -> None:
                threads = [
                    T.thread_binding(rows, thread="blockIdx.x"),
                    T.thread_binding(warps * 32, thread="threadIdx.x"),
                ]
                with T.frame_scope(threads) as (row, tid):
                    with T.sblock("rows"):
                        T.reads()
                        T.writes()
                        if dependent:  # products launched sooner would take others' place
                            WAIT_PREREQUISITES()
                            LAUNCH_DEPENDENTS()
                        zero = tirx.const(0, "int32")
                        places = at(x, row, zero), at(codes, row, zero), at(scales, row)
                        ROUND_ROW[k, warps](*places, tid)

            if m is not None and m < least:
                T.evaluate(tirx.const(0, "int32"))
            elif m is not None:
                launch()
            else:
                with T.If(rows >= least):
                    with T.Then():
                        launch()
    return builder.get().without_attr("global_symbol")
