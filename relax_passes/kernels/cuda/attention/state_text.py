# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""CUDA text of what all attention kernels share: where keys and values lie, and rotation.

Pages hold 16 tokens of all layers. The block of one layer, kind and head is contiguous:

    pages  float16 [page][layer][K, V][kv_head][16 x d]
    K      [16 tokens][d]          a row is what q multiplies
    V      [d][16 tokens]          transposed: pairs of tokens are what probabilities multiply

TVM's cache object decides which page a token gets. Once a forward pass, callbacks of that object
write what they are told into ``amx_state``, a variable of the loaded module; attention kernels read
it, take no argument that changes from step to step, and a whole decode step is one CUDA graph.

A sequence's pages are at most two lists (a part that is shared with others, and its own), then,
during prefill, pages that the new tokens open. All but the very last page are full, so token p lies
in page p / 16 of that chain.
"""

from __future__ import annotations

from relax_passes.kernels.cuda.intrinsics import TEXT

STATE = (
    TEXT
    + r"""
#ifndef AMX_ATTENTION_STATE
#define AMX_ATTENTION_STATE
struct AmxList {
  const int* starts;   // [sequences + 1]: where each one's pages begin in `pages`
  const int* pages;
  const int* rows;     // [sequences + 1]: rows of x of each, or null: one each
  int count;           // sequences
};
struct AmxState {
  half* pages;
  const int* positions;  // of each row of x in its sequence
  const int* slots;      // page * 16 + token in the page, of each row of x
  int position, pages_of_first[2];  // row 0, to spare its kernels dependent loads
  int lists;
  AmxList list[2];
};
__device__ AmxState amx_state;

struct AmxTable { const int *first, *second; int n0, n1; };

template <bool ONE>
__device__ __forceinline__ AmxTable amx_table(int row) {
  AmxTable table = {nullptr, nullptr, 0, 0};
  const int lists = amx_state.lists;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (i >= lists) continue;
    const AmxList list = amx_state.list[i];
    int begin = 0, count = amx_state.pages_of_first[i];
    if (!ONE) {
      int c = row;
      if (list.rows) for (c = 0; c + 1 < list.count && list.rows[c + 1] <= row;) ++c;
      begin = list.starts[c];
      count = list.starts[c + 1] - begin;
    }
    if (i == 0) { table.first = list.pages + begin; table.n0 = count; }
    else { table.second = list.pages + begin; table.n1 = count; }
  }
  return table;
}
// Page number `b` of a sequence; one that opens during this prefill is found by its first token.
__device__ __forceinline__ int amx_page(const AmxTable& table, int b) {
  if (b < table.n0) return table.first[b];
  if (b < table.n0 + table.n1) return table.second[b - table.n0];
  return amx_state.slots[b * 16 - amx_state.positions[0]] >> 4;
}
// Cosine and sine of position * frequency. The product is rounded to float32 as everywhere, reduced
// to half a turn in two steps (6.28125 has few bits, so the first is exact), and then small enough for
// the fast functions.
__device__ __forceinline__ float2 amx_turn(int position, float frequency, float factor) {
  const float angle = (float)position * frequency, turns = rintf(angle * 0.15915494f);
  const float rest = fmaf(turns, -0.0019353072f, fmaf(turns, -6.28125f, angle));
  float s, c;
  __sincosf(rest, &s, &c);
  return make_float2(c * factor, s * factor);
}
// Element e of a head after rotation; channel i < half turns with channel i + half.
__device__ __forceinline__ float amx_rotated(const half* x, int e, int half_, const float2* turn) {
  const float v = __half2float(x[e]);
  if (e < half_) return v * turn[e].x - __half2float(x[e + half_]) * turn[e].y;
  if (e < 2 * half_) return v * turn[e - half_].x + __half2float(x[e - half_]) * turn[e - half_].y;
  return v;
}
// -- what the cache object tells
__device__ __forceinline__ void amx_state_begin(const void* pages, const void* positions) {
  amx_state.pages = (half*)pages;
  amx_state.positions = (const int*)positions;
  amx_state.position = ((const int*)positions)[0];
  amx_state.lists = 0;
}
__device__ __forceinline__ void amx_state_slots(const void* slots) {
  amx_state.slots = (const int*)slots;
}
__device__ __forceinline__ void amx_state_list(const void* starts, const void* pages, const void* rows,
                                               int count) {
  const int i = amx_state.lists;
  const int* s = (const int*)starts;
  amx_state.list[i] = AmxList{s, (const int*)pages, (const int*)rows, count};
  amx_state.pages_of_first[i] = s[1] - s[0];
  amx_state.lists = i + 1;
}
// A fork copies a page: `words` 16-byte words of all layers.
__device__ __forceinline__ void amx_copy_page(long long words, long long from, long long to, long long i) {
  uint4* pages = (uint4*)amx_state.pages;
  if (i < words) pages[to * words + i] = pages[from * words + i];
}
#endif
"""
)
