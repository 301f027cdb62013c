# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""CUDA text of stored codes: eight channels of a token to eight float16, with their scales.

A word of four-bit codes has the even channels in its low and the odd ones in its high half, so that
one shift and one mask bring two codes to where float16 has sign, exponent and mantissa. Codes 0, 2, 4,
6 (and 1, 3, 5, 7) of a half, by bits, s sign, m magnitude:

    15 14 13 12 11 10  9  8  7  6  5  4  3  2  1  0
    s0 m4 m4 m4 m0 m0 m0 s4 s2 m6 m6 m6 m2 m2 m2 s6

A magnitude at bits 9 to 11 is the E2M1 value times 2^-14, subnormals included. Scales carry 2^21 of
that, so what comes out is the value times 2^-7, `GAIN`'s inverse: small values keep their bits, and
values up to 2^12 do not overflow. A format with a scale for each sign takes a q + b |q| with a and b
half the sum and half the difference of the scales.

Words of eight bits hold channels 0, 2, 1, 3 from the lowest byte on, the next word 4, 6, 5, 7.

Kinds of formats give
    WORDS    words of eight channels
    GAIN     factor that values lack, and its power of two
    scales   the scales of two tokens or two groups, of a word that holds both (alpha, beta as half2)
    unpack   WORDS words to h[4], channels 0 and 1, 2 and 3 ..; of words that hold halves of two
             tokens' words (low: even channels), pairs of tokens
    scaled   a decoded pair times its scales
"""

from __future__ import annotations

from relax_passes.kernels.cuda.intrinsics.arithmetic import COMMON
from relax_passes.kernels.cuda.intrinsics.base import Source

CODES = Source(
    "amx_cache_codes",
    r"""
struct AmxScales { unsigned alpha, beta; };

__device__ __forceinline__ __half2 amx_two(float v) { return __floats2half2_rn(v, v); }

// Four-bit codes, two of each shift.
struct AmxFourBits {
  static constexpr int WORDS = 1;
  static constexpr int GAIN_BITS = 7;
  static constexpr float GAIN = 128.f;
  __device__ static __forceinline__ void unpack(const unsigned* w, unsigned* h) {
    constexpr unsigned BOTH = 0x8e008e00u, SIGN = 0x80008000u, SIZE = 0x0e000e00u;
    h[0] = w[0] & BOTH;
    h[1] = (w[0] << 8) & BOTH;
    h[2] = ((w[0] >> 3) & SIZE) | ((w[0] << 7) & SIGN);
    h[3] = ((w[0] << 5) & SIZE) | ((w[0] << 15) & SIGN);
  }
};
// A scale for each sign, SHIFT bits above a float16's place and in need of a factor.
template <int SHIFT, int FACTOR>
struct AmxPair : AmxFourBits {
  __device__ static __forceinline__ AmxScales scales(unsigned word, int) {
    const __half2 positive = amx_h2(((word << 8) & 0xff00ff00u) >> SHIFT), factor = amx_two((float)FACTOR);
    const __half2 negative = __hmul2(amx_h2((word & 0xff00ff00u) >> SHIFT), factor);
    return {amx_u32(__hfma2(positive, factor, negative)), amx_u32(__hfma2(positive, factor, __hneg2(negative)))};
  }
  __device__ static __forceinline__ unsigned scaled(unsigned q, __half2 alpha, __half2 beta) {
    return amx_u32(__hfma2(amx_h2(q), alpha, __hmul2(__habs2(amx_h2(q)), beta)));
  }
};
typedef AmxPair<0, 64> AmxPairE5M2;
typedef AmxPair<1, 16384> AmxPairE4M3;
// One scale for 16 channels: `sub` says for which half of 32.
struct AmxOneE4M3 : AmxFourBits {
  __device__ static __forceinline__ AmxScales scales(unsigned word, int sub) {
    const unsigned raw = ((word << (sub ? 0 : 8)) & 0xff00ff00u) >> 1;
    return {amx_u32(__hmul2(amx_h2(raw), amx_two(32768.f))), 0u};
  }
  __device__ static __forceinline__ unsigned scaled(unsigned q, __half2 alpha, __half2) {
    return amx_u32(__hmul2(amx_h2(q), alpha));
  }
};
struct AmxEightBits {
  static constexpr int WORDS = 2;
  static constexpr int GAIN_BITS = 0;
  static constexpr float GAIN = 1.f;
  __device__ static __forceinline__ void unpack(const unsigned* w, unsigned* h) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned raw = ((w[i >> 1] >> (8 * (i & 1))) & 0x00ff00ffu) | 0x64006400u;
      h[i] = amx_u32(__hsub2(amx_h2(raw), amx_two(1152.f)));  // 1024 + byte, and 128
    }
  }
  __device__ static __forceinline__ AmxScales scales(unsigned word, int) { return {word, 0u}; }
  __device__ static __forceinline__ unsigned scaled(unsigned q, __half2 alpha, __half2) {
    return amx_u32(__hmul2(amx_h2(q), alpha));
  }
};

// N words of 4 bytes, as wide as their number allows.
template <int N>
__device__ __forceinline__ void amx_read_words(unsigned* d, const void* from) {
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const uint4 v = __ldg((const uint4*)from + i / 4);
      d[i] = v.x; d[i + 1] = v.y; d[i + 2] = v.z; d[i + 3] = v.w;
    }
  } else if constexpr (N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const uint2 v = __ldg((const uint2*)from + i / 2);
      d[i] = v.x; d[i + 1] = v.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) d[i] = __ldg((const unsigned*)from + i);
  }
}

// The same of shared memory.
template <int N>
__device__ __forceinline__ void amx_take_words(unsigned* d, const unsigned char* from) {
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const uint4 v = ((const uint4*)from)[i / 4];
      d[i] = v.x; d[i + 1] = v.y; d[i + 2] = v.z; d[i + 3] = v.w;
    }
  } else if constexpr (N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const uint2 v = ((const uint2*)from)[i / 2];
      d[i] = v.x; d[i + 1] = v.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) d[i] = ((const unsigned*)from)[i];
  }
}

// A panel of 16 tokens: where its parts begin, in bytes.
template <class F, int D>
struct AmxPanelBytes {
  static constexpr int ROW = D / 2 * F::WORDS, SCALES = D / 16;
  static constexpr int KEY_SCALES = 16 * ROW, VALUES = KEY_SCALES + 16 * SCALES;
  static constexpr int VALUE_SCALES = VALUES + 16 * ROW, ALL = VALUE_SCALES + 16 * SCALES;
  // Words of the channels 8c .. 8c + 7, and their scales' place.
  __device__ static __forceinline__ int key_word(int c) { return ((c & 3) * (D / 32) + (c >> 2)) * F::WORDS; }
  __device__ static __forceinline__ int value_word(int c) { return ((c & 7) * (D / 64) + (c >> 3)) * F::WORDS; }
};

// Eight channels 8c .. of a token of a panel, as float16.
template <class F, int D>
__device__ __forceinline__ uint4 amx_held(const unsigned char* panel, bool value, int token, int c) {
  typedef AmxPanelBytes<F, D> At;
  unsigned w[F::WORDS], h[4];
  const int word = value ? At::value_word(c) : At::key_word(c);
  const unsigned char* codes = panel + (value ? At::VALUES : 0) + token * At::ROW;
  amx_read_words<F::WORDS>(w, codes + 4 * word);
  const unsigned scale = __ldg((const unsigned*)(panel + (value ? At::VALUE_SCALES : At::KEY_SCALES) + token * At::SCALES) + (c >> 3));
  const AmxScales both = F::scales(scale, (c >> 1) & 1);
  const bool upper = (c >> 2) & 1;
  F::unpack(w, h);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const unsigned v = F::scaled(h[i], amx_row(both.alpha, upper), amx_row(both.beta, upper));
    h[i] = amx_u32(__hmul2(amx_h2(v), amx_two(F::GAIN)));
  }
  return make_uint4(h[0], h[1], h[2], h[3]);
}
""",
    COMMON,
)
