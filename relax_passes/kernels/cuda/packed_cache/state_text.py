# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""CUDA text of what all kernels of the cache share: its tensors, its sequences, and the matrix.

The argument `state` holds the addresses of the cache's tensors (layout.py); `SETUP` writes them when
the cache is made. They never change, so a whole decode step is one CUDA graph.
"""

from __future__ import annotations

from relax_passes.kernels.cuda.attention.state_text import STATE as ROTATION
from relax_passes.kernels.cuda.attention.state_text import STATE_WORDS
from relax_passes.kernels.cuda.intrinsics.base import Intrinsic, Source

from .codes_text import CODES
from .layout import HEADER

STATE = Source(
    "amx_packed_state",
    f"constexpr int AMX_HEADER = {HEADER};"
    r"""
struct AmxPacked {
  unsigned char* pages;
  half* recent;
  const int* told;
  char* work;
};
static_assert(sizeof(AmxPacked) <= 256, "the argument `state` is too small");
struct __align__(16) AmxSequence { int row, rows, before, exact, place, table, spare[2]; };

__device__ __forceinline__ const AmxSequence* amx_sequences(const AmxPacked* state) {
  return (const AmxSequence*)(state->told + AMX_HEADER);
}
// How many of a sequence's tokens are in pages when a pass begins: rolled back ones are not.
__device__ __forceinline__ int* amx_rounded(const AmxPacked* state, int place) { return (int*)state->told + state->told[3] + place; }
__device__ __forceinline__ int amx_rounded_before(const AmxPacked* state, const AmxSequence& s) {
  return max(0, min(*amx_rounded(state, s.place), s.before));
}
// Positions of the rows of a step; behind them their sequences.
__device__ __forceinline__ const int* amx_rows(const AmxPacked* state) { return state->told + state->told[2]; }

// One layer's and head's panels of a sequence.
template <class F, int D, int LAYERS, int KV>
struct AmxPanels {
  const int* table;
  unsigned char* base;
  __device__ __forceinline__ AmxPanels(const AmxPacked* state, int table_at, int layer, int kv)
      : table(state->told + table_at), base(state->pages + (long long)(layer * KV + kv) * 4 * AmxPanelBytes<F, D>::ALL) {}
  __device__ __forceinline__ int page(int panel) const { return table[panel >> 2]; }
  __device__ __forceinline__ unsigned char* of(int page, int panel) const {
    constexpr int ALL = AmxPanelBytes<F, D>::ALL;
    return base + (long long)page * (4ll * LAYERS * KV * ALL) + (panel & 3) * ALL;
  }
  __device__ __forceinline__ unsigned char* operator()(int panel) const { return of(page(panel), panel); }
};

// One layer's and head's tokens in 16 bits of a sequence.
template <int D, int NEWEST, int FIRST, int LAYERS, int KV>
struct AmxRecent {
  half *keys, *values, *first_keys, *first_values;
  __device__ __forceinline__ AmxRecent(const AmxPacked* state, int place, int layer, int kv) {
    keys = state->recent + ((long long)place * LAYERS * KV + layer * KV + kv) * (2 * (NEWEST + FIRST) * D);
    values = keys + NEWEST * D;
    first_keys = values + NEWEST * D;
    first_values = first_keys + FIRST * D;
  }
  // Where channel e of a token is
  __device__ __forceinline__ half* key(int position, int e) const { return keys + position % NEWEST * D + e; }
  __device__ __forceinline__ half* value(int position, int e) const {
    const int slot = position % NEWEST;
    return values + ((slot >> 4) * D + e) * 16 + 4 * (slot >> 1 & 3) + 2 * (slot >> 3 & 1) + (slot & 1);
  }
  __device__ __forceinline__ void put(int position, int e, half k, half v) const {
    *key(position, e) = k;
    *value(position, e) = v;
    if (position < FIRST) { first_keys[position * D + e] = k; first_values[e * FIRST + position] = v; }
  }
};

// Multiply a row by Sylvester's Hadamard matrix of SIZE channels, 0 for none: lane i has the
// channels i, i + 32 ..
template <int D, int SIZE>
__device__ __forceinline__ void amx_turn_row(float* v, int lane) {
  static_assert(SIZE == 0 || SIZE == 64 || SIZE == 128 || SIZE == 256, "no factor for the matrix");
  if constexpr (SIZE > 0) {
#pragma unroll
    for (int bit = 1; bit < 32; bit <<= 1)
#pragma unroll
      for (int i = 0; i < D / 32; ++i) {
        const float other = __shfl_xor_sync(0xffffffffu, v[i], bit);
        v[i] = lane & bit ? other - v[i] : v[i] + other;
      }
#pragma unroll
    for (int bit = 1; bit < SIZE / 32; bit <<= 1)
#pragma unroll
      for (int i = 0; i < D / 32; ++i)
        if (!(i & bit)) {
          const float low = v[i], high = v[i | bit];
          v[i] = low + high;
          v[i | bit] = low - high;
        }
    constexpr float factor = SIZE == 64 ? 0.125f : SIZE == 128 ? 0.088388348f : 0.0625f;
#pragma unroll
    for (int i = 0; i < D / 32; ++i) v[i] *= factor;
  }
}
""",
    (ROTATION, CODES),
)

SETUP = Intrinsic(
    "amx_packed_setup",
    "  *(AmxPacked*)state = AmxPacked{(unsigned char*)pages, (half*)recent, (const int*)told, (char*)work};",
    (STATE,),
    "void(void* state, void* pages, void* recent, void* told, void* work)",
)

__all__ = ["SETUP", "STATE", "STATE_WORDS"]
