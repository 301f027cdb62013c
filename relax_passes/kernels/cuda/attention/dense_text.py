# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""CUDA text of attention between rows that are all there: no cache, no pages.

64 queries of one head at a time, over all keys that they see, in tiles of BN keys:

    Q   shared memory [64][D + 8]     K, V   [2][BN][D + 8] each

Channels are contiguous in q, k and v; a step leads from a row to the next. Channels from C to D are
zeros. The padding spreads eight rows over all banks, for ldmatrix and the 16-byte copies alike. Each
of four warps owns 16 queries; softmax is online, probabilities stay in registers.
"""

from __future__ import annotations

from relax_passes.kernels.cuda.intrinsics.arithmetic import PACK_HALF2
from relax_passes.kernels.cuda.intrinsics.base import Intrinsic, Source
from relax_passes.kernels.cuda.intrinsics.memory import (
    COPY16,
    COPY_COMMIT,
    COPY_WAIT,
    MATRIX,
    MATRIX_TURNED,
    SHARED_ADDRESS,
)
from relax_passes.kernels.cuda.intrinsics.mma import MMA

QUERIES = 64  # of a block

DENSE = Source(
    "amx_attend_dense_text",
    r"""
// What one block attends to: the first row of its text (of its head) in q, k and v, and how many rows
// each has. Bias is float16, [rows][keys] with a step of its own, or null.
struct AmxDense {
  const half *q, *k, *v, *bias;
  half* out;
  int q_step, k_step, v_step, out_step, bias_step, rows, keys;
};

template <int D, int C, int BN, bool BIASED, bool CAUSAL>
__device__ __forceinline__ void amx_attend_rows(float* shared, const AmxDense x, int tile, float scale, float cap, int window,
                                                int warp, int lane) {
  constexpr int ROW = D + 8, NT = BN / 8, CHUNKS = D / 8;
  constexpr float NONE = -1e30f, LOG2E = 1.44269504f;
  half* qs = (half*)shared;
  half* ks = qs + 64 * ROW;
  half* vs = ks + 2 * BN * ROW;
  const int tid = warp * 32 + lane, g = lane >> 2, t = lane & 3, m0 = tile * 64;
  const int begin = window > 0 ? max(0, m0 - window + 1) / BN * BN : 0;
  const int end = CAUSAL ? min(x.keys, m0 + 64) : window > 0 ? min(x.keys, m0 + 63 + window) : x.keys;

  auto request = [&](int n, int stage) {
    for (int i = tid; i < BN * CHUNKS; i += 128) {
      const int token = i / CHUNKS, c = i % CHUNKS, at = n + token;
      const bool inside = at < x.keys && c * 8 < C;
      const int to = (stage * BN + token) * ROW + c * 8;
      amx_copy16_cg(amx_smem(ks + to), inside ? x.k + (long long)at * x.k_step + c * 8 : x.k, inside);
      amx_copy16_cg(amx_smem(vs + to), inside ? x.v + (long long)at * x.v_step + c * 8 : x.v, inside);
    }
    amx_copy_commit();
  };

  for (int i = tid; i < 64 * CHUNKS; i += 128) {
    const int r = i / CHUNKS, c = i % CHUNKS, row = m0 + r;
    const bool inside = row < x.rows && c * 8 < C;
    amx_copy16_cg(amx_smem(qs + r * ROW + c * 8), inside ? x.q + (long long)row * x.q_step + c * 8 : x.q, inside);
  }
  request(begin, 0);
  float o[D / 8][4], top[2] = {NONE, NONE}, sum[2] = {0.f, 0.f};
#pragma unroll
  for (int i = 0; i < D / 8; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.f;
  const int mi = lane >> 3, r8 = lane & 7;
  const int at0 = m0 + warp * 16 + g;  // the lane's first query

  int stage = 0;
  for (int n = begin; n < end; n += BN, stage ^= 1) {
    if (n + BN < end) {
      request(n + BN, stage ^ 1);
      amx_copy_wait<1>();
    } else {
      amx_copy_wait<0>();
    }
    __syncthreads();
    const half* kt = ks + stage * BN * ROW;
    const half* vt = vs + stage * BN * ROW;
    float s[NT][4];
#pragma unroll
    for (int i = 0; i < NT; ++i) s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0.f;
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      unsigned a[4];
      amx_matrix4(a, amx_smem(qs + (warp * 16 + (mi & 1) * 8 + r8) * ROW + step * 16 + (mi >> 1) * 8));
#pragma unroll
      for (int i = 0; i < NT / 2; ++i) {
        unsigned b[4];
        amx_matrix4(b, amx_smem(kt + (i * 16 + (mi >> 1) * 8 + r8) * ROW + step * 16 + (mi & 1) * 8));
        amx_mma(s[2 * i], a, b[0], b[1]);
        amx_mma(s[2 * i + 1], a, b[2], b[3]);
      }
    }
    float high[2] = {NONE, NONE};
#pragma unroll
    for (int i = 0; i < NT; ++i)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int key = n + 8 * i + 2 * t + (c & 1), query = at0 + 8 * (c >> 1);
        float v = s[i][c] * scale;
        if (cap > 0.f) v = cap * LOG2E * tanhf(v / cap);
        if (BIASED && key < x.keys && query < x.rows)
          v += __half2float(x.bias[(long long)query * x.bias_step + key]) * LOG2E;
        const bool seen = key < x.keys && (!CAUSAL || key <= query) &&
                          (window <= 0 || (key > query - window && key < query + window));
        v = seen ? v : NONE;
        s[i][c] = v;
        high[c >> 1] = fmaxf(high[c >> 1], v);
      }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      high[h] = fmaxf(high[h], __shfl_xor_sync(0xffffffffu, high[h], 1));
      high[h] = fmaxf(high[h], __shfl_xor_sync(0xffffffffu, high[h], 2));
      high[h] = fmaxf(high[h], top[h]);
      const float fade = exp2f(top[h] - high[h]);
      top[h] = high[h];
      sum[h] *= fade;
#pragma unroll
      for (int i = 0; i < NT; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          // a row without any key yet has top NONE: its masked scores must not count as 2^0
          const float v = s[i][2 * h + e], p = v > 0.5f * NONE ? exp2f(v - top[h]) : 0.f;
          s[i][2 * h + e] = p;
          sum[h] += p;
        }
#pragma unroll
      for (int i = 0; i < D / 8; ++i) { o[i][2 * h] *= fade; o[i][2 * h + 1] *= fade; }
    }
#pragma unroll
    for (int j = 0; j < BN / 16; ++j) {
      const unsigned p[4] = {
          amx_pack_half2(s[2 * j][0], s[2 * j][1]), amx_pack_half2(s[2 * j][2], s[2 * j][3]),
          amx_pack_half2(s[2 * j + 1][0], s[2 * j + 1][1]), amx_pack_half2(s[2 * j + 1][2], s[2 * j + 1][3])};
#pragma unroll
      for (int i = 0; i < D / 16; ++i) {
        unsigned b[4];
        amx_matrix_turned4(b, amx_smem(vt + (j * 16 + (mi & 1) * 8 + r8) * ROW + i * 16 + (mi >> 1) * 8));
        amx_mma(o[2 * i], p, b[0], b[1]);
        amx_mma(o[2 * i + 1], p, b[2], b[3]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
    sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
    const int row = m0 + warp * 16 + g + 8 * h;
    if (row >= x.rows) continue;
    const float inverse = sum[h] > 0.f ? 1.f / sum[h] : 0.f;  // a row without any key is zero
#pragma unroll
    for (int i = 0; i < D / 8; ++i)
      if (8 * i + 2 * t < C)
        *(half2*)(x.out + (long long)row * x.out_step + 8 * i + 2 * t) =
            __floats2half2_rn(o[i][2 * h] * inverse, o[i][2 * h + 1] * inverse);
  }
}
""",
    (MMA, PACK_HALF2, SHARED_ADDRESS, COPY16, COPY_COMMIT, COPY_WAIT, MATRIX[4], MATRIX_TURNED),
)
# Rows of any number of texts that lie one behind the other, in qkv [rows][HEADS + 2 KV][C]: block
# `block` takes the tile of that number over all texts, or none where there are fewer.
ATTEND_TEXTS = Intrinsic(
    "amx_attend_texts",
    """
  const int* ends = (const int*)bounds;
  for (int base = 0; base < texts; base += 32) {
    const int c = base + lane;
    const int first = c < texts ? ends[c] : 0, rows = c < texts ? ends[c + 1] - first : 0;
    int until = (rows + 63) >> 6;
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
      const int before = __shfl_up_sync(0xffffffffu, until, step);
      if (lane >= step) until += before;
    }
    const unsigned found = __ballot_sync(0xffffffffu, block < until);
    if (found) {
      const int who = __ffs(found) - 1;
      const int start = __shfl_sync(0xffffffffu, first, who), count = __shfl_sync(0xffffffffu, rows, who);
      const int left = __shfl_sync(0xffffffffu, until, who) - 1 - block;  // the longest first, where causal
      constexpr int STEP = (HEADS + 2 * KV) * C;
      const half* row = (const half*)qkv + (long long)start * STEP;
      const half *k = row + (HEADS + head / (HEADS / KV)) * C;
      half* to = (half*)out + ((long long)start * HEADS + head) * C;
      amx_attend_rows<D, C, BN, false, CAUSAL>(
          shared, {row + head * C, k, k + KV * C, nullptr, to, STEP, STEP, STEP, HEADS * C, 0, count, count}, left,
          scale, cap, window, warp, lane);
      return;
    }
    block -= __shfl_sync(0xffffffffu, until, 31);
  }""",
    (DENSE,),
    "void(float* shared, const void* qkv, const void* bounds, void* out, int texts, float scale, float cap, int window, "
    "int block, int head, int warp, int lane)",
    "int D, int C, int HEADS, int KV, int BN, bool CAUSAL",
)
# Rows of one of several examples, wherever its head's q, k and v begin.
ATTEND_EXAMPLE = Intrinsic(
    "amx_attend_example",
    """
  amx_attend_rows<D, C, BN, BIASED, CAUSAL>(
      shared, {(const half*)q, (const half*)k, (const half*)v, (const half*)bias, (half*)out, q_step, k_step, v_step,
               out_step, bias_step, rows, keys}, tile, scale, 0.f, 0, warp, lane);""",
    (DENSE,),
    "void(float* shared, const void* q, const void* k, const void* v, const void* bias, void* out, int q_step, int k_step, "
    "int v_step, int out_step, int bias_step, int rows, int keys, int tile, float scale, int warp, int lane)",
    "int D, int C, int BN, bool BIASED, bool CAUSAL",
)


def shared_floats(d: int, tokens: int) -> int:
    """Floats of shared memory that ``amx_attend_rows`` lays out with tiles of `tokens`."""
    return (64 + 4 * tokens) * (d + 8) // 2
