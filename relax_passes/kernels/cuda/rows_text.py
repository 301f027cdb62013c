# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""CUDA text of work on whole rows of x: RMSNorm, and rounding to a four-bit format.

A block owns a row; a thread holds pieces of 8 consecutive numbers, so a group of 32 is four
neighbouring lanes, one of 16 two. Rounding follows ``amx_tvm.formats`` bit for bit in float32:
extrema of the group, the scale rule, true division, ties away from zero. What is written is the
value that the code and scale stand for, as float16: exact except where a format has a float32 scale
a row, whose products are rounded once.
"""

from __future__ import annotations

from amx_tvm.formats.scale_rules import Power

from .intrinsics import TEXT

ROWS = (
    TEXT
    + r"""
#ifndef AMX_ROWS
#define AMX_ROWS
__device__ __forceinline__ void amx_row_unpack(uint4 w, float* v) {
  const unsigned u[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 f = __half22float2(amx_h2(u[i]));
    v[2 * i] = f.x; v[2 * i + 1] = f.y;
  }
}
__device__ __forceinline__ uint4 amx_row_pack(const float* v) {
  unsigned u[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) u[i] = amx_u32(__floats2half2_rn(v[2 * i], v[2 * i + 1]));
  return make_uint4(u[0], u[1], u[2], u[3]);
}
// Sum (or, with MAX, maximum) over the block; `shared` holds a float a warp and is free before.
template <int WARPS, bool MAX>
__device__ __forceinline__ float amx_row_reduce(float v, float* shared, int tid) {
#pragma unroll
  for (int mask = 16; mask; mask >>= 1) {
    const float other = __shfl_xor_sync(0xffffffffu, v, mask);
    v = MAX ? fmaxf(v, other) : v + other;
  }
  if ((tid & 31) == 0) shared[tid >> 5] = v;
  __syncthreads();
  v = shared[0];
#pragma unroll
  for (int w = 1; w < WARPS; ++w) v = MAX ? fmaxf(v, shared[w]) : v + shared[w];
  return v;
}
// 1 / sqrt(mean of squares + eps) of a row of K numbers.
template <int K, int WARPS>
__device__ __forceinline__ float amx_inverse_rms(const void* x, float eps, float* shared, int tid) {
  float sum = 0.f, v[8];
#pragma unroll 4
  for (int i = tid; i < K / 8; i += WARPS * 32) {
    amx_row_unpack(((const uint4*)x)[i], v);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += v[j] * v[j];
  }
  return rsqrtf(amx_row_reduce<WARPS, false>(sum, shared, tid) / K + eps);
}
// -- four-bit formats
template <int MANTISSA, int BIAS>
__device__ __forceinline__ float amx_row_minifloat(float value, float limit) {
  constexpr int drop = 23 - MANTISSA;
  const float least = exp2f((float)(1 - BIAS)), step = exp2f((float)(1 - BIAS - MANTISSA));
  const unsigned word = __float_as_uint(value) + (1u << (drop - 1));
  const float normal = __uint_as_float((word >> drop) << drop);
  const float below = (float)(int)(fminf(value, least) / step + 0.49999997f) * step;
  return fminf(value < least ? below : normal, limit);
}
// 2^(exponent of the maximum - 2); UP rounds the exponent up from 1.5 on.
template <bool UP>
__device__ __forceinline__ float amx_row_power(float largest) {
  const int word = __float_as_int(largest);
  int exponent = (word >> 23) - 2;
  if (UP && (word & 0x7fffff) >= 0x600000) ++exponent;
  exponent = max(min(exponent, 252), 0);
  return __int_as_float(max(exponent << 23, 1 << 22));
}
// E2M1 magnitude of a ratio >= 0, ties away from zero.
__device__ __forceinline__ float amx_row_e2m1(float r) {
  return 0.5f * (float)((r >= 0.25f) + (r >= 0.75f) + (r >= 1.25f) + (r >= 1.75f)) +
         (float)((r >= 2.5f) + (r >= 3.5f) + 2 * (r >= 5.f));
}
template <int LANES>
__device__ __forceinline__ float amx_row_group_max(float v) {
#pragma unroll
  for (int mask = 1; mask < LANES; mask <<= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, mask));
  return v;
}
#endif
"""
)


def format_text(fmt, name: str) -> str:
    """Write ``<name>(v, row_scale)``: round eight numbers of a lane to a format of the registry."""
    rule, two = fmt.rounding_of("activations"), len(fmt.scale_tensors) == 2
    kind = rule.type
    if rule.power is not Power.NONE:
        scale = f"amx_row_power<{str(rule.power is Power.NEAREST).lower()}>({{m}})"
    else:
        limit = float(kind.values[kind.largest])
        maximum = "{m} / 6.0f"
        if fmt.row_scaled:
            maximum = "(row_scale == 0.f ? 0.f : {m} / 6.0f / row_scale)"
        scale = f"amx_row_minifloat<{kind.mantissa_bits}, {kind.bias}>({maximum}, {limit!r}f)"
    if fmt.row_scaled:
        scale = f"{scale} * row_scale"
    lanes = fmt.group_size // 8
    if two:
        body = f"""  float high = 0.f, depth = 0.f;
#pragma unroll
  for (int j = 0; j < 8; ++j) {{ high = fmaxf(high, v[j]); depth = fmaxf(depth, -v[j]); }}
  high = amx_row_group_max<{lanes}>(high);
  depth = amx_row_group_max<{lanes}>(depth);
  const float p = {scale.format(m="high")}, n = {scale.format(m="depth")};"""
        choose = "v[j] < 0.f ? n : p"
    else:
        body = f"""  float high = 0.f;
#pragma unroll
  for (int j = 0; j < 8; ++j) high = fmaxf(high, fabsf(v[j]));
  high = amx_row_group_max<{lanes}>(high);
  const float p = {scale.format(m="high")};"""
        choose = "p"
    return f"""{ROWS}
#ifndef {name.upper()}
#define {name.upper()}
__device__ __forceinline__ void {name}(float* v, float row_scale) {{
{body}
#pragma unroll
  for (int j = 0; j < 8; ++j) {{
    const float s = {choose};
    const float q = s == 0.f ? 0.f : amx_row_e2m1(fabsf(v[j]) / s) * s;
    v[j] = v[j] < 0.f ? -q : q;
  }}
}}
#endif
"""
