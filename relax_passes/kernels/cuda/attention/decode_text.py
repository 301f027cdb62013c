# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""CUDA text of decode attention: one new token a sequence, rotated, stored and attended in one go.

Queries that share a kv head (at most 16 of them, else several blocks share it) are the 16 (8 used)
rows of mma.m16n8k16, the keys of a page its columns, in an order that needs no shuffle:

    scores   S[query][token] = Q K^T     columns 2t, 2t+1 of tile i are tokens 4t + 2i, 4t + 2i + 1
    values   O[query][d] = P V           k = 2t, 2t+1, 2t+8, 2t+9 are tokens 4t .. 4t+3

so that P goes from the first product's result to the second's operand within a lane, lane (g, t)
loads keys 16 bytes at a time (channels 8t .. 8t+7 of every 32, permuted alike in Q), and 8 bytes of
every row of V. A warp takes every so many pages and keeps its softmax online; warps meet in shared
memory. `DECODE` is for one sequence: a cluster of SPLITS blocks shares a kv head, page p belongs to
block p % SPLITS, warp p / SPLITS % WARPS, and blocks meet in the cluster's shared memory. Where a warp
of one block has at most two pages, that block does it alone: meeting takes longer than a page. Many
sequences share `ATTEND_PAGES` (batch_text).

The last page, which takes the new token, is read after the block has written it. All other pages
are of earlier steps: their first keys are requested before the kernel in front has ended.
"""

from __future__ import annotations

from relax_passes.kernels.cuda.intrinsics.arithmetic import PACK_HALF2
from relax_passes.kernels.cuda.intrinsics.base import Source
from relax_passes.kernels.cuda.intrinsics.memory import SHARED_ADDRESS
from relax_passes.kernels.cuda.intrinsics.mma import MMA, MMA_UPPER
from relax_passes.kernels.cuda.intrinsics.sync import (
    CLUSTER_SYNC,
    LAUNCH_DEPENDENTS,
    PEER,
    WAIT_PREREQUISITES,
)

from .state_text import NORM, SINK, STATE

ATTEND_PAGES = Source(
    "amx_attend_pages_text",
    r"""
template <int D>
__device__ __forceinline__ void amx_load_keys(uint4 (*k)[D / 32], const half* page, int g, int t) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const half* row = page + (4 * (g >> 1) + (g & 1) + 2 * i) * D + 8 * t;
#pragma unroll
    for (int j = 0; j < D / 32; ++j) k[i][j] = *(const uint4*)(row + 32 * j);
  }
}

// What a warp has seen of its pages: sums of values, and maximum and sum of each query.
template <int D, int ROWS>
struct AmxSoftmax { float o[D / 8][ROWS / 4], top[ROWS / 8], sum[ROWS / 8]; };

// Rotated queries of a block to shared memory, [ROWS][D + 8], rows behind the G and channels behind
// the C true ones zero; the new token's key and value to its page, where that is given. Block `head`
// has G of the queries of kv head `head` / PARTS. With norms these and the key are normalized first, in
// `normed` [G + 1][C].
template <int D, int C, int G, int KV, int PARTS, int THREADS, int HALF>
__device__ __forceinline__ void amx_take_token(half* qs, half* normed, const half* mine, const float2* turn, half* target, int slot,
                                               const void* q_norm, const void* k_norm, float eps, int head, int tid) {
  constexpr int HEADS = G * KV * PARTS, STRIDE = D + 8, ROWS = G > 8 ? 16 : 8, BLOCK = 16 * D;
  const int kv = head / PARTS;
  const half *queries = mine + head * G * C, *key = mine + (HEADS + kv) * C, *value = mine + (HEADS + KV + kv) * C;
  if (q_norm != nullptr) {
    for (int r = tid >> 5; r <= G; r += THREADS / 32)
      amx_norm_head<C>(normed + r * C, r < G ? queries + r * C : key, r < G ? q_norm : k_norm, eps, tid & 31);
    __syncthreads();
    queries = normed;
    key = normed + G * C;
  }
  for (int i = tid; i < ROWS * D; i += THREADS) {
    const int r = i / D, e = i % D;
    const float v = r < G && e < C ? amx_rotated(queries + r * C, e, HALF, turn) : 0.f;
    qs[r * STRIDE + e] = __float2half_rn(v);
  }
  if (target != nullptr) {
    for (int e = tid; e < D; e += THREADS) {
      target[slot * D + e] = __float2half_rn(e < C ? amx_rotated(key, e, HALF, turn) : 0.f);
      target[KV * BLOCK + e * 16 + slot] = e < C ? value[e] : __float2half_rn(0.f);
    }
  }
}

// A warp attends to pages page, page + step, ... before `end`; pages(p) is the id of page p. The keys
// of the first are in k already, unless it is the sequence's last.
template <int D, int KV, int ROWS, class Pages>
__device__ __forceinline__ void amx_attend_pages(AmxSoftmax<D, ROWS>& seen, const half* qs, uint4 (*k)[D / 32], const half* base,
                                                 long long stride, Pages pages, int page, int id, int step, int end,
                                                 int low, int length, float scale, float cap, int g, int t) {
  constexpr int STRIDE = D + 8, TILES = D / 8, BLOCK = 16 * D;
  constexpr float NONE = -1e30f;
  const int last = (length - 1) >> 4;
  unsigned q[D / 16][ROWS / 4];
#pragma unroll
  for (int j = 0; j < D / 32; ++j) {
    const uint4 a = *(const uint4*)(qs + g * STRIDE + 32 * j + 8 * t);
    if constexpr (ROWS == 8) {
      q[2 * j][0] = a.x; q[2 * j][1] = a.y; q[2 * j + 1][0] = a.z; q[2 * j + 1][1] = a.w;
    } else {
      const uint4 b = *(const uint4*)(qs + (g + 8) * STRIDE + 32 * j + 8 * t);
      q[2 * j][0] = a.x; q[2 * j][1] = b.x; q[2 * j][2] = a.y; q[2 * j][3] = b.y;
      q[2 * j + 1][0] = a.z; q[2 * j + 1][1] = b.z; q[2 * j + 1][2] = a.w; q[2 * j + 1][3] = b.w;
    }
  }
  float (*o)[ROWS / 4] = seen.o, *top = seen.top, *sum = seen.sum;
#pragma unroll
  for (int h = 0; h < ROWS / 8; ++h) { top[h] = NONE; sum[h] = 0.f; }
#pragma unroll
  for (int i = 0; i < TILES; ++i)
#pragma unroll
    for (int c = 0; c < ROWS / 4; ++c) o[i][c] = 0.f;

#pragma unroll 1
  while (page < end) {
    const half* here = base + id * stride;
    if (page == last) amx_load_keys<D>(k, here, g, t);
    uint2 v[TILES];
#pragma unroll
    for (int i = 0; i < TILES; ++i) v[i] = *(const uint2*)(here + KV * BLOCK + (8 * i + g) * 16 + 4 * t);
    const int next = page + step;
    const int next_id = next < end ? pages(next) : 0;
    float s[2][ROWS / 4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int c = 0; c < ROWS / 4; ++c) s[i][c] = 0.f;
#pragma unroll
      for (int j = 0; j < D / 32; ++j) {
        const uint4 w = k[i][j];
        if constexpr (ROWS == 8) {
          amx_mma_upper(s[i], q[2 * j][0], q[2 * j][1], w.x, w.y);
          amx_mma_upper(s[i], q[2 * j + 1][0], q[2 * j + 1][1], w.z, w.w);
        } else {
          amx_mma(s[i], q[2 * j], w.x, w.y);
          amx_mma(s[i], q[2 * j + 1], w.z, w.w);
        }
      }
    }
    if (next < end && next < last) amx_load_keys<D>(k, base + next_id * stride, g, t);
    const int token = page * 16 + 4 * t;
    float high[ROWS / 8];
#pragma unroll
    for (int h = 0; h < ROWS / 8; ++h) high[h] = NONE;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int c = 0; c < ROWS / 4; ++c) {
        float x = s[i][c] * scale;
        if (cap > 0.f) x = cap * 1.44269504f * tanhf(x / cap);
        const int at = token + 2 * i + (c & 1);
        x = at >= low && at < length ? x : NONE;
        s[i][c] = x;
        high[c >> 1] = fmaxf(high[c >> 1], x);
      }
    float fade[ROWS / 8];
#pragma unroll
    for (int h = 0; h < ROWS / 8; ++h) {
      high[h] = fmaxf(high[h], __shfl_xor_sync(0xffffffffu, high[h], 1));
      high[h] = fmaxf(high[h], __shfl_xor_sync(0xffffffffu, high[h], 2));
      high[h] = fmaxf(high[h], top[h]);
      fade[h] = exp2f(top[h] - high[h]);
      top[h] = high[h];
      sum[h] *= fade[h];
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float p = exp2f(s[i][2 * h + e] - top[h]);
          s[i][2 * h + e] = p;
          sum[h] += p;
        }
#pragma unroll
      for (int i = 0; i < TILES; ++i) { o[i][2 * h] *= fade[h]; o[i][2 * h + 1] *= fade[h]; }
    }
    if (page == last) {  // slots beyond the sequence may hold anything, NaN too
      const int valid = length - token;
      const unsigned mx = (valid > 0 ? 0xffffu : 0u) | (valid > 1 ? 0xffff0000u : 0u);
      const unsigned my = (valid > 2 ? 0xffffu : 0u) | (valid > 3 ? 0xffff0000u : 0u);
#pragma unroll
      for (int i = 0; i < TILES; ++i) { v[i].x &= mx; v[i].y &= my; }
    }
    const unsigned p0 = amx_pack_half2(s[0][0], s[0][1]), p2 = amx_pack_half2(s[1][0], s[1][1]);
    if constexpr (ROWS == 8) {
#pragma unroll
      for (int i = 0; i < TILES; ++i) amx_mma_upper(o[i], p0, p2, v[i].x, v[i].y);
    } else {
      const unsigned p[4] = {p0, amx_pack_half2(s[0][2], s[0][3]), p2, amx_pack_half2(s[1][2], s[1][3])};
#pragma unroll
      for (int i = 0; i < TILES; ++i) amx_mma(o[i], p, v[i].x, v[i].y);
    }
    page = next;
    id = next_id;
  }
}

// Sums over the lanes of a query, then all warps' results side by side in shared memory:
// part [WARPS][G][D], tops [WARPS][G][2]. Ends with a barrier.
template <int D, int G, int ROWS>
__device__ __forceinline__ void amx_show_warp(AmxSoftmax<D, ROWS>& seen, float* part, float* tops, int warp, int g, int t) {
  constexpr int TILES = D / 8;
#pragma unroll
  for (int h = 0; h < ROWS / 8; ++h) {
    seen.sum[h] += __shfl_xor_sync(0xffffffffu, seen.sum[h], 1);
    seen.sum[h] += __shfl_xor_sync(0xffffffffu, seen.sum[h], 2);
    const int r = g + 8 * h;
    if (r < G) {
      if (t == 0) { tops[(warp * G + r) * 2] = seen.top[h]; tops[(warp * G + r) * 2 + 1] = seen.sum[h]; }
#pragma unroll
      for (int i = 0; i < TILES; ++i)
        *(float2*)(part + (warp * G + r) * D + 8 * i + 2 * t) = make_float2(seen.o[i][2 * h], seen.o[i][2 * h + 1]);
    }
  }
  __syncthreads();
}

// Two channels of one query over all warps; x = maximum, y = sum of the result.
template <int D, int G, int WARPS>
__device__ __forceinline__ float2 amx_join_warps(const float* part, const float* tops, int r, int e, float2& acc) {
  float best = -1e30f, total = 0.f;
  acc = make_float2(0.f, 0.f);
#pragma unroll
  for (int w = 0; w < WARPS; ++w) best = fmaxf(best, tops[(w * G + r) * 2]);
#pragma unroll
  for (int w = 0; w < WARPS; ++w) {
    const float f = exp2f(tops[(w * G + r) * 2] - best);
    const float2 x = *(const float2*)(part + (w * G + r) * D + e);
    total += f * tops[(w * G + r) * 2 + 1];
    acc.x += f * x.x; acc.y += f * x.y;
  }
  return make_float2(best, total);
}
""",
    (STATE, SINK, NORM, MMA, MMA_UPPER, PACK_HALF2),
)
DECODE = Source(
    "amx_attend_decode_text",
    r"""
// D channels of a head in pages, C true ones, G query heads a block, PARTS blocks for each of KV kv
// heads, HALF channels that turn with another HALF
template <int D, int C, int G, int KV, int PARTS, int SPLITS, int WARPS, int HALF, bool DEPENDENT>
__device__ __forceinline__ void amx_attend_decode(float* shared, const void* qkv_, const void* state_, void* out_,
                                                  const void* sinks, const void* q_norm, const void* k_norm, float eps,
                                                  const float* frequencies, float factor, int layer,
                                                  int layers, float scale, float cap, int window,
                                                  int split, int head, int warp, int lane) {
  constexpr int THREADS = WARPS * 32, STRIDE = D + 8;
  constexpr int ROWS = G > 8 ? 16 : 8, BLOCK = 16 * D;
  constexpr float NONE = -1e30f;
  const half* qkv = (const half*)qkv_;
  const AmxState* state = (const AmxState*)state_;
  half* out = (half*)out_;
  half* qs = (half*)shared;                             // [ROWS][STRIDE]
  float2* turn = (float2*)(shared + ROWS * STRIDE / 2);  // [HALF]
  float* part = shared + ROWS * STRIDE / 2 + 2 * HALF;   // [WARPS][G][D]
  float* tops = part + WARPS * G * D;                   // [WARPS][G][2]: maximum, sum
  float* whole = tops + WARPS * G * 2;                  // [G][2]: of the block
  const int tid = warp * 32 + lane, g = lane >> 2, t = lane & 3;
  if (DEPENDENT) amx_launch_dependents();

  const int position = state->position;
  const AmxTable table = amx_table<true>(state, 0, position);
  const int length = position + 1, last = position >> 4;
  const int low = window > 0 ? max(0, length - window) : 0, first = low >> 4;
  const int splits = last - first < 2 * WARPS ? 1 : SPLITS;
  if (split >= splits) return;
  const long long stride = (long long)layers * 2 * KV * BLOCK;
  half* base = state->pages + ((long long)layer * 2 * KV + head / PARTS) * BLOCK;
  for (int i = tid; i < HALF; i += THREADS) turn[i] = amx_turn(position, frequencies[i], factor);

  const auto pages = [&](int page) { return amx_page(table, page); };
  const int page = first + split + splits * warp;
  const int id = page <= last ? pages(page) : 0;
  uint4 k[2][D / 32];
  if (page < last) amx_load_keys<D>(k, base + id * stride, g, t);
  __syncthreads();
  if (DEPENDENT) amx_wait_prerequisites();

  half* target = (last - first) % splits == split ? base + pages(last) * stride : nullptr;
  amx_take_token<D, C, G, KV, PARTS, THREADS, HALF>(qs, (half*)part, qkv, turn, target, position & 15, q_norm, k_norm, eps,
                                                    head, tid);
  __syncthreads();
  AmxSoftmax<D, ROWS> seen;
  amx_attend_pages<D, KV, ROWS>(seen, qs, k, base, stride, pages, page, id, splits * WARPS, last + 1, low, length, scale,
                                cap, g, t);
  amx_show_warp<D, G>(seen, part, tops, warp, g, t);
  for (int i = tid; i < G * D / 2; i += THREADS) {
    const int r = 2 * i / D, e = 2 * i % D;
    float2 acc;
    const float2 found = amx_join_warps<D, G, WARPS>(part, tops, r, e, acc);
    if (splits == 1) {
      const float total = found.y + amx_sink(sinks, head * G + r, found.x);
      if (e < C) *(half2*)(out + (head * G + r) * C + e) = __floats2half2_rn(acc.x / total, acc.y / total);
    } else {
      *(float2*)(part + r * D + e) = acc;  // read by this thread alone until now
      if (e == 0) { whole[2 * r] = found.x; whole[2 * r + 1] = found.y; }
    }
  }
  if (splits == 1) return;
  amx_cluster_sync();
  for (int i = tid * SPLITS + split; i < G * D / 2; i += THREADS * SPLITS) {
    const int r = 2 * i / D, e = 2 * i % D;
    float2 m[SPLITS], x[SPLITS];
#pragma unroll
    for (int p = 0; p < SPLITS; ++p) {
      m[p] = amx_peer2(amx_smem(whole + 2 * r), p);
      x[p] = amx_peer2(amx_smem(part + r * D + e), p);
    }
    float best = NONE, total = 0.f, a = 0.f, b = 0.f;
#pragma unroll
    for (int p = 0; p < SPLITS; ++p) best = fmaxf(best, m[p].x);
#pragma unroll
    for (int p = 0; p < SPLITS; ++p) {
      const float f = exp2f(m[p].x - best);
      total += f * m[p].y; a += f * x[p].x; b += f * x[p].y;
    }
    total += amx_sink(sinks, head * G + r, best);
    if (e < C) *(half2*)(out + (head * G + r) * C + e) = __floats2half2_rn(a / total, b / total);
  }
  amx_cluster_sync();  // no block may leave while another reads its part
}
""",
    (
        ATTEND_PAGES,
        SHARED_ADDRESS,
        PEER[2],
        CLUSTER_SYNC,
        LAUNCH_DEPENDENTS,
        WAIT_PREREQUISITES,
    ),
)


def shared_floats(d: int, group: int, half: int, warps: int) -> int:
    """Floats of shared memory that ``amx_attend_decode`` lays out."""
    rows = 16 if group > 8 else 8
    return rows * (d + 8) // 2 + 2 * half + warps * group * (d + 2) + 2 * group
