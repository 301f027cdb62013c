# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""CUDA text of decode attention of a warp: panels of rounded tokens, and pages of tokens in 16 bits.

The products are those of ``attention/decode_text.py``: queries are the 16 (8 used) rows of
mma.m16n8k16, lane (g, t) has the scores of tokens 4t .. 4t + 3 of 16. Of keys it decodes the channels
8t .. 8t + 7 of each group of 32, of token 4 (g / 2) + g % 2 + 2 i for tile i. Of values it decodes the
channels 8g .. 8g + 7 of each 64, of tokens 4t .. 4t + 3, two tokens at once: so column g of tile 8w + j
is channel 64w + 8g + j.

A warp has two panels in registers: one is on its way while the other is multiplied.
"""

from __future__ import annotations

from relax_passes.kernels.cuda.attention.decode_text import ATTEND_PAGES
from relax_passes.kernels.cuda.intrinsics.base import Source

from .state_text import STATE

PANELS = Source(
    "amx_attend_panels_text",
    r"""
constexpr float AMX_NONE = -1e30f;

template <int D, int ROWS>
struct AmxQuery { unsigned q[D / 16][ROWS / 4]; };

// Registers of the left operand, of queries in shared memory [ROWS][D + 8].
template <int D, int ROWS>
__device__ __forceinline__ void amx_load_query(AmxQuery<D, ROWS>& query, const half* qs, int g, int t) {
#pragma unroll
  for (int j = 0; j < D / 32; ++j) {
    const uint4 a = *(const uint4*)(qs + g * (D + 8) + 32 * j + 8 * t);
    unsigned* q = query.q[2 * j];
    unsigned* p = query.q[2 * j + 1];
    if constexpr (ROWS == 8) {
      q[0] = a.x; q[1] = a.y; p[0] = a.z; p[1] = a.w;
    } else {
      const uint4 b = *(const uint4*)(qs + (g + 8) * (D + 8) + 32 * j + 8 * t);
      q[0] = a.x; q[1] = b.x; q[2] = a.y; q[3] = b.y;
      p[0] = a.z; p[1] = b.z; p[2] = a.w; p[3] = b.w;
    }
  }
}

template <int ROWS>
__device__ __forceinline__ void amx_product(float* c, const unsigned* a, unsigned b0, unsigned b1) {
  if constexpr (ROWS == 8) amx_mma_upper(c, a[0], a[1], b0, b1);
  else amx_mma(c, a, b0, b1);
}

template <int D, int ROWS>
__device__ __forceinline__ void amx_see_nothing(AmxSoftmax<D, ROWS>& seen) {
#pragma unroll
  for (int h = 0; h < ROWS / 8; ++h) { seen.top[h] = AMX_NONE; seen.sum[h] = 0.f; }
#pragma unroll
  for (int i = 0; i < D / 8; ++i)
#pragma unroll
    for (int c = 0; c < ROWS / 4; ++c) seen.o[i][c] = 0.f;
}

// Scores s[i][.] of a query's tokens 4t + 2i, 4t + 2i + 1 to probabilities p, times `gain`, as the left
// operand; bit 2i + e of `sees` says which tokens count.
template <int D, int ROWS>
__device__ __forceinline__ void amx_soften(AmxSoftmax<D, ROWS>& seen, float (*s)[ROWS / 4], unsigned sees, float scale,
                                           float cap, float gain, unsigned* p) {
  float high[ROWS / 8];
#pragma unroll
  for (int h = 0; h < ROWS / 8; ++h) high[h] = AMX_NONE;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int c = 0; c < ROWS / 4; ++c) {
      float x = s[i][c] * scale;
      if (cap > 0.f) x = cap * 1.44269504f * tanhf(x / cap);
      x = (sees >> (2 * i + (c & 1))) & 1 ? x : AMX_NONE;
      s[i][c] = x;
      high[c >> 1] = fmaxf(high[c >> 1], x);
    }
#pragma unroll
  for (int h = 0; h < ROWS / 8; ++h) {
    high[h] = fmaxf(high[h], __shfl_xor_sync(0xffffffffu, high[h], 1));
    high[h] = fmaxf(high[h], __shfl_xor_sync(0xffffffffu, high[h], 2));
    high[h] = fmaxf(high[h], seen.top[h]);
    const float fade = exp2f(seen.top[h] - high[h]);
    seen.top[h] = high[h];
    seen.sum[h] *= fade;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float* x = s[i] + 2 * h;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        // nothing may have been seen yet: a masked score is not 2^0 then
        x[e] = x[e] > 0.5f * AMX_NONE ? exp2f(x[e] - high[h]) : 0.f;
        seen.sum[h] += x[e];
      }
      p[(ROWS / 8) * i + h] = amx_pack_half2(gain * x[0], gain * x[1]);
    }
#pragma unroll
    for (int i = 0; i < D / 8; ++i) { seen.o[i][2 * h] *= fade; seen.o[i][2 * h + 1] *= fade; }
  }
}

// A lane's part of a panel.
template <class F, int D>
struct AmxPanel {
  unsigned k[2][D / 32 * F::WORDS], v[4][D / 64 * F::WORDS], key_scales[2][D / 64], value_scales[4 * (D / 64)];
};
template <class F, int D>
__device__ __forceinline__ void amx_load_panel(AmxPanel<F, D>& to, const unsigned char* panel, int g, int t) {
  typedef AmxPanelBytes<F, D> At;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int token = 4 * (g >> 1) + (g & 1) + 2 * i;
    amx_read_words<D / 32 * F::WORDS>(to.k[i], panel + token * At::ROW + t * (At::ROW / 4));
    amx_read_words<D / 64>(to.key_scales[i], panel + At::KEY_SCALES + token * At::SCALES);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j)
    amx_read_words<D / 64 * F::WORDS>(to.v[j], panel + At::VALUES + (4 * t + j) * At::ROW + g * (At::ROW / 8));
  amx_read_words<4 * (D / 64)>(to.value_scales, panel + At::VALUE_SCALES + 4 * t * At::SCALES);
}

// Attend to a panel whose tokens are number `token` on; those from least to before `exact` count.
template <class F, int D, int ROWS>
__device__ __forceinline__ void amx_attend_panel(AmxSoftmax<D, ROWS>& seen, const AmxQuery<D, ROWS>& query, const AmxPanel<F, D>& panel,
                                                 int token, int least, int exact, float scale, float cap, int g, int t) {
  float s[2][ROWS / 4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int c = 0; c < ROWS / 4; ++c) s[i][c] = 0.f;
#pragma unroll
    for (int j = 0; j < D / 32; j += 2) {
      const AmxScales both = F::scales(panel.key_scales[i][j / 2], t >> 1);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        unsigned h[4];
        F::unpack(panel.k[i] + (j + n) * F::WORDS, h);
#pragma unroll
        for (int e = 0; e < 4; ++e) h[e] = F::scaled(h[e], amx_row(both.alpha, n), amx_row(both.beta, n));
        amx_product<ROWS>(s[i], query.q[2 * (j + n)], h[0], h[1]);
        amx_product<ROWS>(s[i], query.q[2 * (j + n) + 1], h[2], h[3]);
      }
    }
  }
  unsigned sees = 15u, keep[2] = {~0u, ~0u};
  if (token < least || token + 16 > exact) {  // what is behind the last may be anything, NaN too
    const int mine = token + 4 * t;
    sees = 0u;
#pragma unroll
    for (int i = 0; i < 4; ++i) sees |= (unsigned)(mine + i >= least && mine + i < exact) << i;
#pragma unroll
    for (int u = 0; u < 2; ++u) keep[u] = (sees >> (2 * u) & 1 ? 0xffffu : 0u) | (sees >> (2 * u + 1) & 1 ? 0xffff0000u : 0u);
  }
  unsigned p[ROWS / 4];
  amx_soften<D, ROWS>(seen, s, sees, scale * F::GAIN, cap, F::GAIN, p);
  const unsigned half_of = g < 4 ? 0x5410u : 0x7632u;
#pragma unroll
  for (int w = 0; w < D / 64; ++w) {
    unsigned even[2][4], odd[2][4];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const unsigned* mine = panel.value_scales + 2 * u * (D / 64) + w;
      const AmxScales both = F::scales(__byte_perm(mine[0], mine[D / 64], half_of) & keep[u], (g >> 1) & 1);
      unsigned low[F::WORDS], high[F::WORDS];
#pragma unroll
      for (int i = 0; i < F::WORDS; ++i) {
        const unsigned a = panel.v[2 * u][w * F::WORDS + i], b = panel.v[2 * u + 1][w * F::WORDS + i];
        low[i] = __byte_perm(a, b, 0x5410);
        high[i] = __byte_perm(a, b, 0x7632);
      }
      F::unpack(low, even[u]);
      F::unpack(high, odd[u]);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        even[u][e] = F::scaled(even[u][e], amx_h2(both.alpha), amx_h2(both.beta));
        odd[u][e] = F::scaled(odd[u][e], amx_h2(both.alpha), amx_h2(both.beta));
      }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      amx_product<ROWS>(seen.o[8 * w + 2 * e], p, even[0][e], even[1][e]);
      amx_product<ROWS>(seen.o[8 * w + 2 * e + 1], p, odd[0][e], odd[1][e]);
    }
  }
}

// Attend to 16 tokens in 16 bits; lanes behind `lanes` have none. keys [16][D], values [D][stride].
template <int D, int ROWS>
__device__ __forceinline__ void amx_attend_exact(AmxSoftmax<D, ROWS>& seen, const AmxQuery<D, ROWS>& query, const half* keys,
                                                 const half* values, int stride, int tokens, unsigned sees, float scale,
                                                 float cap, int g, int t) {
  float s[2][ROWS / 4];
  uint2 v[D / 8];
#pragma unroll
  for (int i = 0; i < D / 8; ++i) {
    const int channel = 64 * (i / 8) + 8 * g + i % 8;
    v[i] = 4 * t < tokens ? *(const uint2*)(values + channel * stride + 4 * t) : make_uint2(0u, 0u);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int token = 4 * (g >> 1) + (g & 1) + 2 * i;
#pragma unroll
    for (int c = 0; c < ROWS / 4; ++c) s[i][c] = 0.f;
#pragma unroll
    for (int j = 0; j < D / 32; ++j) {
      uint4 w = make_uint4(0u, 0u, 0u, 0u);
      if (token < tokens) w = *(const uint4*)(keys + token * D + 32 * j + 8 * t);
      amx_product<ROWS>(s[i], query.q[2 * j], w.x, w.y);
      amx_product<ROWS>(s[i], query.q[2 * j + 1], w.z, w.w);
    }
  }
  unsigned p[ROWS / 4];
  amx_soften<D, ROWS>(seen, s, sees, scale, cap, 1.f, p);
  const unsigned mx = (sees & 1 ? 0xffffu : 0u) | (sees & 2 ? 0xffff0000u : 0u);
  const unsigned my = (sees & 4 ? 0xffffu : 0u) | (sees & 8 ? 0xffff0000u : 0u);
#pragma unroll
  for (int i = 0; i < D / 8; ++i) amx_product<ROWS>(seen.o[i], p, v[i].x & mx, v[i].y & my);
}

// `amx_show_warp`, of columns that stand for other channels.
template <int D, int G, int ROWS>
__device__ __forceinline__ void amx_show_panels(AmxSoftmax<D, ROWS>& seen, float* part, float* tops, int warp, int g, int t) {
#pragma unroll
  for (int h = 0; h < ROWS / 8; ++h) {
    seen.sum[h] += __shfl_xor_sync(0xffffffffu, seen.sum[h], 1);
    seen.sum[h] += __shfl_xor_sync(0xffffffffu, seen.sum[h], 2);
    const int r = g + 8 * h;
    if (r >= G) continue;
    if (t == 0) { tops[(warp * G + r) * 2] = seen.top[h]; tops[(warp * G + r) * 2 + 1] = seen.sum[h]; }
#pragma unroll
    for (int i = 0; i < D / 8; i += 2)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        *(float2*)(part + (warp * G + r) * D + 64 * (i / 8) + 16 * t + 8 * e + i % 8) =
            make_float2(seen.o[i][2 * h + e], seen.o[i + 1][2 * h + e]);
  }
  __syncthreads();
}
""",
    (STATE, ATTEND_PAGES),
)
