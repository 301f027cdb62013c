# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""CUDA text of attention over chunks of new tokens of any number of sequences.

Two kernels: one rotates queries and keys and stores keys and values in their pages, the other
attends, 64 queries of one head and one sequence at a time, over all pages of the sequence, in tiles
of BN tokens:

    Q   shared memory [64][D + 8]            K   [2][BN][D + 8]
    V   [2][BN / 16][D][24]: a page as it is stored, [d][16 tokens], rows padded to 48 bytes

The padding spreads eight rows over all banks, for ldmatrix and the 16-byte copies alike. Each of
four warps owns 16 queries; softmax is online, probabilities stay in registers.
"""

from __future__ import annotations

from relax_passes.kernels.cuda.intrinsics.arithmetic import PACK_HALF2
from relax_passes.kernels.cuda.intrinsics.base import Intrinsic, Source
from relax_passes.kernels.cuda.intrinsics.memory import (
    COPY16,
    COPY_COMMIT,
    COPY_WAIT,
    MATRIX,
    SHARED_ADDRESS,
)
from relax_passes.kernels.cuda.intrinsics.mma import MMA

from .state_text import NORM, SINK, STATE

PREFILL = Source(
    "amx_attend_prefill_text",
    r"""
// Sixteen rows of one head of q, k or v, 128 threads. Slots behind a sequence's last token become
// zero: tiles read whole pages, and what a product multiplies by zero must be finite.
template <int D, int C, int HEADS, int KV, int HALF, bool NORMED>
__device__ __forceinline__ void amx_attend_store(const void* qkv_, const void* state_, const void* q_norm, const void* k_norm,
                                                 float eps, void* q_, const float* frequencies, float factor, int layer,
                                                 int layers, int m, int block, int head, int tid) {
  constexpr int BLOCK = 16 * D;
  const half* qkv = (const half*)qkv_;
  const AmxState* state = (const AmxState*)state_;
  half* q = (half*)q_;
  const long long stride = (long long)layers * 2 * KV * BLOCK;
  const bool is_q = head < HEADS, is_v = head >= HEADS + KV;
  const int kv = is_q ? 0 : (head - HEADS) % KV;
  half* base = state->pages + ((long long)layer * 2 * KV + (is_v ? KV : 0) + kv) * BLOCK;
  __shared__ half normed[NORMED ? 16 * C : 2];
  if (NORMED && !is_v) {
    for (int t = tid >> 5; t < min(16, m - block * 16); t += 4)
      amx_norm_head<C>(normed + t * C, qkv + ((long long)(block * 16 + t) * (HEADS + 2 * KV) + head) * C,
                       is_q ? q_norm : k_norm, eps, tid & 31);
    __syncthreads();
  }
  for (int i = tid; i < 16 * D; i += 128) {
    // lanes run over tokens for v, which is stored token by token, over channels otherwise
    const int token = is_v ? i & 15 : i / D, e = is_v ? i >> 4 : i % D, row = block * 16 + token;
    if (row >= m) continue;
    const int position = state->positions[row], place = position & 15;
    const half* x = NORMED && !is_v ? normed + token * C : qkv + ((long long)row * (HEADS + 2 * KV) + head) * C;
    half value = e < C ? x[e] : __float2half_rn(0.f);
    if (!is_v && e < 2 * HALF) {
      const int f = e < HALF ? e : e - HALF;
      const float2 turn = amx_turn(position, frequencies[f], factor);
      const float mine = __half2float(value), other = __half2float(x[e < HALF ? e + HALF : f]);
      value = __float2half_rn(e < HALF ? mine * turn.x - other * turn.y : mine * turn.x + other * turn.y);
    }
    if (is_q) {
      q[((long long)row * HEADS + head) * D + e] = value;
      continue;
    }
    // the cache object tells the slots of several rows only; one row's page is in its list
    const int slot = m > 1 ? state->slots[row] : amx_page(amx_table<false>(state, 0, position), position >> 4) * 16 + place;
    half* target = base + (slot >> 4) * stride;
    target[is_v ? e * 16 + place : place * D + e] = value;
    if (is_v && (row == m - 1 || state->slots[row + 1] != slot + 1))
      for (int s = place + 1; s < 16; ++s) target[e * 16 + s] = __float2half_rn(0.f);
  }
}

// The rows of one tile's sequence, and which 64 of them the tile is; none behind the last tile.
struct AmxTile { int first, rows, tile; };

// Tile number `job` over all sequences, a sequence's longest tile first. A warp looks at 32 sequences
// at a time.
__device__ __forceinline__ AmxTile amx_tile(const AmxState* state, int job, int lane) {
  const int count = state->sequences;
  for (int base = 0; base < count; base += 32) {
    const int c = base + lane;
    const int first = c < count ? (state->rows ? state->rows[c] : c) : 0;
    const int rows = c < count ? (state->rows ? state->rows[c + 1] : c + 1) - first : 0;
    const int tiles = (rows + 63) >> 6;
    int until = tiles;
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
      const int before = __shfl_up_sync(0xffffffffu, until, step);
      if (lane >= step) until += before;
    }
    const unsigned found = __ballot_sync(0xffffffffu, job < until);
    if (found) {
      const int who = __ffs(found) - 1;
      const int left = __shfl_sync(0xffffffffu, until, who) - 1 - job;
      return {__shfl_sync(0xffffffffu, first, who), __shfl_sync(0xffffffffu, rows, who), left};
    }
    job -= __shfl_sync(0xffffffffu, until, 31);
  }
  return {0, 0, 0};
}

template <int D, int C, int G, int KV, int BN>
__device__ __forceinline__ void amx_attend_tile(float* shared, const AmxState* state, const void* q_, const void* sinks, void* out_,
                                                int layer, int layers, float scale, float cap, int window,
                                                AmxTile mine, int head, int warp, int lane) {
  constexpr int HEADS = G * KV, ROW = D + 8, BLOCK = 16 * D, NT = BN / 8, CHUNKS = D / 8;
  constexpr float NONE = -1e30f;
  const half* q = (const half*)q_ + (long long)mine.first * HEADS * D;
  half* out = (half*)out_ + (long long)mine.first * HEADS * C;
  half* qs = (half*)shared;
  half* ks = qs + 64 * ROW;
  half* vs = ks + 2 * BN * ROW;  // [2][BN / 16][D][24]
  const int tid = warp * 32 + lane, g = lane >> 2, t = lane & 3, m0 = mine.tile * 64, m = mine.rows;
  const int start = state->positions[mine.first], total = start + m;
  const AmxTable table = amx_table<false>(state, mine.first, start);
  const long long stride = (long long)layers * 2 * KV * BLOCK;
  const half* base = state->pages + ((long long)layer * 2 * KV + head / G) * BLOCK;
  const int begin = window > 0 ? max(0, start + m0 - window + 1) / BN * BN : 0;
  const int end = min(total, start + m0 + 64);

  auto request = [&](int n, int stage) {
    for (int i = tid; i < BN * CHUNKS; i += 128) {
      const int token = i / CHUNKS, c = i % CHUNKS, at = n + token;
      const half* src = at < total ? base + amx_page(table, at >> 4) * stride + (at & 15) * D + c * 8 : base;
      amx_copy16_cg(amx_smem(ks + (stage * BN + token) * ROW + c * 8), src, at < total);
    }
    for (int i = tid; i < BN * CHUNKS; i += 128) {
      const int page = i / (2 * D), e = i % (2 * D) / 2, c = i & 1, at = n + page * 16;
      const half* src = at < total ? base + amx_page(table, at >> 4) * stride + KV * BLOCK + e * 16 + c * 8 : base;
      half* dst = vs + ((stage * (BN / 16) + page) * D + e) * 24 + c * 8;
      amx_copy16_cg(amx_smem(dst), src, at < total);
    }
    amx_copy_commit();
  };

  for (int i = tid; i < 64 * CHUNKS; i += 128) {
    const int r = i / CHUNKS, c = i % CHUNKS, row = m0 + r;
    const half* src = row < m ? q + ((long long)row * HEADS + head) * D + c * 8 : q;
    amx_copy16_cg(amx_smem(qs + r * ROW + c * 8), src, row < m);
  }
  request(begin, 0);
  float o[D / 8][4], top[2] = {NONE, NONE}, sum[2] = {0.f, 0.f};
#pragma unroll
  for (int i = 0; i < D / 8; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.f;
  const int mi = lane >> 3, r8 = lane & 7;
  const int at0 = start + m0 + warp * 16 + g;  // position of the lane's first query

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
    const half* vt = vs + stage * (BN / 16) * D * 24;
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
        float x = s[i][c] * scale;
        if (cap > 0.f) x = cap * 1.44269504f * tanhf(x / cap);
        const int key = n + 8 * i + 2 * t + (c & 1), query = at0 + 8 * (c >> 1);
        x = key <= query && (window <= 0 || key > query - window) ? x : NONE;
        s[i][c] = x;
        high[c >> 1] = fmaxf(high[c >> 1], x);
      }
    float fade[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      high[h] = fmaxf(high[h], __shfl_xor_sync(0xffffffffu, high[h], 1));
      high[h] = fmaxf(high[h], __shfl_xor_sync(0xffffffffu, high[h], 2));
      high[h] = fmaxf(high[h], top[h]);
      fade[h] = exp2f(top[h] - high[h]);
      top[h] = high[h];
      sum[h] *= fade[h];
#pragma unroll
      for (int i = 0; i < NT; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          // a row without any key yet has top NONE: its masked scores must not count as 2^0
          const float x = s[i][2 * h + e], p = x > 0.5f * NONE ? exp2f(x - top[h]) : 0.f;
          s[i][2 * h + e] = p;
          sum[h] += p;
        }
#pragma unroll
      for (int i = 0; i < D / 8; ++i) { o[i][2 * h] *= fade[h]; o[i][2 * h + 1] *= fade[h]; }
    }
#pragma unroll
    for (int j = 0; j < BN / 16; ++j) {
      const unsigned p[4] = {
          amx_pack_half2(s[2 * j][0], s[2 * j][1]), amx_pack_half2(s[2 * j][2], s[2 * j][3]),
          amx_pack_half2(s[2 * j + 1][0], s[2 * j + 1][1]), amx_pack_half2(s[2 * j + 1][2], s[2 * j + 1][3])};
#pragma unroll
      for (int i = 0; i < D / 16; ++i) {
        unsigned b[4];
        amx_matrix4(b, amx_smem(vt + (j * D + i * 16 + (mi >> 1) * 8 + r8) * 24 + (mi & 1) * 8));
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
    if (row >= m) continue;
    const float inverse = 1.f / (sum[h] + amx_sink(sinks, head, top[h]));
#pragma unroll
    for (int i = 0; i < D / 8; ++i)
      if (8 * i + 2 * t < C)
        *(half2*)(out + ((long long)row * HEADS + head) * C + 8 * i + 2 * t) =
            __floats2half2_rn(o[i][2 * h] * inverse, o[i][2 * h + 1] * inverse);
  }
}
""",
    (STATE, SINK, NORM, MMA, PACK_HALF2, SHARED_ADDRESS, COPY16, COPY_COMMIT, COPY_WAIT, MATRIX[4]),
)
# Block `block` of `blocks` takes every blocks-th tile: with one sequence there are as many as
# blocks.
ATTEND = Intrinsic(
    "amx_attend_prefill",
    """
  const AmxState* state = (const AmxState*)state_;
  for (int job = block;; job += blocks) {
    const AmxTile mine = amx_tile(state, job, lane);
    if (mine.rows == 0) return;
    amx_attend_tile<D, C, G, KV, BN>(shared, state, q, sinks, out, layer, layers, scale, cap, window, mine, head, warp, lane);
  }""",
    (PREFILL,),
    "void(float* shared, const void* q, const void* state_, const void* sinks, void* out, int layer, int layers, "
    "float scale, float cap, int window, int block, int blocks, int head, int warp, int lane)",
    "int D, int C, int G, int KV, int BN",
)


def shared_floats(d: int, tokens: int) -> int:
    """Floats of shared memory that ``amx_attend_prefill`` lays out with tiles of `tokens`."""
    row = d + 8
    return (64 * row + 2 * tokens * row + 2 * (tokens // 16) * d * 24) // 2
