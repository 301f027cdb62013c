# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""CUDA text of a team: the blocks of a cluster that work on one row of logits together.

Block `rank` has the tokens [rank * CHUNK, (rank + 1) * CHUNK) of the vocabulary, warp w of it the
SEGMENT tokens from w * SEGMENT on, tiles of 32 neighbours: vocabulary order is that of ranks, of
warps, of tiles and of lanes. The block keeps its logits in shared memory, -inf beyond the end of the
vocabulary. Where there are no clusters a team is one block and its logits stay where they are.

Blocks meet: each writes two words into a mailbox of all others, then all wait for all. Mailboxes
come in pairs that are used in turns, so a word is not written over before all have read it. What a
block reads of another's shared memory between two meetings, the other leaves alone until the second.
Sums run in a fixed order, or over integers: the same logits give the same token.
"""

from __future__ import annotations

from amx_tvm.runtime.options import MOST_LOGPROBS
from relax_passes.kernels.cuda.intrinsics.base import Source
from relax_passes.kernels.cuda.intrinsics.sync import (
    CLUSTER_ARRIVE,
    CLUSTER_SYNC,
    CLUSTER_WAIT,
    LAUNCH_DEPENDENTS,
    WAIT_PREREQUISITES,
)

BINS = 512  # of a histogram, at most a block's threads

# The same place in the shared memory of the cluster's block `rank`.
PEER_OF = Source(
    "amx_peer_of",
    r"""
template <class T>
__device__ __forceinline__ T* amx_peer_of(T* p, int rank) {
  unsigned long long there = (unsigned long long)p;
#if __CUDA_ARCH__ >= 900
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"((unsigned long long)p), "r"(rank));
#endif
  return (T*)there;
}
""",
)

# 2 to the power of v; exactly 1 at 0.
EXP2 = Source(
    "amx_exp2",
    r"""
__device__ __forceinline__ float amx_exp2(float v) {
  float e;
  asm("ex2.approx.f32 %0, %1;" : "=f"(e) : "f"(v));
  return e;
}
""",
)

TEAM = Source(
    "amx_choose_team",
    rf"""
constexpr int AMX_BINS = {BINS}, AMX_MOST_LOGPROBS = {MOST_LOGPROBS};
constexpr unsigned AMX_ALL = 0xffffffffu;
"""
    r"""
// Bits of a float that order as floats do; NaN above everything.
__device__ __forceinline__ unsigned amx_order(float v) {
  const unsigned bits = __float_as_uint(v);
  const unsigned order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0xffffffffu : order;
}
__device__ __forceinline__ float amx_ordered(unsigned order) {
  return __uint_as_float(order & 0x80000000u ? order ^ 0x80000000u : ~order);
}
// A key orders by logit and, of equals, puts the lower token first.
__device__ __forceinline__ unsigned long long amx_key(unsigned order, int token) {
  return (unsigned long long)order << 32 | (0xffffffffu - (unsigned)token);
}
__device__ __forceinline__ int amx_token_of(unsigned long long key) { return (int)(0xffffffffu - (unsigned)key); }
__device__ __forceinline__ double amx_sum_of_warp(double v) {
#pragma unroll
  for (int mask = 16; mask; mask >>= 1) v += __shfl_xor_sync(AMX_ALL, v, mask);
  return v;
}
// The sum of this lane's value and of all lower lanes'.
__device__ __forceinline__ double amx_sum_up_to(double v, int lane) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const double below = __shfl_up_sync(AMX_ALL, v, step);
    if (lane >= step) v += below;
  }
  return v;
}
__device__ __forceinline__ double amx_as_double(unsigned long long v) { return __longlong_as_double((long long)v); }
__device__ __forceinline__ unsigned long long amx_as_word(double v) { return (unsigned long long)__double_as_longlong(v); }

struct AmxMail { unsigned long long a, b; };
template <int SPLITS>
struct AmxTeamTable {
  AmxMail mail[2][SPLITS];
  double warps[32];            // a value of every warp
  double above[32], amount[32];  // of the bin that a warp has found
  int first[32];
  uint2 bins[2][AMX_BINS];     // histograms, used in turns: low and high part
  int index;                   // what one lane of the team has found
  int listed;
  unsigned long long list[AMX_MOST_LOGPROBS];
};

template <int VOCAB, int SPLITS, int THREADS>
struct AmxTeam {
  static constexpr int WARPS = THREADS / 32;
  static constexpr int TILES = (VOCAB + 4 * SPLITS * THREADS - 1) / (4 * SPLITS * THREADS) * 4;
  static constexpr int SEGMENT = 32 * TILES;
  static constexpr int CHUNK = SEGMENT * WARPS, LAST = VOCAB - 1;
  static_assert(THREADS >= AMX_BINS && (long long)CHUNK <= 1 << 18, "sums of a histogram do not fit");

  AmxTeamTable<SPLITS>* table;
  float* x;   // this block's logits
  int rank, tid, warp, lane;
  int first;  // token of x[0]
  int count;  // of x
  int phase;  // mailbox in use
  int turn;   // histogram in use; the other one is empty

  __device__ __forceinline__ AmxTeam(void* shared, float* row, int rank_, int tid_) {
    table = (AmxTeamTable<SPLITS>*)shared;
    rank = rank_; tid = tid_; warp = tid >> 5; lane = tid & 31;
    first = rank * CHUNK;
    count = max(0, min(CHUNK, VOCAB - first));
    x = SPLITS == 1 ? row : (float*)(table + 1);
    phase = turn = 0;
  }
  static constexpr int FLOATS = sizeof(AmxTeamTable<SPLITS>) / 4 + (SPLITS == 1 ? 0 : CHUNK);  // of shared memory

  __device__ __forceinline__ void sync() const {
    if (SPLITS == 1) __syncthreads(); else amx_cluster_sync();
  }
  // Give every block two words of this one; they are in mail() behind it. All threads call it.
  __device__ __forceinline__ void meet(unsigned long long a, unsigned long long b) {
    phase ^= 1;
    if (tid < SPLITS) {
      AmxMail* there = &table->mail[phase][rank];
      if (SPLITS > 1) there = amx_peer_of(there, tid);
      there->a = a;
      there->b = b;
    }
    sync();
  }
  __device__ __forceinline__ const AmxMail& mail(int from) const { return table->mail[phase][from]; }

  // The sum of a value over the block, the same in all threads; a meeting must follow.
  __device__ __forceinline__ double over_block(double v) {
    v = amx_sum_of_warp(v);
    if (lane == 0) table->warps[warp] = v;
    __syncthreads();
    double sum = 0;
    for (int w = 0; w < WARPS; ++w) sum += table->warps[w];
    return sum;
  }
  __device__ __forceinline__ double over_team(double v) {
    const double sum = over_block(v);
    meet(amx_as_word(sum), 0);
    double all = 0;
    for (int r = 0; r < SPLITS; ++r) all += amx_as_double(mail(r).a);
    return all;
  }
  // The largest of a key over the team.
  __device__ __forceinline__ unsigned long long largest(unsigned long long key) {
#pragma unroll
    for (int mask = 16; mask; mask >>= 1) key = max(key, __shfl_xor_sync(AMX_ALL, key, mask));
    unsigned long long* keys = (unsigned long long*)table->warps;
    if (lane == 0) keys[warp] = key;
    __syncthreads();
    for (int w = 0; w < WARPS; ++w) key = max(key, keys[w]);
    meet(key, 0);
    for (int r = 0; r < SPLITS; ++r) key = max(key, mail(r).a);
    return key;
  }
  // The logit at a place of x, also of one beyond the end.
  __device__ __forceinline__ float at(int i) const {
    if (SPLITS > 1) return x[i];
    return i < count ? x[i] + 0.f : __uint_as_float(0xff800000u);
  }
  // Call f(v, token) for all that are this thread's, four at a time: v[j] is the logit of
  // token + 32 j. What f computes of the four is to be without branches.
  template <class F>
  __device__ __forceinline__ void each(F f) const {
#pragma unroll 2
    for (int tile = 0; tile < TILES; tile += 4) {
      const int i = warp * SEGMENT + tile * 32 + lane;
      const float v[4] = {at(i), at(i + 32), at(i + 64), at(i + 96)};
      f(v, first + i);
    }
  }
  // Read the row; equals become alike (0 and -0). Returns the largest key.
  template <bool KEEP>
  __device__ __forceinline__ unsigned long long read(const float* row) {
    unsigned largest = 0;
    int token = 0;
#pragma unroll 4
    for (int tile = 0; tile < TILES; tile += 4) {
      const int i = warp * SEGMENT + tile * 32 + lane;
      float v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = i + 32 * j < count ? row[first + i + 32 * j] : __uint_as_float(0xff800000u);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float value = v[j] + 0.f;
        if (KEEP && SPLITS > 1) x[i + 32 * j] = value;
        const unsigned order = amx_order(value);
        if (order > largest) { largest = order; token = first + i + 32 * j; }
      }
    }
    return amx_key(largest, token);
  }
  __device__ __forceinline__ void clear() {
    for (int i = tid; i < 2 * AMX_BINS; i += THREADS) table->bins[0][i] = make_uint2(0, 0);
    if (tid == 0) table->listed = 0;
  }
  // Nobody writes to the shared memory of a block that has not begun.
  __device__ __forceinline__ void arrive() const { if (SPLITS > 1) amx_cluster_arrive(); }
  __device__ __forceinline__ void await() const { if (SPLITS > 1) amx_cluster_wait(); else __syncthreads(); }
};
""",
    (
        CLUSTER_ARRIVE,
        CLUSTER_WAIT,
        CLUSTER_SYNC,
        LAUNCH_DEPENDENTS,
        WAIT_PREREQUISITES,
        PEER_OF,
        EXP2,
    ),
)
