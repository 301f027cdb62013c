# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""CUDA text of a mixture's routing: scores, choice, order of the rows by expert, weighted sum.

All sums have an order that neither the number of rows nor the run changes: the same token gets the
same experts and shares in every batch. Ids are valid whatever the scores are, NaN too, since rows
of padding hold anything.
"""

from __future__ import annotations

from relax_passes.kernels.cuda.intrinsics.base import Intrinsic, Source

SCORE_WARPS = 4  # of a block, which share K
SCORE_EXPERTS = 4  # experts of a block, where there are several rows
GROUP_THREADS = 256
SUM_THREADS = 128

# Sums of R rows by X experts over K; the warps of a block take 256 columns in turns.
SCORES = Intrinsic(
    "amx_expert_scores",
    """
  float acc[R][X];
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int i = 0; i < X; ++i) acc[r][i] = 0.f;
#pragma unroll 3
  for (int k = warp * 256 + lane * 8; k < K; k += WARPS * 256) {
    float4 w[X][2];
#pragma unroll
    for (int i = 0; i < X; ++i) {
      const float4* from = (const float4*)(weight + (long long)min(expert + i, E - 1) * K + k);
      w[i][0] = from[0];
      w[i][1] = from[1];
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const uint4 piece = *(const uint4*)((const half*)x + (long long)min(row + r, m - 1) * K + k);
      const half* h = (const half*)&piece;
#pragma unroll
      for (int i = 0; i < X; ++i) {
        float sum = acc[r][i];
        sum = fmaf(__half2float(h[0]), w[i][0].x, sum);
        sum = fmaf(__half2float(h[1]), w[i][0].y, sum);
        sum = fmaf(__half2float(h[2]), w[i][0].z, sum);
        sum = fmaf(__half2float(h[3]), w[i][0].w, sum);
        sum = fmaf(__half2float(h[4]), w[i][1].x, sum);
        sum = fmaf(__half2float(h[5]), w[i][1].y, sum);
        sum = fmaf(__half2float(h[6]), w[i][1].z, sum);
        acc[r][i] = fmaf(__half2float(h[7]), w[i][1].w, sum);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int i = 0; i < X; ++i) {
#pragma unroll
      for (int mask = 16; mask > 0; mask >>= 1) acc[r][i] += __shfl_xor_sync(0xffffffffu, acc[r][i], mask);
      if (lane == 0) shared[(warp * R + r) * X + i] = acc[r][i];
    }
  __syncthreads();
  const int at = warp * 32 + lane, r = at / X, i = at % X;
  if (at >= R * X || row + r >= m || expert + i >= E) return;
  float sum = bias == nullptr ? 0.f : ((const float*)bias)[expert + i];
#pragma unroll
  for (int part = 0; part < WARPS; ++part) sum += shared[(part * R + r) * X + i];
  scores[(long long)(row + r) * E + expert + i] = sum;""",
    signature="void(float* shared, const void* x, const float* weight, const void* bias, float* scores, int m, "
    "int row, int expert, int warp, int lane)",
    template="int E, int K, int R, int X, int WARPS",
)

BEST = Source(
    "amx_best_experts",
    r"""
// Lane j has the j-th best of E experts by the scores of one row, ties to the first, and its share: a
// softmax over the CHOSEN best, or over ALL.
struct AmxBest { int expert; float share; };
template <int E, int CHOSEN, bool ALL>
__device__ __forceinline__ AmxBest amx_best(const float* scores, int lane) {
  constexpr int PARTS = (E + 31) / 32;
  constexpr float LOWEST = -3.4e38f;
  unsigned left[PARTS];  // in the order of the scores, NaN last; 0 for none
#pragma unroll
  for (int p = 0; p < PARTS; ++p) {
    const int e = p * 32 + lane;
    const float given = e < E ? scores[e] : LOWEST;
    const unsigned bits = __float_as_uint(given > LOWEST ? given + 0.f : LOWEST);  // no minus zero
    left[p] = e >= E ? 0u : bits >> 31 ? ~bits : bits | 0x80000000u;
  }
  unsigned mine = 0u, first = 0u;
  int taken = 0;
#pragma unroll
  for (int j = 0; j < CHOSEN; ++j) {
    unsigned best = 0u, at = E;
#pragma unroll
    for (int p = 0; p < PARTS; ++p)
      if (left[p] > best) { best = left[p]; at = p * 32 + lane; }
    const unsigned top = __reduce_max_sync(0xffffffffu, best);
    at = __reduce_min_sync(0xffffffffu, best == top ? at : (unsigned)E);
    if (j == 0) first = top;
    if (lane == j) { mine = top; taken = (int)at; }
#pragma unroll
    for (int p = 0; p < PARTS; ++p)
      if (at == p * 32 + lane) left[p] = 0u;
  }
  const float high = __uint_as_float(first >> 31 ? first & 0x7fffffffu : ~first);
  const float value = __uint_as_float(mine >> 31 ? mine & 0x7fffffffu : ~mine);
  const float weight = lane < CHOSEN ? expf(value - high) : 0.f;
  float total = weight;
  if (ALL) {
    total = 0.f;
#pragma unroll
    for (int p = 0; p < PARTS; ++p)
      if (p * 32 + lane < E) total += expf(scores[p * 32 + lane] - high);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) total += __shfl_xor_sync(0xffffffffu, total, mask);
  return {taken, weight / total};
}
""",
)
# The CHOSEN best experts of one row and their shares; a warp.
ROUTE = Intrinsic(
    "amx_expert_route",
    """
  const AmxBest best = amx_best<E, CHOSEN, ALL>(scores, lane);
  if (lane < CHOSEN) {
    ids[lane] = best.expert;
    shares[lane] = best.share;
  }""",
    (BEST,),
    "void(const float* scores, int* ids, float* shares, int lane)",
    "int E, int CHOSEN, bool ALL",
)

# The same for a block that needs them at once; noted [2 CHOSEN]: experts; shares.
CHOOSE = Intrinsic(
    "amx_expert_choose",
    """
  if (tid < 32) {
    const AmxBest best = amx_best<E, CHOSEN, ALL>(scores, tid);
    if (tid < CHOSEN) {
      ((int*)noted)[tid] = best.expert;
      noted[CHOSEN + tid] = best.share;
    }
  }
  __syncthreads();""",
    (BEST,),
    "void(float* noted, const float* scores, int tid)",
    "int E, int CHOSEN, bool ALL",
)

# Slots of one expert, in the order of the rows; a block.
GROUP = Intrinsic(
    "amx_expert_group",
    """
  constexpr int WARPS = THREADS / 32;
  const int warp = tid / 32, lane = tid % 32;
  int before = 0;
  for (int i = tid; i < slots; i += THREADS) before += ids[i] < expert;
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) before += __shfl_xor_sync(0xffffffffu, before, mask);
  if (lane == 0) shared[warp] = before;
  __syncthreads();
  int start = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) start += shared[w];
  if (tid == 0) {
    bounds[expert] = start;
    if (expert == E - 1) bounds[E] = slots;
  }
  for (int base = 0; base < slots; base += THREADS) {
    const int i = base + tid;
    const bool mine = i < slots && ids[i] == expert;
    const unsigned found = __ballot_sync(0xffffffffu, mine);
    __syncthreads();
    if (lane == 0) shared[warp] = __popc(found);
    __syncthreads();
    int slot = start + __popc(found & ((1u << lane) - 1));
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      if (w < warp) slot += shared[w];
      start += shared[w];
    }
    if (mine) {
      source[slot] = i / CHOSEN;
      place[i] = slot;
    }
  }""",
    signature="void(int* shared, const int* ids, int* source, int* place, int* bounds, int slots, int expert, int tid)",
    template="int E, int CHOSEN, int THREADS",
)

# Which rows a block multiplies with which expert: found[0] is the expert or -1, rows found[1] up to
# found[2] are its. Of every expert, ROWS rows are an item; experts without rows have none.
ITEM = Intrinsic(
    "amx_expert_item",
    """
  found[0] = -1;
  found[1] = found[2] = 0;
  int left = item;
#pragma unroll 1
  for (int base = 0; base < E; base += 32) {
    const int expert = min(base + lane, E), first = bounds[expert], end = bounds[min(expert + 1, E)];
    const int items = (end - first + ROWS - 1) / ROWS;
    int until = items;
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
      const int before = __shfl_up_sync(0xffffffffu, until, step);
      if (lane >= step) until += before;
    }
    const unsigned reached = __ballot_sync(0xffffffffu, left < until);
    if (reached) {
      const int who = __ffs(reached) - 1;
      const int index = left - __shfl_sync(0xffffffffu, until - items, who);
      found[0] = base + who;
      found[1] = __shfl_sync(0xffffffffu, first, who) + index * ROWS;
      found[2] = min(found[1] + ROWS, __shfl_sync(0xffffffffu, end, who));
      return;
    }
    left -= __shfl_sync(0xffffffffu, until, 31);
  }""",
    signature="void(int* found, const int* bounds, int item, int lane)",
    template="int E, int ROWS",
)
# The same where row `item` of y, alone, is its expert's: `experts` lists one for each.
LISTED = Intrinsic(
    "amx_expert_listed",
    """
  found[0] = experts[item];
  found[1] = item;
  found[2] = item + 1;""",
    signature="void(int* found, const int* experts, int item)",
)
# The thread ends, where that is asked: of a block all do, and no barrier counts them any more.
LEAVE = Intrinsic(
    "amx_leave",
    '  if (done) asm volatile("exit;");',
    signature="void(bool done)",
)

# Eight numbers of a row's result: its experts', in the order of the choice, times their shares.
# Without places the products of the only row lie in that order.
SUM = Intrinsic(
    "amx_expert_sum",
    """
  float acc[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) acc[i] = 0.f;
  uint4 pieces[CHOSEN];
#pragma unroll
  for (int j = 0; j < CHOSEN; ++j) {
    const int slot = place == nullptr ? j : ((const int*)place)[j];
    pieces[j] = *(const uint4*)((const half*)y + (long long)slot * N + column);
  }
#pragma unroll
  for (int j = 0; j < CHOSEN; ++j) {
    const float share = shares[j];
    const half* h = (const half*)&pieces[j];
#pragma unroll
    for (int i = 0; i < 8; ++i) acc[i] = fmaf(share, __half2float(h[i]), acc[i]);
  }
  if (residual != nullptr) {
    const uint4 piece = *(const uint4*)((const half*)residual + column);
    const half* h = (const half*)&piece;
#pragma unroll
    for (int i = 0; i < 8; ++i) acc[i] += __half2float(h[i]);
  }
  uint4 result;
  half* h = (half*)&result;
#pragma unroll
  for (int i = 0; i < 8; ++i) h[i] = __float2half_rn(acc[i]);
  *(uint4*)((half*)out + column) = result;""",
    signature="void(const void* y, const float* shares, const void* place, const void* residual, void* out, int column)",
    template="int N, int CHOSEN",
)
