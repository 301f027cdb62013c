# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""CUDA text of what all attention kernels share: where keys and values lie, and rotation.

Pages hold 16 tokens of all layers. The block of one layer, kind and head is contiguous:

    pages  float16 [page][layer][K, V][kv_head][16 x d]
    K      [16 tokens][d]          a row is what q multiplies
    V      [d][16 tokens]          transposed: pairs of tokens are what probabilities multiply

TVM's cache object decides which page a token gets. Once a forward pass, callbacks of that object
write what they are told into an ``AmxState``, which lies in front of the pages, in the first row of
their tensor. Attention kernels get its address as the argument `state`, which is the same in every
step, so a whole decode step is one CUDA graph. The callbacks find it by its address, which the first
of them leaves in the object's own buffers: in q and k, which the others are given next, and these
leave it in the object's pages for copies between passes.

A sequence's pages are at most two lists (a part that is shared with others, and its own), then,
during prefill, pages that the new tokens open. All but the very last page are full, so token p lies
in page p / 16 of that chain.
"""

from __future__ import annotations

from relax_passes.kernels.cuda.intrinsics.arithmetic import COMMON
from relax_passes.kernels.cuda.intrinsics.base import Intrinsic, Source

STATE_WORDS = 64  # int32 numbers of the argument `state`

STATE = Source(
    "amx_attention_state",
    r"""
struct AmxList {
  const int* starts;   // [entries + 1]: where each one's pages begin in `pages`
  const int* pages;
  const int* rows;     // [entries + 1]: rows of x of each entry, or null: one each
  int count;           // entries
};
struct AmxState {
  half* pages;
  const int* positions;  // of each row of x in its sequence
  const int* slots;      // page * 16 + place in the page, of each row of x where there are several
  const int* rows;       // [sequences + 1]: rows of x of each sequence, or null: one each
  int sequences;
  int position, pages_of_first[2];  // row 0, to spare its kernels dependent loads
  int lists;
  AmxList list[2];
  char* tables;  // behind the pages, for steps of many sequences: see batch_text
  int most;      // pages of a sequence that a table holds
};
static_assert(sizeof(AmxState) <= 256, "the argument `state` is too small");

// Which of several runs of rows a row belongs to: the last that begins at it or before.
__device__ __forceinline__ int amx_run_of(const int* rows, int count, int row) {
  int low = 0;
  for (int high = count; high - low > 1;) {
    const int middle = (low + high) >> 1;
    if (rows[middle] <= row) low = middle; else high = middle;
  }
  return low;
}

// Pages of a sequence, by the first of its rows and that row's position.
struct AmxTable { const int *first, *second, *slots; int n0, n1, start; };

template <bool ONE>
__device__ __forceinline__ AmxTable amx_table(const AmxState* state, int row, int position) {
  AmxTable table = {nullptr, nullptr, state->slots + row, 0, 0, position};
  const int lists = state->lists;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (i >= lists) continue;
    const AmxList list = state->list[i];
    int begin = 0, count = state->pages_of_first[i];
    if (!ONE) {
      const int c = list.rows ? amx_run_of(list.rows, list.count, row) : row;
      begin = list.starts[c];
      count = list.starts[c + 1] - begin;
    }
    if (i == 0) { table.first = list.pages + begin; table.n0 = count; }
    else { table.second = list.pages + begin; table.n1 = count; }
  }
  return table;
}
// Page number `b` of a sequence; one that opens during this pass is found by its first token.
__device__ __forceinline__ int amx_page(const AmxTable& table, int b) {
  if (b < table.n0) return table.first[b];
  if (b < table.n0 + table.n1) return table.second[b - table.n0];
  return table.slots[b * 16 - table.start] >> 4;
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
""",
    COMMON,
)

NORM = Source(
    "amx_attention_norm",
    r"""
// The C channels of a head over the root of their mean square plus eps, times weight; a warp.
template <int C>
__device__ __forceinline__ void amx_norm_head(half* to, const half* x, const void* weight, float eps, int lane) {
  constexpr int EACH = (C / 2 + 31) / 32;
  float2 v[EACH];
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int e = 2 * (i * 32 + lane);
    v[i] = e < C ? __half22float2(*(const half2*)(x + e)) : make_float2(0.f, 0.f);
    sum += v[i].x * v[i].x + v[i].y * v[i].y;
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  const float inverse = rsqrtf(sum / C + eps);
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int e = 2 * (i * 32 + lane);
    if (e >= C) continue;
    const float2 w = __half22float2(*(const half2*)((const half*)weight + e));
    *(half2*)(to + e) = __floats2half2_rn(v[i].x * (inverse * w.x), v[i].y * (inverse * w.y));
  }
}
""",
    COMMON,
)

SINK = Source(
    "amx_attention_sink",
    r"""
// What a head's sink adds to the sum of a softmax whose maximum, in powers of two, is `top`.
__device__ __forceinline__ float amx_sink(const void* sinks, int head, float top) {
  return sinks == nullptr ? 0.f : exp2f(__half2float(((const half*)sinks)[head]) * 1.44269504f - top);
}
""",
    COMMON,
)

# -- what the cache object tells; `carrier` is a buffer of its own that holds the state's address
_CARRIED = Intrinsic(
    "amx_carried",
    "  return *(AmxState* const*)carrier;",
    (STATE,),
    "AmxState*(const void* carrier)",
)
STATE_BEGIN = Intrinsic(
    "amx_state_begin",
    """
  AmxState* state = (AmxState*)store;
  *(AmxState**)q = state;
  *(AmxState**)k = state;
  state->pages = (half*)store + elements;
  state->tables = (char*)store + tables;
  state->most = most;
  state->positions = (const int*)positions;
  state->position = ((const int*)positions)[0];
  state->rows = nullptr;
  state->sequences = rows;
  state->lists = 0;""",
    (STATE,),
    "void(void* store, long long elements, long long tables, int most, const void* positions, int rows, void* q, void* k)",
)
STATE_SLOTS = Intrinsic(
    "amx_state_slots",
    """
  AmxState* state = amx_carried(k);
  *(AmxState**)own = state;
  state->slots = (const int*)slots;""",
    (_CARRIED,),
    "void(const void* k, void* own, const void* slots)",
)
STATE_ROWS = Intrinsic(
    "amx_state_rows",
    """
  AmxState* state = amx_carried(q);
  state->rows = (const int*)rows;
  state->sequences = sequences;""",
    (_CARRIED,),
    "void(const void* q, const void* rows, int sequences)",
)
STATE_LIST = Intrinsic(
    "amx_state_list",
    """
  AmxState* state = amx_carried(q);
  *(AmxState**)own = state;
  const int i = state->lists;
  const int* s = (const int*)starts;
  state->list[i] = AmxList{s, (const int*)pages, (const int*)rows, count};
  state->pages_of_first[i] = s[1] - s[0];
  state->lists = i + 1;""",
    (_CARRIED,),
    "void(const void* q, void* own, const void* starts, const void* pages, const void* rows, int count)",
)
# A fork copies a page: `words` 16-byte words of all layers.
COPY_PAGE = Intrinsic(
    "amx_copy_page",
    """
  uint4* pages = (uint4*)amx_carried(own)->pages;
  if (i < words) pages[to * words + i] = pages[from * words + i];""",
    (_CARRIED,),
    "void(const void* own, long long words, long long from, long long to, long long i)",
)
