# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""CUDA text of decode attention over rounded pages, for any number of sequences.

A step begins with `PLAN`, which divides the sequences' panels into items as ``attention/batch_text.py``
does pages, and notes what has been rounded; the tokens in 16 bits count as `EXTRA` panels and belong to a sequence's last item. Tables
of a step, by offset:

    work     items  AmxPart [windows][ITEMS]: panels, and where a sequence's tokens are; zeros end them
             arrived int [MOST][H]: parts of a sequence that are done, zero between layers
             parts  float [ITEMS][H][G][D + 2]: sums of values, maximum and sum of each query

`ATTEND` is a block for each item and block of heads. It turns its queries and, in a sequence's last
item, the new key and value, which go to the tokens in 16 bits. The result is turned back where the
parts of a sequence meet.
"""

from __future__ import annotations

from relax_passes.kernels.cuda.attention.batch_text import PLAN as DIVISION
from relax_passes.kernels.cuda.attention.division import DIVIDE
from relax_passes.kernels.cuda.intrinsics.base import Source
from relax_passes.kernels.cuda.intrinsics.memory import PREFETCH
from relax_passes.kernels.cuda.intrinsics.sync import LAUNCH_DEPENDENTS, WAIT_PREREQUISITES

from .panel_text import PANELS

PART = Source(
    "amx_packed_part",
    r"""
// Panels begin .. end - 1 of a sequence, row `row` of x: the split-th (low half) of its `splits` (high half)
// items, none where that is 0. Tokens from `exact` on are in 16 bits at `place`, the others where `table` says.
struct __align__(16) AmxPart { int row, position, begin, end, split, exact, place, table; };
static_assert(sizeof(AmxPart) == 32, "items are two words of 16 bytes");
""",
)

PLAN = Source(
    "amx_packed_plan_text",
    r"""
template <int H, int MOST, int ITEMS, int SLOTS, int FEW_SLOTS, int SHORTEST, int ROUNDS, int FEW, int BEGIN, int EXTRA,
          int NEWEST, int FIRST>
__device__ __forceinline__ void amx_packed_plan(const AmxPacked* state, const int* windows, int kinds, long long arrived_at,
                                                int rows, int tid) {
  __shared__ int sums[256], pages_of[256], cost[8], size[8];
  const int all = state->told[0], n = min(min(all, rows), MOST);
  for (int b = tid; b < all; b += 256) {
    AmxSequence* s = (AmxSequence*)amx_sequences(state) + b;
    s->exact = amx_rounded_before(state, *s);
    *amx_rounded(state, s->place) = max(s->exact, s->before + s->rows - NEWEST);
  }
  __syncthreads();
  int* arrived = (int*)(state->work + arrived_at);
  for (int i = tid; i < n * H; i += 256) arrived[i] = 0;
  AmxSequence mine = {0, 0, 0, 0, 0, 0, {0, 0}};
  if (tid < n) mine = amx_sequences(state)[tid];
  const int position = mine.before, exact = max(mine.exact, position + 1 - NEWEST);
  for (int kind = 0; kind < kinds; ++kind) {
    AmxPart* items = (AmxPart*)state->work + kind * ITEMS;
    const int window = windows[kind];
    const int least = max(window > 0 ? max(0, position + 1 - window) : 0, FIRST), first = least >> 4;
    const int pages = tid < n ? max(0, ((exact + 15) >> 4) - first) + EXTRA : 0;
"""
    + DIVIDE
    + r"""    for (int s = 0; s < splits; ++s)
      items[until - splits + s] = AmxPart{tid, position, first + pages * s / splits, first + pages * (s + 1) / splits, s | splits << 16,
                                          exact, mine.place, mine.table};
    for (int i = sums[255] + tid; i < ITEMS; i += 256) items[i].split = 0;
  }
}
""",
    (DIVISION, PANELS, PART),
)

ATTEND = Source(
    "amx_attend_packed_text",
    r"""
// Where a query of a block is among the columns of products.
__device__ __forceinline__ int amx_column(int query) { return (query & ~7) + (query & 4 ? 2 * (query & 7) - 7 : 2 * (query & 7)); }

// Rotated and turned queries of a block to shared memory, [ROWS][D + 8], rows of no query zero; the
// new token's key and value to its slots, where they are given.
template <int D, int G, int KV, int PARTS, int WARPS, int HALF, int NEWEST, int FIRST, int TURN, class Recent>
__device__ __forceinline__ void amx_take_turned(half* qs, const half* mine, const float2* turn, const Recent* recent,
                                                int position, int head, int warp, int lane) {
  constexpr int HEADS = G * KV * PARTS, ROWS = (G + 7) / 8 * 8, STRIDE = D + 8;
  const int kv = head / PARTS;
  for (int r = warp; r < G + (recent != nullptr ? 2 : 0); r += WARPS) {
    const half* x = mine + (r < G ? head * G + r : HEADS + (r - G) * KV + kv) * D;
    float v[D / 32];
#pragma unroll
    for (int i = 0; i < D / 32; ++i)
      v[i] = r > G ? __half2float(x[lane + 32 * i]) : amx_rotated(x, lane + 32 * i, HALF, turn);
    amx_turn_row<D, TURN>(v, lane);
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      const int e = lane + 32 * i;
      const half x = __float2half_rn(v[i]);
      if (r < G) { qs[amx_column(r) * STRIDE + e] = x; continue; }
      *(r == G ? recent->key(position, e) : recent->value(position, e)) = x;
      if (position < FIRST) *(r == G ? recent->first_keys + position * D + e : recent->first_values + e * FIRST + position) = x;
    }
  }
  for (int i = warp * 32 + lane; i < (ROWS - G) * D; i += WARPS * 32) qs[amx_column(G + i / D) * STRIDE + i % D] = __float2half_rn(0.f);
}

template <class F, int D, int NEWEST, int FIRST, int TURN, int LAYERS, int KV, int G, int PARTS, int ITEMS, int WARPS, int STAGES, int HALF,
          bool DEPENDENT>
__device__ __forceinline__ void amx_attend_packed(float* shared, const void* qkv_, const void* state_, void* out_, const void* sinks,
                                                  const float* frequencies, float factor, long long items_at,
                                                  long long arrived_at, long long parts_at, int layer, float scale, float cap,
                                                  int window, int number, int head, int warp, int lane) {
  constexpr int H = KV * PARTS, HEADS = G * H, THREADS = WARPS * 32, STRIDE = D + 8, PART = G * (D + 2);
  constexpr int TILES = (G + 7) / 8, ROWS = 8 * TILES, UNITS = NEWEST / 16, E = G > 4 ? 2 : 1;
  typedef AmxPanelBytes<F, D> At;
  constexpr int ROOM = WARPS * (STAGES * At::ALL > 4 * G * D ? STAGES * At::ALL : 4 * G * D) / 4;
  const AmxPacked* state = (const AmxPacked*)state_;
  half* out = (half*)out_;
  float* part = shared;                                 // [WARPS][G][D], then the result [G][D]
  unsigned char* ring = (unsigned char*)shared + warp * (STAGES * At::ALL);  // [WARPS][STAGES] panels, before
  half* qs = (half*)(shared + ROOM);         // [ROWS][STRIDE]
  float2* turn = (float2*)(qs + ROWS * STRIDE);         // [HALF]
  float* tops = (float*)(turn + HALF);                  // [WARPS][G][2]
  int* before = (int*)(tops + WARPS * G * 2);           // parts that were done before this one
  const int tid = warp * 32 + lane, g = lane >> 2, t = lane & 3;
  if (DEPENDENT) amx_launch_dependents();

  char* work = state->work;
  const AmxPart item = ((const AmxPart*)(work + items_at))[number];
  const int splits = item.split >> 16;
  if (splits == 0) return;
  const int position = item.position, exact = item.exact, low = window > 0 ? max(0, position + 1 - window) : 0;
  const int least = max(low, FIRST), end = min(item.end, (exact + 15) >> 4);
  const bool newest = (item.split & 0xffff) == splits - 1;
  const AmxPanels<F, D, LAYERS, KV> panels(state, item.table, layer, head / PARTS);
  const AmxRecent<D, NEWEST, FIRST, LAYERS, KV> recent(state, item.place, layer, head / PARTS);
  const unsigned to = amx_smem(ring) + 16 * lane;
  int panel = item.begin + warp, stage = 0, asked = panel;
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i, asked += WARPS) {
    if (asked < end) amx_request_panel<F, D>(to + i * At::ALL, panels.of(panels.page(asked), asked) + 16 * lane);
    amx_copy_commit();
  }
  int page = asked < end ? panels.page(asked) : 0;
  if (newest)
    for (int i = tid; i < 2 * (NEWEST + FIRST) * D / 64; i += THREADS)
      amx_prefetch(recent.keys + 64 * i);
  for (int i = tid; i < HALF; i += THREADS) turn[i] = amx_turn(position, frequencies[i], factor);
  __syncthreads();
  if (DEPENDENT) amx_wait_prerequisites();

  const half* mine = (const half*)qkv_ + (long long)item.row * (HEADS + 2 * KV) * D;
  amx_take_turned<D, G, KV, PARTS, WARPS, HALF, NEWEST, FIRST, TURN>(qs, mine, turn, newest ? &recent : nullptr, position, head, warp, lane);
  __syncthreads();
  AmxSeen<D, TILES> seen;
  AmxQuery<D, TILES> query;
  amx_see_nothing<D, TILES>(seen);
  amx_load_query<D, TILES>(query, qs, g, t);
#pragma unroll 1
  for (; panel < end; panel += WARPS) {
    amx_copy_wait<STAGES - 2>();
    __syncwarp();  // the panel is there for all lanes, and all have read the one before
    if (asked < end) {
      const int sub = WARPS % 4 == 0 ? panel : asked;  // of the four of a page
      amx_request_panel<F, D>(to + (stage == 0 ? STAGES - 1 : stage - 1) * At::ALL, panels.of(page, sub) + 16 * lane);
    }
    amx_copy_commit();
    asked += WARPS;
    if (asked < end) page = panels.page(asked);
    amx_attend_panel<F, D, TILES, E>(seen, query, ring + stage * At::ALL, panel * 16, least, exact, scale, cap, g, t);
    stage = stage == STAGES - 1 ? 0 : stage + 1;
  }
  if (newest) {
#pragma unroll 1
    for (int unit = WARPS - 1 - warp; unit < UNITS; unit += WARPS) {
      const auto counts = [&](int slot) {
        const int at = position - (position + NEWEST - 16 * unit - slot) % NEWEST;  // the slot's newest token
        return at >= max(exact, least);
      };
      const int from = 16 * unit * D;
      amx_attend_exact<D, TILES, E, 0>(seen, query, recent.keys + from, recent.values + from, counts, scale, cap, g, t);
    }
    if (FIRST > 0 && warp == WARPS - 1 - UNITS % WARPS) {
      const auto counts = [&](int slot) { return slot < FIRST && slot <= position && slot >= low; };
      amx_attend_exact<D, TILES, E, FIRST>(seen, query, recent.first_keys, recent.first_values, counts, scale, cap, g, t);
    }
  }
  __syncthreads();  // the room of panels becomes that of parts
  amx_show_panels<D, G, TILES>(seen, part, tops, warp, g, t);

  float* parts = (float*)(work + parts_at);
  float* own = parts + ((long long)number * H + head) * PART;
  for (int i = tid; i < G * D / 2; i += THREADS) {
    const int r = 2 * i / D, e = 2 * i % D;
    float2 acc;
    const float2 found = amx_join_warps<D, G, WARPS>(part, tops, r, e, acc);
    if (splits == 1) {
      const float total = found.y + amx_sink(sinks, head * G + r, found.x);
      *(float2*)(part + r * D + e) = make_float2(acc.x / total, acc.y / total);  // read by this thread alone
    } else {
      __stcg((float2*)(own + r * D + e), acc);
      if (e == 0) __stcg((float2*)(own + G * D + 2 * r), found);
    }
  }
  if (splits > 1) {
    __threadfence();
    __syncthreads();
    int* arrived = (int*)(work + arrived_at) + item.row * H + head;
    if (tid == 0) *before = atomicAdd(arrived, 1);
    __syncthreads();
    if (*before != splits - 1) return;
    if (tid == 0) *arrived = 0;
    __threadfence();
    const float* first = parts + ((long long)(number - (item.split & 0xffff)) * H + head) * PART;
    for (int i = tid; i < G * D / 2; i += THREADS) {
      const int r = 2 * i / D, e = 2 * i % D;
      float best = AMX_NONE, total = 0.f, a = 0.f, b = 0.f;
      for (int p = 0; p < splits; ++p) {  // a running maximum: no second pass over the parts
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
      *(float2*)(part + r * D + e) = make_float2(a / total, b / total);
    }
  }
  __syncthreads();
  for (int r = warp; r < G; r += WARPS) {
    float v[D / 32];
#pragma unroll
    for (int i = 0; i < D / 32; ++i) v[i] = part[r * D + lane + 32 * i];
    amx_turn_row<D, TURN>(v, lane);
#pragma unroll
    for (int i = 0; i < D / 32; ++i)
      out[((long long)item.row * HEADS + head * G + r) * D + lane + 32 * i] = __float2half_rn(v[i]);
  }
}
""",
    (PANELS, PART, PREFETCH, LAUNCH_DEPENDENTS, WAIT_PREREQUISITES),
)
