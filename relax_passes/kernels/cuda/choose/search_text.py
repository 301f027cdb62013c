# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""CUDA text of what is kept of a row, by rank or by mass, exactly, and of one place in a running sum.

Tokens order by their logits, of equals the first one first; what top-k and top-p keep is the
beginning of that order, so a bound says all: an AmxBound. It is found by histograms, one a level:

    level 0   the logit's distance from the largest, 16 bins an octave of weight, 32 octaves
    level 1.. the bits of the logits in the bin that crosses the goal, 9 at a time from the top

and in the last bin, of equals, by counting in the order of tokens. A bin holds a number of tokens,
or a mass in fixed point: weights are scaled by their octave to at most 2^27 and added in two parts
of 14 bits, which is exact whatever the order, and as fine as float32.
"""

from __future__ import annotations

from relax_passes.kernels.cuda.intrinsics.base import Source

from .team_text import TEAM

SEARCH = Source(
    "amx_choose_search",
    r"""
constexpr int AMX_REST = AMX_BINS - 1;       // the bin of level 0 without an end
constexpr float AMX_STEPS = 23.083120654f;   // 16 log2 e: bins of level 0 a nat

// Kept are tokens of bins up to `bin` above `floor`, and those at it up to the token `index`.
struct AmxBound { int bin; float floor; int index; };

template <int VOCAB, int SPLITS, int THREADS>
struct AmxSearch {
  using Team = AmxTeam<VOCAB, SPLITS, THREADS>;
  Team& team;
  float top;    // the largest logit
  float scale;  // bins of level 0 a unit of logit: 16 log2 e / temperature

  __device__ __forceinline__ float depth(float v) const { return (top - v) * scale; }
  __device__ __forceinline__ static int bin(float depth) { return (int)fminf(depth, (float)AMX_REST); }
  __device__ __forceinline__ static float weight(float depth) { return amx_exp2(depth * -0.0625f); }

  __device__ __forceinline__ static AmxBound everything() {
    return AmxBound{AMX_REST, __uint_as_float(0xff800000u), 0x7fffffff};
  }
  __device__ __forceinline__ bool keeps(const AmxBound& b, float v, int token) const {
    return v >= b.floor && bin(depth(v)) <= b.bin && (v > b.floor || token <= b.index);
  }
  __device__ __forceinline__ static AmxBound stricter(const AmxBound& a, const AmxBound& b) {
    if (a.bin != b.bin) return a.bin < b.bin ? a : b;
    if (a.floor != b.floor) return a.floor > b.floor ? a : b;
    return a.index < b.index ? a : b;
  }
  // Order of the ends of a bin of level 0, rounding of `depth` allowed for.
  __device__ __forceinline__ unsigned lowest(int b) const {
    const unsigned none = amx_order(__uint_as_float(0xff800000u));
    if (b == AMX_REST) return none;
    return max(none, amx_order((float)((double)top - (b + 1) / (double)scale * (1 + 1e-6))) - 1);
  }
  __device__ __forceinline__ unsigned highest(int b) const {
    return amx_order((float)((double)top - b / (double)scale * (1 - 1e-6))) + 1;
  }

  // The token at which the running sum of amount(logit, token) passes `point`, or that share of the
  // whole sum; never one without an amount. The lane that has it gets it, all others -1.
  template <class Amount>
  __device__ __forceinline__ int locate(Amount amount, bool share, double point) {
    constexpr int SEGMENT = Team::SEGMENT, WARPS = Team::WARPS, TILES = SEGMENT / 32;
    float part = 0.f;
    team.each([&](float v, int token) { part += amount(v, token); });
    const double mine = team.over_block((double)part);
    team.meet(amx_as_word(mine), 0);
    if (share) {
      double all = 0;
      for (int r = 0; r < SPLITS; ++r) all += amx_as_double(team.mail(r).a);
      point *= all;
    }
    double base = 0;
    if (select([&](int r) { return amx_as_double(team.mail(r).a); }, SPLITS, point, base) != team.rank) return -1;
    const int warp = select([&](int w) { return team.table->warps[w]; }, WARPS, point, base);
    if (warp != team.warp) return -1;

    const int lane = team.lane, from = warp * SEGMENT;
    auto amount_at = [&](int i) { return from + i < team.count ? amount(team.x[from + i], team.first + from + i) : 0.f; };
    int tile = 0;
    double before = base, upto = base;
    for (int group = 0; group < TILES; group += 32) {  // a lane has 32 tokens, in an order that spreads over banks
      float sum = 0.f;
      if (group + lane < TILES)
        for (int k = 0; k < 32; ++k) sum += amount_at((group + lane) * 32 + ((k + lane) & 31));
      const double reached = amx_sum_up_to((double)sum, lane);
      const unsigned some = __ballot_sync(AMX_ALL, sum > 0.f);
      const unsigned passed = __ballot_sync(AMX_ALL, sum > 0.f && upto + reached > point);
      const int found = passed ? __ffs(passed) - 1 : 31 - __clz(some | 1u);
      const double at_found = __shfl_sync(AMX_ALL, reached - (double)sum, found);
      if (some) { tile = group + found; before = upto + at_found; }
      if (passed) break;
      upto += __shfl_sync(AMX_ALL, reached, 31);
    }
    const float one = amount_at(tile * 32 + lane);
    const double reached = amx_sum_up_to((double)one, lane);
    const unsigned some = __ballot_sync(AMX_ALL, one > 0.f);
    const unsigned passed = __ballot_sync(AMX_ALL, one > 0.f && before + reached > point);
    const int found = passed ? __ffs(passed) - 1 : 31 - __clz(some | 1u);
    return lane == found ? team.first + from + tile * 32 + lane : -1;
  }
  // Which of some sums the point lies in, the last one that is not 0 if rounding puts it behind;
  // `base` becomes the sum of those before.
  template <class Sum>
  __device__ __forceinline__ static int select(Sum sum, int count, double point, double& base) {
    int found = -1;
    double upto = base, before = base;
    for (int i = 0; i < count; ++i) {
      const double s = sum(i);
      if (s > 0) { found = i; before = upto; upto += s; }
      if (s > 0 && upto > point) break;
    }
    base = before;
    return found;
  }

  // Keep the first `goal` tokens, or (by mass) the fewest first ones with that share of the mass.
  __device__ __forceinline__ AmxBound search(const AmxBound inside, bool by_mass, double goal) {
    AmxTable<SPLITS>* table = team.table;
    const int tid = team.tid, lane = team.lane;
    // All that is lighter misses the mass that may be missing, together.
    const float least = by_mass ? (float)(0.999 * (1 - goal) / VOCAB) : 0.f;
    int bin_ = -1, shift = 0;  // of level 0; of the digit
    unsigned base = 0;         // where the digits begin
    double above = 0;          // what lies above them
    for (int level = 0;; ++level) {
      const int turn = team.turn;
      team.turn ^= 1;
      float part = 0.f;
      const float lowest_ = level ? amx_ordered(base) : inside.floor;
      team.each([&](float v, int token) {
        if (!(v >= lowest_)) return;
        const float d = depth(v);
        const int b = bin(d);
        int digit = b;
        if (level) {
          const unsigned k = (amx_order(v) - base) >> shift;
          if (b != bin_ || k >= AMX_BINS) return;
          digit = AMX_BINS - 1 - (int)k;
        }
        if (!keeps(inside, v, token)) return;
        unsigned q = 1;
        if (by_mass) {
          const float w = weight(d);
          part += w;
          if (!level && w < least) return;
          q = (unsigned)__float2int_rn(w * __int_as_float((127 + 27 + (b >> 4)) << 23));
        }
        if (!level && b == AMX_REST) return;
        if (q & 0x3fffu) atomicAdd(&table->low[turn][digit], q & 0x3fffu);
        if (q >> 14) atomicAdd(&table->high[turn][digit], q >> 14);
      });
      if (level || !by_mass) team.sync(); else goal *= team.over_team((double)part);

      unsigned long long amount_ = 0;
      if (tid < AMX_BINS) {
#pragma unroll
        for (int r = 0; r < SPLITS; ++r) {
          const unsigned *low = &table->low[turn][tid], *high = &table->high[turn][tid];
          if (SPLITS > 1) { low = amx_peer_of(low, r); high = amx_peer_of(high, r); }
          amount_ += *low + ((unsigned long long)*high << 14);
        }
        table->low[turn ^ 1][tid] = table->high[turn ^ 1][tid] = 0;
      }
      const int octave = (level ? bin_ : tid) >> 4;
      double amount = (double)amount_;
      if (by_mass) amount *= (double)__int_as_float((127 - 27 - octave) << 23);
      double upto = amx_sum_up_to(amount, lane);
      if (lane == 31) table->warps[team.warp] = upto;
      __syncthreads();
      double all = above;
      for (int w = 0; w < AMX_BINS / 32; ++w) {
        if (w == team.warp) upto += all;
        all += table->warps[w];
      }
      const unsigned crossing = __ballot_sync(AMX_ALL, tid < AMX_BINS && amount > 0 && upto >= goal);
      if (lane == (crossing ? __ffs(crossing) - 1 : 0)) {
        table->first[team.warp] = crossing ? tid : AMX_BINS;
        table->above[team.warp] = upto - amount;
        table->amount[team.warp] = amount;
      }
      __syncthreads();
      int warp = 0;
      while (warp < AMX_BINS / 32 && table->first[warp] == AMX_BINS) ++warp;
      if (warp == AMX_BINS / 32) {  // the rest, or rounding
        if (level) return stricter(inside, AmxBound{bin_, amx_ordered(base), 0x7fffffff});
        bin_ = AMX_REST;
        above = all;
        base = lowest(bin_);
        shift = digits(highest(bin_) - base);
        continue;
      }
      const int digit = table->first[warp];
      amount = table->amount[warp];
      above = table->above[warp];
      float lightest;  // of the bin
      if (level) {
        base += (unsigned)(AMX_BINS - 1 - digit) << shift;
        lightest = weight(depth(amx_ordered(base)));
      } else {
        bin_ = digit;
        base = lowest(bin_);
        lightest = weight((float)(bin_ + 1));
      }
      // A bin with one token, or of which all are kept, needs no further level.
      AmxBound found = {bin_, amx_ordered(base), 0x7fffffff};
      if (by_mass ? amount < 1.5 * lightest : above + amount == goal) return stricter(inside, found);
      if (level && shift == 0) {
        const double each = by_mass ? (double)lightest : 1.0, equal = rint(amount / each);
        const double kept = fmax(ceil((goal - above) / each), 1.0);
        if (kept < equal) {
          const float value = found.floor;
          const int token = locate([&](float v, int t) { return v == value && keeps(inside, v, t) ? 1.f : 0.f; }, false, kept - 0.5);
          if (token >= 0)
            for (int r = 0; r < SPLITS; ++r) *(SPLITS > 1 ? amx_peer_of(&table->index, r) : &table->index) = token;
          team.sync();
          found.index = table->index;
        }
        return stricter(inside, found);
      }
      shift = level ? max(0, shift - 9) : digits(highest(bin_) - base);
    }
  }
  // How far to shift a span so that nine bits are left.
  __device__ __forceinline__ static int digits(unsigned span) { return max(0, 32 - __clz(span) - 9); }
};
""",
    (TEAM,),
)
