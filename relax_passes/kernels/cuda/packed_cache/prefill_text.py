# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""CUDA text of attention over chunks of new tokens, of any number of sequences.

`STORE` rotates and turns queries, keys and values of a chunk, a warp a row of a head. `ATTEND` is
``attention/prefill_text.py`` over tokens of three kinds, which it brings into tiles of shared memory:
rounded ones are decoded, those in 16 bits copied, those of the chunk itself copied as they are, so
tokens of one call see each other unrounded. `REMEMBER` then keeps the newest in 16 bits; what the
chunk has beyond them has been rounded to pages before (encode.py).

    Q   shared memory [64][D + 8]     K, V   [2][BN][D + 8], a row a token
"""

from __future__ import annotations

from relax_passes.kernels.cuda.attention.state_text import SINK
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

from .state_text import STATE

STORE = Source(
    "amx_packed_store_text",
    r"""
// A row of x: q [m, HEADS, D], k and v [m, KV, D].
template <int D, int HEADS, int KV, int HALF, int TURN>
__device__ __forceinline__ void amx_packed_store(float2* turn, const half* qkv, const AmxPacked* state, half* q, half* k, half* v,
                                                 const float* frequencies, float factor, int row, int warps, int warp, int lane) {
  const int position = amx_rows(state)[row];
  for (int i = warp * 32 + lane; i < HALF; i += 32 * warps) turn[i] = amx_turn(position, frequencies[i], factor);
  __syncthreads();
  for (int head = warp; head < HEADS + 2 * KV; head += warps) {
    const half* x = qkv + ((long long)row * (HEADS + 2 * KV) + head) * D;
    half* to = head < HEADS ? q + ((long long)row * HEADS + head) * D
                            : (head < HEADS + KV ? k : v) + ((long long)row * KV + (head - HEADS) % KV) * D;
    float part[D / 32];
#pragma unroll
    for (int i = 0; i < D / 32; ++i)
      part[i] = head >= HEADS + KV ? __half2float(x[lane + 32 * i]) : amx_rotated(x, lane + 32 * i, HALF, turn);
    amx_turn_row<D, TURN>(part, lane);
#pragma unroll
    for (int i = 0; i < D / 32; ++i) to[lane + 32 * i] = __float2half_rn(part[i]);
  }
}
""",
    (STATE,),
)

REMEMBER = Source(
    "amx_packed_remember_text",
    r"""
// Keep a row's key and value of a head, if it is one of the newest or the first.
template <int D, int NEWEST, int FIRST, int LAYERS, int KV>
__device__ __forceinline__ void amx_packed_remember(const AmxPacked* state, const half* k, const half* v, int layer, int row,
                                                    int rows, int kv, int tid, int threads) {
  const int position = amx_rows(state)[row];
  const AmxSequence sequence = amx_sequences(state)[amx_rows(state)[rows + row]];
  if (position >= FIRST && position < sequence.before + sequence.rows - NEWEST) return;
  const AmxRecent<D, NEWEST, FIRST, LAYERS, KV> recent(state, sequence.place, layer, kv);
  for (int e = tid; e < D; e += threads) {
    const long long at = ((long long)row * KV + kv) * D + e;
    const half key = k[at], value = v[at];
    if (position < FIRST) { recent.first_keys[position * D + e] = key; recent.first_values[e * FIRST + position] = value; }
    if (position < sequence.before + sequence.rows - NEWEST) continue;
    *recent.key(position, e) = key;
    *recent.value(position, e) = value;
  }
}
""",
    (STATE,),
)

PREFILL = Source(
    "amx_packed_prefill_text",
    r"""
struct AmxRows { int sequence, tile; };  // which 64 rows of which sequence

// Tile number `job` over all sequences, a sequence's longest tile first; none behind the last.
__device__ __forceinline__ AmxRows amx_rows_of(const AmxPacked* state, int job, int lane) {
  const int count = state->told[0];
  for (int base = 0; base < count; base += 32) {
    const int c = base + lane, tiles = c < count ? (amx_sequences(state)[c].rows + 63) >> 6 : 0;
    int until = tiles;
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
      const int before = __shfl_up_sync(0xffffffffu, until, step);
      if (lane >= step) until += before;
    }
    const unsigned found = __ballot_sync(0xffffffffu, job < until);
    if (found) {
      const int who = __ffs(found) - 1;
      return {base + who, __shfl_sync(0xffffffffu, until, who) - 1 - job};
    }
    job -= __shfl_sync(0xffffffffu, until, 31);
  }
  return {-1, 0};
}

// Turn the rows of accumulators back: lane t has channels 8i + 2t, 8i + 2t + 1 of its rows.
template <int D, int TURN>
__device__ __forceinline__ void amx_turn_sums(float (*o)[4], int t) {
  if constexpr (TURN > 0) {
    constexpr float factor = TURN == 64 ? 0.125f : TURN == 128 ? 0.088388348f : 0.0625f;
#pragma unroll
    for (int i = 0; i < D / 8; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float a = o[i][2 * h] * factor, b = o[i][2 * h + 1] * factor;
        o[i][2 * h] = a + b;
        o[i][2 * h + 1] = a - b;
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
          for (int bit = 1; bit < 4; bit <<= 1) {
            const float mine = o[i][2 * h + e], other = __shfl_xor_sync(0xffffffffu, mine, bit);
            o[i][2 * h + e] = t & bit ? other - mine : mine + other;
          }
      }
#pragma unroll
    for (int bit = 1; bit < TURN / 8; bit <<= 1)
#pragma unroll
      for (int i = 0; i < D / 8; ++i)
        if (!(i & bit))
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const float low = o[i][c], high = o[i | bit][c];
            o[i][c] = low + high;
            o[i | bit][c] = low - high;
          }
  }
}

template <class F, int D, int NEWEST, int FIRST, int TURN, int LAYERS, int KV, int G, int BN>
__device__ __forceinline__ void amx_packed_tile(float* shared, const AmxPacked* state, const half* q, const half* k, const half* v,
                                                const void* sinks, half* out, int layer, float scale, float cap, int window,
                                                AmxRows mine, int head, int warp, int lane) {
  constexpr int HEADS = G * KV, ROW = D + 8, NT = BN / 8, CHUNKS = D / 8;
  constexpr float NONE = -1e30f;
  half* qs = (half*)shared;
  half* ks = qs + 64 * ROW;
  half* vs = ks + 2 * BN * ROW;
  const AmxSequence sequence = amx_sequences(state)[mine.sequence];
  const int tid = warp * 32 + lane, g = lane >> 2, t = lane & 3, m0 = mine.tile * 64, m = sequence.rows, kv = head / G;
  const int start = sequence.before, total = start + m, exact = min(sequence.exact, start);
  const AmxPanels<F, D, LAYERS, KV> panels(state, sequence.table, layer, kv);
  const AmxRecent<D, NEWEST, FIRST, LAYERS, KV> recent(state, sequence.place, layer, kv);
  q += (long long)sequence.row * HEADS * D;
  out += (long long)sequence.row * HEADS * D;
  k += ((long long)sequence.row * KV + kv) * D;
  v += ((long long)sequence.row * KV + kv) * D;
  const int begin = window > 0 ? max(0, start + m0 - window + 1) / BN * BN : 0;
  const int end = min(total, start + m0 + 64);

  auto request = [&](int n, int stage) {
#pragma unroll 1
    for (int i = tid; i < BN * CHUNKS; i += 128) {
      const int token = i / CHUNKS, c = i % CHUNKS, at = n + token, place = (stage * BN + token) * ROW + c * 8;
      if (at >= start) {
        const long long from = at < total ? (long long)(at - start) * KV * D + c * 8 : 0;
        amx_copy16_cg(amx_smem(ks + place), k + from, at < total);
        amx_copy16_cg(amx_smem(vs + place), v + from, at < total);
      } else if (at >= FIRST && at < exact) {
        const unsigned char* panel = panels(at >> 4);
        *(uint4*)(ks + place) = amx_held<F, D>(panel, false, at & 15, c);
        *(uint4*)(vs + place) = amx_held<F, D>(panel, true, at & 15, c);
      } else {
        const bool first = at < FIRST;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int x = c * 8 + e;
          ks[place + e] = first ? recent.first_keys[at * D + x] : *recent.key(at, x);
          vs[place + e] = first ? recent.first_values[x * FIRST + at] : *recent.value(at, x);
        }
      }
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
        float x = s[i][c] * scale;
        if (cap > 0.f) x = cap * 1.44269504f * tanhf(x / cap);
        const int key = n + 8 * i + 2 * t + (c & 1), query = at0 + 8 * (c >> 1);
        x = key <= query && (window <= 0 || key > query - window) ? x : NONE;
        s[i][c] = x;
        high[c >> 1] = fmaxf(high[c >> 1], x);
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
          const float x = s[i][2 * h + e], p = x > 0.5f * NONE ? exp2f(x - top[h]) : 0.f;
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
    const float inverse = 1.f / (sum[h] + amx_sink(sinks, head, top[h]));
#pragma unroll
    for (int i = 0; i < D / 8; ++i) { o[i][2 * h] *= inverse; o[i][2 * h + 1] *= inverse; }
  }
  amx_turn_sums<D, TURN>(o, t);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = m0 + warp * 16 + g + 8 * h;
    if (row >= m) continue;
#pragma unroll
    for (int i = 0; i < D / 8; ++i)
      *(half2*)(out + ((long long)row * HEADS + head) * D + 8 * i + 2 * t) = __floats2half2_rn(o[i][2 * h], o[i][2 * h + 1]);
  }
}
""",
    (
        STATE,
        SINK,
        MMA,
        PACK_HALF2,
        SHARED_ADDRESS,
        COPY16,
        COPY_COMMIT,
        COPY_WAIT,
        MATRIX[4],
        MATRIX_TURNED,
    ),
)

# Block `block` of `blocks` takes every blocks-th tile.
ATTEND = Intrinsic(
    "amx_attend_packed_prefill",
    """
  const AmxPacked* state = (const AmxPacked*)state_;
  for (int job = block;; job += blocks) {
    const AmxRows mine = amx_rows_of(state, job, lane);
    if (mine.sequence < 0) return;
    amx_packed_tile<F, D, NEWEST, FIRST, TURN, LAYERS, KV, G, BN>(
        shared, state, (const half*)q, (const half*)k, (const half*)v, sinks, (half*)out, layer, scale, cap, window, mine, head, warp, lane);
  }""",
    (PREFILL,),
    "void(float* shared, const void* q, const void* k, const void* v, const void* state_, const void* sinks, void* out, int layer, "
    "float scale, float cap, int window, int block, int blocks, int head, int warp, int lane)",
    "class F, int D, int NEWEST, int FIRST, int TURN, int LAYERS, int KV, int G, int BN",
)


def shared_floats(d: int, tokens: int) -> int:
    """Floats of shared memory of a block with tiles of so many tokens."""
    return (64 + 4 * tokens) * (d + 8) // 2
