# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""CUDA text of decode attention for many sequences: work divided by tokens over all multiprocessors.

A step begins with `PLAN`. It copies every sequence's pages to a table, [MOST][state->most] page ids,
so that the cache object may prepare the next step at once, and divides the pages into items: about
as many for each kv head as fill the multiprocessors once to `ROUNDS` times, whichever takes the
fewest pages a round, and none shorter than `SHORTEST` pages: a sequence is one item unless it is long
beside the others. Windows differ between layers: each has items of its own.

    tables   counts int [16]: items of each window
             items  AmxItem [windows][ITEMS]
             arrived int [MOST][H]: parts of a sequence that are done, zero between layers
             parts  float [ITEMS][H][G][D + 2]: sums of values, maximum and sum of each query
             pages  int [MOST][state->most]

`ATTEND` is a block for each item and each of H = KV * PARTS groups of queries; blocks without an item
return. Of a sequence with several items, the block that is done last joins the parts. Up to FEW
sequences have a kernel of their own, whose blocks have more warps.
"""

from __future__ import annotations

from relax_passes.attention_spec import AttentionSpec
from relax_passes.kernels.cuda.intrinsics.base import Intrinsic, Source
from relax_passes.kernels.cuda.intrinsics.sync import LAUNCH_DEPENDENTS, WAIT_PREREQUISITES

from .config import EXTRAS, Heads, declared, extras, frequencies, passed
from .decode_text import ATTEND_PAGES
from .division import DIVIDE, Division
from .state_text import STATE

WARPS = 3  # a block of three leaves room for a fourth, and 128 tokens are three pages a warp
FEW_WARPS = 8  # of few sequences, which leave multiprocessors idle: 128 tokens are a page a warp
SHORTEST = 16  # pages of an item
_BEGIN = 18  # pages that a block could attend to while it begins and ends

ITEM = Source(
    "amx_attention_item",
    r"""
// Pages begin .. end - 1 of a sequence's row of x, the split-th of its `splits` items.
struct __align__(16) AmxItem { int row, position, begin, end, split, splits, spare[2]; };
static_assert(sizeof(AmxItem) == 32, "items are two words of 16 bytes");
""",
)

PLAN = Source(
    "amx_plan_text",
    r"""
// Sum over the threads before and at this one of a block of 256.
__device__ __forceinline__ int amx_until(int value, int* shared, int tid) {
  __syncthreads();
  shared[tid] = value;
  for (int step = 1; step < 256; step <<= 1) {
    __syncthreads();
    const int before = tid >= step ? shared[tid - step] : 0;
    __syncthreads();
    shared[tid] += before;
  }
  __syncthreads();
  return shared[tid];
}

// Into how many items of about a size a sequence is divided.
__device__ __forceinline__ int amx_splits(int pages, int item) { return max(1, (2 * pages + item) / (2 * item)); }

// Block 0 makes the items, block 1 + r the table of sequence r.
template <int H, int MOST, int ITEMS, int SLOTS, int FEW_SLOTS, int SHORTEST, int ROUNDS, int FEW, int BEGIN>
__device__ __forceinline__ void amx_plan(const AmxState* state, const int* windows, int kinds, long long arrived_at,
                                         long long pages_at, int rows, int block, int tid) {
  const int n = min(min(state->sequences, rows), MOST);
  if (block > 0) {
    const int row = block - 1;
    if (row >= n) return;
    const int position = state->positions[row];
    const AmxTable table = amx_table<false>(state, row, position);
    int* to = (int*)(state->tables + pages_at) + (long long)row * state->most;
    for (int b = tid; b <= position >> 4; b += 256) to[b] = amx_page(table, b);
    return;
  }
  __shared__ int sums[256], pages_of[256], cost[8], size[8];
  int* counts = (int*)state->tables;
  int* arrived = (int*)(state->tables + arrived_at);
  for (int i = tid; i < n * H; i += 256) arrived[i] = 0;
  const int position = tid < n ? state->positions[tid] : 0;
  for (int kind = 0; kind < kinds; ++kind) {
    AmxItem* items = (AmxItem*)(state->tables + 64) + kind * ITEMS;
    const int window = windows[kind];
    const int first = window > 0 ? max(0, position + 1 - window) >> 4 : 0;
    const int pages = tid < n ? (position >> 4) - first + 1 : 0;
"""
    + DIVIDE
    + r"""    for (int s = 0; s < splits; ++s)
      items[until - splits + s] =
          AmxItem{tid, position, first + pages * s / splits, first + pages * (s + 1) / splits, s, splits, {0, 0}};
    if (tid == 255) counts[kind] = until;
  }
}
""",
    (STATE, ITEM),
)

ATTEND = Source(
    "amx_attend_items_text",
    r"""
template <int D, int C, int G, int KV, int PARTS, int ITEMS, int WARPS, int HALF, bool DEPENDENT>
__device__ __forceinline__ void amx_attend_item(float* shared, const void* qkv_, const void* state_, void* out_,
                                                const void* sinks, const void* q_norm, const void* k_norm, float eps,
                                                const float* frequencies, float factor, int kind, long long items_at,
                                                long long arrived_at, long long parts_at, long long pages_at, int layer,
                                                int layers, float scale, float cap, int window, int number, int head,
                                                int warp, int lane) {
  constexpr int H = KV * PARTS, HEADS = G * H, THREADS = WARPS * 32, STRIDE = D + 8, PART = G * (D + 2);
  constexpr int ROWS = G > 8 ? 16 : 8, BLOCK = 16 * D;
  const AmxState* state = (const AmxState*)state_;
  half* out = (half*)out_;
  half* qs = (half*)shared;                             // [ROWS][STRIDE]
  float2* turn = (float2*)(shared + ROWS * STRIDE / 2);  // [HALF]
  float* part = shared + ROWS * STRIDE / 2 + 2 * HALF;   // [WARPS][G][D]
  float* tops = part + WARPS * G * D;                   // [WARPS][G][2]
  int* before = (int*)(tops + WARPS * G * 2);           // parts that were done before this one
  const int tid = warp * 32 + lane, g = lane >> 2, t = lane & 3;
  if (DEPENDENT) amx_launch_dependents();

  char* tables = state->tables;
  if (number >= ((const int*)tables)[kind]) return;
  const AmxItem item = ((const AmxItem*)(tables + items_at))[number];
  const int* row_of = (const int*)(tables + pages_at) + (long long)item.row * state->most;
  const auto pages = [&](int page) { return row_of[page]; };
  const int length = item.position + 1, last = item.position >> 4;
  const int low = window > 0 ? max(0, length - window) : 0;
  const long long stride = (long long)layers * 2 * KV * BLOCK;
  half* base = state->pages + ((long long)layer * 2 * KV + head / PARTS) * BLOCK;
  const int page = item.begin + warp;
  const int id = page < item.end ? pages(page) : 0;
  uint4 k[2][D / 32];
  if (page < item.end && page < last) amx_load_keys<D>(k, base + id * stride, g, t);
  for (int i = tid; i < HALF; i += THREADS) turn[i] = amx_turn(item.position, frequencies[i], factor);
  __syncthreads();
  if (DEPENDENT) amx_wait_prerequisites();

  const half* mine = (const half*)qkv_ + (long long)item.row * (HEADS + 2 * KV) * C;
  half* target = item.end > last ? base + pages(last) * stride : nullptr;
  amx_take_token<D, C, G, KV, PARTS, THREADS, HALF>(qs, (half*)part, mine, turn, target, item.position & 15, q_norm, k_norm,
                                                    eps, head, tid);
  __syncthreads();
  AmxSoftmax<D, ROWS> seen;
  amx_attend_pages<D, KV, ROWS>(seen, qs, k, base, stride, pages, page, id, WARPS, item.end, low, length, scale, cap, g, t);
  amx_show_warp<D, G>(seen, part, tops, warp, g, t);

  float* parts = (float*)(tables + parts_at);
  float* own = parts + ((long long)number * H + head) * PART;
  half* to = out + ((long long)item.row * HEADS + head * G) * C;
  for (int i = tid; i < G * D / 2; i += THREADS) {
    const int r = 2 * i / D, e = 2 * i % D;
    float2 acc;
    const float2 found = amx_join_warps<D, G, WARPS>(part, tops, r, e, acc);
    if (item.splits == 1) {
      const float total = found.y + amx_sink(sinks, head * G + r, found.x);
      if (e < C) *(half2*)(to + r * C + e) = __floats2half2_rn(acc.x / total, acc.y / total);
    } else {
      __stcg((float2*)(own + r * D + e), acc);
      if (e == 0) __stcg((float2*)(own + G * D + 2 * r), found);
    }
  }
  if (item.splits == 1) return;
  __threadfence();
  __syncthreads();
  int* arrived = (int*)(tables + arrived_at) + item.row * H + head;
  if (tid == 0) *before = atomicAdd(arrived, 1);
  __syncthreads();
  if (*before != item.splits - 1) return;
  if (tid == 0) *arrived = 0;
  __threadfence();
  const float* first = parts + ((long long)(number - item.split) * H + head) * PART;
  for (int i = tid; i < G * D / 2; i += THREADS) {
    const int r = 2 * i / D, e = 2 * i % D;
    float best = -1e30f, total = 0.f, a = 0.f, b = 0.f;
    for (int p = 0; p < item.splits; ++p) {  // a running maximum: no second pass over the parts
      const float* from = first + (long long)p * H * PART;
      const float2 stats = __ldcg((const float2*)(from + G * D + 2 * r));
      const float2 x = __ldcg((const float2*)(from + r * D + e));
      const float top = fmaxf(best, stats.x), old = exp2f(best - top), now = exp2f(stats.x - top);
      total = total * old + stats.y * now;
      a = a * old + x.x * now;
      b = b * old + x.y * now;
      best = top;
    }
    total += amx_sink(sinks, head * G + r, best);
    if (e < C) *(half2*)(to + r * C + e) = __floats2half2_rn(a / total, b / total);
  }
}
""",
    (ATTEND_PAGES, ITEM, LAUNCH_DEPENDENTS, WAIT_PREREQUISITES),
)


class Batches(Division):
    """The division of pages in 16 bits."""

    warps = WARPS
    begin = 64  # the counts
    few_warps = FEW_WARPS

    def resident(self, warps: int) -> int:
        """Blocks of so many warps that a multiprocessor holds, by their registers."""
        rows = 16 if self.heads.group > 8 else 8
        return max(1, (12 if self.heads.stored * rows <= 1024 else 6) // warps)

    @property
    def pages_at(self) -> int:
        """Offset of the table of pages, 4 `MOST_SEQUENCES` bytes for each page."""
        return self.parts_end

    def plan(self) -> Intrinsic:
        """Build the function that begins a step."""
        windows = ", ".join(map(str, self.windows))
        numbers = self.sizes(SHORTEST, _BEGIN)
        return Intrinsic(
            f"amx_plan_{self.heads.blocks}_{len(self.windows)}",
            f"""
  const int windows[] = {{{windows}}};
  amx_plan<{numbers}>((const AmxState*)state, windows, {len(self.windows)}, {self.arrived_at}, {self.pages_at}, rows,
                      block, tid);""",
            (PLAN,),
            "void(const void* state, int rows, int block, int tid)",
        )

    def attend(self, spec: AttentionSpec, layers: int, warps: int) -> Intrinsic:
        """Build the function of one block of a layer's attention, of so many warps."""
        turns, half = frequencies(spec.rotation), spec.rotation.pairs
        names = extras(spec)
        kind = self.windows.index(spec.window)
        dependent = "true" if self.gpu.clusters else "false"
        numbers = f"{self.heads.numbers}, {self.items}, {warps}, {half}, {dependent}"
        return Intrinsic(
            "_".join([f"amx_attend_item_{turns.name}_{self.heads.name}_{kind}_{warps}", *names]),
            f"""
  amx_attend_item<{numbers}>(shared, qkv, state, out, {passed(spec, EXTRAS)}, {spec.norm_eps!r}f, {turns.name}, {spec.rotation.factor!r}f, {kind}, {self.items_at(kind)},
                             {self.arrived_at}, {self.parts_at}, {self.pages_at}, layer, {layers}, scale, cap,
                             {spec.window}, number, head, warp, lane);""",
            (ATTEND, turns),
            f"void(float* shared, const void* qkv, const void* state, {declared(names)}void* out, int layer, "
            "float scale, float cap, int number, int head, int warp, int lane)",
        )


def shared_floats(spec: AttentionSpec, warps: int) -> int:
    """Floats of shared memory that ``amx_attend_item`` lays out."""
    heads = Heads(spec)
    d, rows = heads.stored, 16 if heads.group > 8 else 8
    return rows * (d + 8) // 2 + 2 * spec.rotation.pairs + warps * heads.group * (d + 2) + 1
