# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""CUDA text of decode attention of a warp: panels of rounded tokens, and pages of tokens in 16 bits.

Tokens are the 16 rows of mma.m16n8k16 and queries its 8 columns, twice where a block has more:

    scores   S[token][query] = K Q^T     lane (g, t) has tokens g, g + 8 and queries t, t + 4
    values   O[d][query] = V^T P^T       lane (g, t) has tokens 2t, 2t + 1, 2t + 8, 2t + 9

Query q of eight is column 2q, or 2q - 7 from the fifth on: where a block has four, lanes have one each,
and every register that is decoded is multiplied by all queries, and probabilities go from the first
product to the second by one transposition in the warp. Of keys a lane decodes the channels 8t .. 8t + 7
of each group of 32. Of values it decodes the channels 8g .. 8g + 7 of each 64, two tokens at once: row
g of tile 4w + e is channel 64w + 8g + 2e, row g + 8 the next.

Softmax is online; sums and values are scaled only when a maximum grows by more than a power of two
that float16 has room for. Panels come through shared memory, where each warp has room for a few of
its own.
"""

from __future__ import annotations

from relax_passes.kernels.cuda.attention.decode_text import ATTEND_PAGES
from relax_passes.kernels.cuda.intrinsics.base import Source
from relax_passes.kernels.cuda.intrinsics.memory import (
    COPY16,
    COPY_COMMIT,
    COPY_WAIT,
    SHARED_ADDRESS,
)
from relax_passes.kernels.cuda.intrinsics.mma import MMA, MMA_FIRST, TURN_MATRIX

from .state_text import STATE

# 2 to the power of v; 0 where that is no normal number.
EXP2_FLUSHED = Source(
    "amx_exp2_flushed",
    r"""
__device__ __forceinline__ float amx_exp2_flushed(float v) {
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(v));
  return e;
}
""",
)

PANELS = Source(
    "amx_attend_panels_text",
    r"""
constexpr float AMX_NONE = -1e30f, AMX_LOW = -1e29f;  // of no part at all; of a maximum of none
constexpr float AMX_ROOM = 8.f;  // by which scores may exceed the maximum that they are taken from

template <int D, int TILES>
struct AmxQuery { unsigned q[TILES][D / 16][2]; };

// Registers of the right operand, of queries in shared memory [8 TILES][D + 8].
template <int D, int TILES>
__device__ __forceinline__ void amx_load_query(AmxQuery<D, TILES>& query, const half* qs, int g, int t) {
#pragma unroll
  for (int n = 0; n < TILES; ++n)
#pragma unroll
    for (int j = 0; j < D / 32; ++j) {
      const uint4 a = *(const uint4*)(qs + (8 * n + g) * (D + 8) + 32 * j + 8 * t);
      query.q[n][2 * j][0] = a.x; query.q[n][2 * j][1] = a.y;
      query.q[n][2 * j + 1][0] = a.z; query.q[n][2 * j + 1][1] = a.w;
    }
}

// What a warp has seen: sums of values, and of queries t, t + 4 of a tile the maximum, alike in all
// lanes, and the lane's own part of the sum.
template <int D, int TILES>
struct AmxSeen { float o[TILES][D / 16][4], top[TILES][2], sum[TILES][2]; };

template <int D, int TILES>
__device__ __forceinline__ void amx_see_nothing(AmxSeen<D, TILES>& seen) {
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    seen.top[n][0] = seen.top[n][1] = AMX_LOW;
    seen.sum[n][0] = seen.sum[n][1] = 0.f;
#pragma unroll
    for (int i = 0; i < D / 16; ++i) seen.o[n][i][0] = seen.o[n][i][1] = seen.o[n][i][2] = seen.o[n][i][3] = 0.f;
  }
}

// Add products of 16 channels of 16 tokens to scores, the first ones to nothing.
template <int TILES>
__device__ __forceinline__ void amx_score(float (*s)[4], const unsigned* a, const unsigned (*q)[2], int stride, bool first) {
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    const unsigned* b = q[n * stride];
    if (first) amx_mma_first(s[n], a, b[0], b[1]);
    else amx_mma(s[n], a, b[0], b[1]);
  }
}

// Scores of tokens g (s[0], s[1]) and g + 8 (s[2], s[3]) to probabilities p, times 2^GAIN, as the right
// operand of values. Where `some`, low and high say whether the tokens count. A lane has E queries.
template <int D, int TILES, int E, int GAIN>
__device__ __forceinline__ void amx_soften(AmxSeen<D, TILES>& seen, float (*s)[4], bool some, bool low, bool high, float scale,
                                           float cap, unsigned (*p)[2]) {
  if (cap > 0.f) {
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int c = 0; c < 4; c += 3 - E) s[n][c] = cap * 1.44269504f * tanhf(s[n][c] * scale / cap);
    scale = 1.f;
  }
  if (some)
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int c = 0; c < 4; c += 3 - E) s[n][c] = (c < 2 ? low : high) ? s[n][c] : -INFINITY;
  float best[TILES][2];
  bool grows = false;
#pragma unroll
  for (int n = 0; n < TILES; ++n)
#pragma unroll
    for (int e = 0; e < E; ++e) {
      best[n][e] = fmaxf(s[n][e], s[n][e + 2]) * scale;
      grows |= best[n][e] > seen.top[n][e] + AMX_ROOM;
    }
  if (__ballot_sync(0xffffffffu, grows)) {
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int e = 0; e < E; ++e) {
        float top = fmaxf(best[n][e], seen.top[n][e]);
#pragma unroll
        for (int bit = 4; bit < 32; bit <<= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, bit));
        const float fade = amx_exp2_flushed(seen.top[n][e] - top);
        seen.top[n][e] = top;
        seen.sum[n][e] *= fade;
#pragma unroll
        for (int i = 0; i < D / 16; ++i) { seen.o[n][i][e] *= fade; seen.o[n][i][e + 2] *= fade; }
      }
  }
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
#pragma unroll
    for (int c = 0; c < 4; c += 3 - E) {
      s[n][c] = amx_exp2_flushed(s[n][c] * scale - (seen.top[n][c & 1] - GAIN));
      seen.sum[n][c & 1] += s[n][c] * (1.f / (1 << GAIN));
    }
    p[n][0] = amx_turn_matrix(amx_pack_half2(s[n][0], E == 1 ? 0.f : s[n][1]));
    p[n][1] = amx_turn_matrix(amx_pack_half2(s[n][2], E == 1 ? 0.f : s[n][3]));
  }
}

// A lane's part of a panel.
template <class F, int D>
struct AmxPanel {
  unsigned k[2][D / 32 * F::WORDS], v[4][D / 64 * F::WORDS], key_scales[2][D / 64], value_scales[2][2 * (D / 64)];
};
template <class F, int D>
__device__ __forceinline__ void amx_take_keys(AmxPanel<F, D>& to, const unsigned char* panel, int g, int t) {
  typedef AmxPanelBytes<F, D> At;
  const unsigned char* key = panel + g * At::ROW + t * (At::ROW / 4);
  const unsigned char* scale = panel + At::KEY_SCALES + g * At::SCALES;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    amx_take_words<D / 32 * F::WORDS>(to.k[i], key + 8 * i * At::ROW);
    amx_take_words<D / 64>(to.key_scales[i], scale + 8 * i * At::SCALES);
  }
}
template <class F, int D>
__device__ __forceinline__ void amx_take_values(AmxPanel<F, D>& to, const unsigned char* panel, int g, int t) {
  typedef AmxPanelBytes<F, D> At;
  const unsigned char* value = panel + At::VALUES + 2 * t * At::ROW + g * (At::ROW / 8);
  const unsigned char* scale = panel + At::VALUE_SCALES + 2 * t * At::SCALES;
#pragma unroll
  for (int j = 0; j < 4; ++j)
    amx_take_words<D / 64 * F::WORDS>(to.v[j], value + (8 * (j >> 1) + (j & 1)) * At::ROW);
#pragma unroll
  for (int i = 0; i < 2; ++i) amx_take_words<2 * (D / 64)>(to.value_scales[i], scale + 8 * i * At::SCALES);
}

// Ask for a panel, by all lanes of a warp; `to` and `panel` are the lane's first 16 bytes. The last
// pieces are copied twice where they are no multiple of the lanes: nothing branches.
template <class F, int D>
__device__ __forceinline__ void amx_request_panel(unsigned to, const unsigned char* panel) {
  constexpr int PIECES = AmxPanelBytes<F, D>::ALL / 16;
#pragma unroll
  for (int i = 0; i < PIECES; i += 32) {
    const int at = 16 * (i + 32 <= PIECES ? i : PIECES - 32);
    amx_copy16_cg(to + at, panel + at, true);
  }
}

// Attend to a panel in shared memory, whose tokens are number `token` on; those from least to before
// `exact` count.
template <class F, int D, int TILES, int E>
__device__ __forceinline__ void amx_attend_panel(AmxSeen<D, TILES>& seen, const AmxQuery<D, TILES>& query,
                                                 const unsigned char* held, int token, int least, int exact, float scale, float cap,
                                                 int g, int t) {
  AmxPanel<F, D> panel;
  amx_take_keys<F, D>(panel, held, g, t);
  float s[TILES][4];
#pragma unroll
  for (int j = 0; j < D / 32; ++j) {
    unsigned h[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const AmxScales both = F::scales(panel.key_scales[i][j / 2], t >> 1);
      F::unpack(panel.k[i] + j * F::WORDS, h[i]);
#pragma unroll
      for (int e = 0; e < 4; ++e) h[i][e] = F::scaled(h[i][e], amx_row(both.alpha, j & 1), amx_row(both.beta, j & 1));
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const unsigned a[4] = {h[0][2 * e], h[1][2 * e], h[0][2 * e + 1], h[1][2 * e + 1]};
      amx_score<TILES>(s, a, query.q[0] + 2 * j + e, D / 16, j + e == 0);
    }
  }
  amx_take_values<F, D>(panel, held, g, t);
  const auto counts = [&](int i) { return token + i >= least && token + i < exact; };
  const bool some = token < least || token + 16 > exact;
  if (some)  // what is behind the last may be anything, NaN too
#pragma unroll
    for (int u = 0; u < 4; ++u)
      if (!counts(2 * t + 8 * (u >> 1) + (u & 1)))
#pragma unroll
        for (int w = 0; w < D / 64; ++w) panel.value_scales[u >> 1][(u & 1) * (D / 64) + w] = 0u;
  unsigned p[TILES][2];
  amx_soften<D, TILES, E, F::GAIN_BITS>(seen, s, some, counts(g), counts(g + 8), scale * F::GAIN, cap, p);
  const unsigned half_of = g < 4 ? 0x5410u : 0x7632u;
#pragma unroll
  for (int w = 0; w < D / 64; ++w) {
    unsigned even[2][4], odd[2][4];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const unsigned* mine = panel.value_scales[u] + w;
      const AmxScales both = F::scales(__byte_perm(mine[0], mine[D / 64], half_of), (g >> 1) & 1);
      unsigned lower[F::WORDS], upper[F::WORDS];
#pragma unroll
      for (int i = 0; i < F::WORDS; ++i) {
        const unsigned a = panel.v[2 * u][w * F::WORDS + i], b = panel.v[2 * u + 1][w * F::WORDS + i];
        lower[i] = __byte_perm(a, b, 0x5410);
        upper[i] = __byte_perm(a, b, 0x7632);
      }
      F::unpack(lower, even[u]);
      F::unpack(upper, odd[u]);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        even[u][e] = F::scaled(even[u][e], amx_h2(both.alpha), amx_h2(both.beta));
        odd[u][e] = F::scaled(odd[u][e], amx_h2(both.alpha), amx_h2(both.beta));
      }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const unsigned a[4] = {even[0][e], odd[0][e], even[1][e], odd[1][e]};
#pragma unroll
      for (int n = 0; n < TILES; ++n) amx_mma(seen.o[n][4 * w + e], a, p[n][0], p[n][1]);
    }
  }
}

// Attend to 16 tokens in 16 bits, those that `counts` says: keys [16][D], values as AmxRecent has them;
// or to the FIRST of a sequence, where that is not 0: keys [FIRST][D], values [D][FIRST].
template <int D, int TILES, int E, int FIRST, class Counts>
__device__ __forceinline__ void amx_attend_exact(AmxSeen<D, TILES>& seen, const AmxQuery<D, TILES>& query, const half* keys,
                                                 const half* values, Counts counts, float scale, float cap, int g, int t) {
  float s[TILES][4];
  const bool low = FIRST == 0 || g < FIRST, left = FIRST == 0 || 2 * t < FIRST;
#pragma unroll
  for (int j = 0; j < D / 32; ++j) {
    uint4 k[2] = {make_uint4(0u, 0u, 0u, 0u), make_uint4(0u, 0u, 0u, 0u)};
    if (low) k[0] = *(const uint4*)(keys + g * D + 32 * j + 8 * t);
    if (FIRST == 0) k[1] = *(const uint4*)(keys + (g + 8) * D + 32 * j + 8 * t);
    const unsigned a[4] = {k[0].x, k[1].x, k[0].y, k[1].y}, b[4] = {k[0].z, k[1].z, k[0].w, k[1].w};
    amx_score<TILES>(s, a, query.q[0] + 2 * j, D / 16, j == 0);
    amx_score<TILES>(s, b, query.q[0] + 2 * j + 1, D / 16, false);
  }
  uint2 v[D / 8];
#pragma unroll
  for (int i = 0; i < D / 8; ++i) {
    const int channel = 64 * (i / 8) + 8 * g + i % 8;
    v[i] = make_uint2(0u, 0u);
    if (FIRST == 0) v[i] = *(const uint2*)(values + channel * 16 + 4 * t);
    else if (left) v[i].x = *(const unsigned*)(values + channel * FIRST + 2 * t);
  }
  unsigned p[TILES][2];
  amx_soften<D, TILES, E, 0>(seen, s, true, counts(g), counts(g + 8), scale, cap, p);
  const unsigned mx = (counts(2 * t) ? 0xffffu : 0u) | (counts(2 * t + 1) ? 0xffff0000u : 0u);
  const unsigned my = (counts(2 * t + 8) ? 0xffffu : 0u) | (counts(2 * t + 9) ? 0xffff0000u : 0u);
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    const uint2 a = v[2 * i], b = v[2 * i + 1];
    const unsigned both[4] = {a.x & mx, b.x & mx, a.y & my, b.y & my};
#pragma unroll
    for (int n = 0; n < TILES; ++n) amx_mma(seen.o[n][i], both, p[n][0], p[n][1]);
  }
}

// Sums over the lanes of a query, then all warps' results side by side in shared memory:
// part [WARPS][G][D], tops [WARPS][G][2]. Ends with a barrier.
template <int D, int G, int TILES>
__device__ __forceinline__ void amx_show_panels(AmxSeen<D, TILES>& seen, float* part, float* tops, int warp, int g, int t) {
#pragma unroll
  for (int n = 0; n < TILES; ++n)
#pragma unroll
    for (int e = 0; e < (G > 4 ? 2 : 1); ++e) {
#pragma unroll
      for (int bit = 4; bit < 32; bit <<= 1) seen.sum[n][e] += __shfl_xor_sync(0xffffffffu, seen.sum[n][e], bit);
      const int r = 8 * n + t + 4 * e;
      if (r >= G) continue;
      if (g == 0) { tops[(warp * G + r) * 2] = seen.top[n][e]; tops[(warp * G + r) * 2 + 1] = seen.sum[n][e]; }
#pragma unroll
      for (int i = 0; i < D / 16; ++i)
        *(float2*)(part + (warp * G + r) * D + 64 * (i / 4) + 8 * g + 2 * (i % 4)) = make_float2(seen.o[n][i][e], seen.o[n][i][e + 2]);
    }
  __syncthreads();
}
""",
    (
        STATE,
        ATTEND_PAGES,
        EXP2_FLUSHED,
        MMA,
        MMA_FIRST,
        TURN_MATRIX,
        COPY16,
        COPY_COMMIT,
        COPY_WAIT,
        SHARED_ADDRESS,
    ),
)
