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

// Kept are logits above `floor`, and those at it up to the token `index`.
struct AmxBound { float floor; int index; };

template <int VOCAB, int SPLITS, int THREADS>
struct AmxSearch {
  using Team = AmxTeam<VOCAB, SPLITS, THREADS>;
  Team& team;
  float top;    // the largest logit
  float scale;  // bins of level 0 a unit of logit: 16 log2 e / temperature

  __device__ __forceinline__ float depth(float v) const { return (top - v) * scale; }
  __device__ __forceinline__ static int bin(float depth) { return (int)fminf(depth, (float)AMX_REST); }
  __device__ __forceinline__ static float weight(float depth) { return amx_exp2(depth * -0.0625f); }

  __device__ __forceinline__ static AmxBound everything() { return AmxBound{__uint_as_float(0xff800000u), 0x7fffffff}; }
  __device__ __forceinline__ static bool keeps(const AmxBound& b, float v, int token) {
    return (v > b.floor) | ((v == b.floor) & (token <= b.index));
  }
  __device__ __forceinline__ static AmxBound stricter(const AmxBound& a, const AmxBound& b) {
    if (a.floor != b.floor) return a.floor > b.floor ? a : b;
    return a.index < b.index ? a : b;
  }
  // Order of the smallest logit of the bins up to b of level 0: what `depth` rounds to decides, so
  // the quotient says only where to look, 32 places at a time.
  __device__ __forceinline__ unsigned end_of(int b) const {
    const unsigned none = amx_order(__uint_as_float(0xff800000u));
    if (b < 0) return amx_order(top) + 1;
    if (b == AMX_REST) return none;
    const double far = (b + 1) / (double)scale;
    unsigned outside = max(none, amx_order((float)((double)top - far * (1 + 1e-6))) - 1) - 1;
    unsigned inside = min(amx_order(top), amx_order((float)((double)top - far * (1 - 1e-6))) + 1);
    while (inside - outside > 1) {
      const unsigned step = (inside - outside + 31) / 32, place = min(outside + (team.lane + 1) * step, inside);
      const unsigned in = __ballot_sync(AMX_ALL, place == inside || bin(depth(amx_ordered(place))) <= b);
      const unsigned first = __ffs(in) - 1;
      inside = min(outside + (first + 1) * step, inside);
      outside += first * step;
    }
    return inside;
  }
  __device__ __forceinline__ static bool all_below(const float (&v)[4], float floor) {
    return fmaxf(fmaxf(v[0], v[1]), fmaxf(v[2], v[3])) < floor;
  }

  // Where in a running sum over the lanes, behind `base`, `point` lies, or that share of the whole
  // sum: a lane, the last one with something if rounding puts the point behind it; the sum before it.
  struct Place { int lane; double before, point; bool some, passed; double after; };
  __device__ __forceinline__ Place place(double part, double base, double point, bool share = false) const {
    const double upto = amx_sum_up_to(part, team.lane), all = __shfl_sync(AMX_ALL, upto, 31);
    if (share) point *= all;
    const unsigned some = __ballot_sync(AMX_ALL, part > 0);
    const unsigned passed = __ballot_sync(AMX_ALL, part > 0 && base + upto > point);
    const int lane = passed ? __ffs(passed) - 1 : 31 - __clz(some | 1u);
    return Place{lane, base + __shfl_sync(AMX_ALL, upto - part, lane), point, some != 0, passed != 0, base + all};
  }
  // The token at which the running sum of amount(logit, token) passes `point`, or that share of the
  // whole sum; never one without an amount, such as all below `floor`. The lane that has it gets it,
  // all others -1.
  template <class Amount>
  __device__ __forceinline__ int locate(float floor, Amount amount, bool share, double point) {
    const int lane = team.lane, from = team.warp * Team::SEGMENT;
    float part = 0.f;
    team.each([&](const float (&v)[4], int token) {
      if (all_below(v, floor)) return;
#pragma unroll
      for (int j = 0; j < 4; ++j) part += amount(v[j], token + 32 * j);
    });
    const double mine = team.over_block((double)part);
    team.meet(amx_as_word(mine), 0);
    Place found = place(lane < SPLITS ? amx_as_double(team.mail(min(lane, SPLITS - 1)).a) : 0.0, 0.0, point, share);
    if (found.lane != team.rank) return -1;
    found = place(lane < Team::WARPS ? team.table->warps[lane] : 0.0, found.before, found.point);
    if (found.lane != team.warp) return -1;

    auto amount_at = [&](int i) { return amount(team.at(from + i), team.first + from + i); };
    int tile = 0;
    double before = found.before, upto = found.before;
    point = found.point;
    for (int group = 0; group < Team::TILES; group += 32) {  // a tile a lane, begun anywhere to spread over banks
      float sum = 0.f;
      if (group + lane < Team::TILES) {
#pragma unroll 4
        for (int k = 0; k < 32; ++k) sum += amount_at((group + lane) * 32 + ((k + lane) & 31));
      }
      found = place(sum, upto, point);
      if (found.some) { tile = group + found.lane; before = found.before; }
      if (found.passed) break;
      upto = found.after;
    }
    found = place(amount_at(tile * 32 + lane), before, point);
    return lane == found.lane ? team.first + from + tile * 32 + lane : -1;
  }

  // Keep the first `goal` tokens, or (by mass) the fewest first ones with that share of the mass.
  __device__ __forceinline__ AmxBound search(const AmxBound inside, bool by_mass, double goal) {
    AmxTeamTable<SPLITS>* table = team.table;
    const int tid = team.tid, lane = team.lane;
    // All that is deeper misses the mass that may be missing, together.
    const float deepest = by_mass ? fminf((float)AMX_REST, 0.1f - 16.f * log2f((float)(0.999 * (1 - goal) / VOCAB))) : (float)AMX_REST;
    int bin_ = -1, shift = 0;       // of level 0; of the digit
    unsigned base = 0, limit = 0;   // the orders that the digits span
    double above = 0;               // what lies above them
    for (int level = 0;; ++level) {
      const int turn = team.turn;
      team.turn ^= 1;
      uint2* bins = table->bins[turn];
      auto add = [&](int digit, float depth, int octave) {
        const float scaled = by_mass ? weight(depth) * __int_as_float((127 + 27 + octave) << 23) : 1.f;
        const unsigned q = (unsigned)__float2int_rn(scaled);
        atomicAdd(&bins[digit].x, q & 0x3fffu);
        if (q >> 14) atomicAdd(&bins[digit].y, q >> 14);
      };
      float part = 0.f;
      if (level == 0) {
        team.each([&](const float (&v)[4], int token) {
          if (all_below(v, inside.floor)) return;
          float d[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const bool kept = keeps(inside, v[j], token + 32 * j);
            d[j] = depth(v[j]);
            if (by_mass) part += kept ? weight(d[j]) : 0.f;
            if (!kept) d[j] = (float)AMX_REST;
          }
          if (fminf(fminf(d[0], d[1]), fminf(d[2], d[3])) >= deepest) return;
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if (d[j] < deepest) add(bin(d[j]), d[j], bin(d[j]) >> 4);
        });
      } else {
        const float floor = amx_ordered(base);
        const unsigned span = limit - base;
        team.each([&](const float (&v)[4], int token) {
          if (all_below(v, floor)) return;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const unsigned k = amx_order(v[j]) - base;
            if ((k < span) & keeps(inside, v[j], token + 32 * j)) add(AMX_BINS - 1 - (int)(k >> shift), depth(v[j]), bin_ >> 4);
          }
        });
      }
      if (level || !by_mass) team.sync(); else goal *= team.over_team((double)part);

      unsigned long long amount_ = 0;
      if (tid < AMX_BINS) {
#pragma unroll
        for (int r = 0; r < SPLITS; ++r) {
          const uint2* from = &table->bins[turn][tid];
          const uint2 bin = SPLITS > 1 ? *amx_peer_of(from, r) : *from;
          amount_ += bin.x + ((unsigned long long)bin.y << 14);
        }
        table->bins[turn ^ 1][tid] = make_uint2(0, 0);
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
      const unsigned warps = __ballot_sync(AMX_ALL, lane < AMX_BINS / 32 && table->first[lane] < AMX_BINS);
      const int warp = __ffs(warps) - 1;
      if (warp < 0) {  // the rest, or rounding
        if (level) return stricter(inside, AmxBound{amx_ordered(base), 0x7fffffff});
        bin_ = AMX_REST;
        above = all;
        base = end_of(bin_);
        limit = end_of(bin_ - 1);
        shift = digits(limit - base);
        continue;
      }
      const int digit = table->first[warp];
      amount = table->amount[warp];
      above = table->above[warp];
      float lightest;  // of the bin
      if (level) {
        base += (unsigned)(AMX_BINS - 1 - digit) << shift;
        limit = min(limit, base + (1u << shift));
        lightest = weight(depth(amx_ordered(base)));
      } else {
        bin_ = digit;
        base = end_of(bin_);
        limit = end_of(bin_ - 1);
        lightest = weight((float)(bin_ + 1));
      }
      // A bin with one token, or of which all are kept, needs no further level.
      AmxBound found = {amx_ordered(base), 0x7fffffff};
      if (by_mass ? amount < 1.5 * lightest : above + amount == goal) return stricter(inside, found);
      if (level && shift == 0) {
        const double each = by_mass ? (double)lightest : 1.0, equal = rint(amount / each);
        const double kept = fmax(ceil((goal - above) / each), 1.0);
        if (kept < equal) {
          const float value = found.floor;
          const int token = locate(value, [&](float v, int t) { return (v == value) & keeps(inside, v, t) ? 1.f : 0.f; }, false, kept - 0.5);
          if (token >= 0)
            for (int r = 0; r < SPLITS; ++r) *(SPLITS > 1 ? amx_peer_of(&table->index, r) : &table->index) = token;
          team.sync();
          found.index = table->index;
        }
        return stricter(inside, found);
      }
      shift = level ? max(0, shift - 9) : digits(limit - base);
    }
  }
  // How far to shift a span so that nine bits are left.
  __device__ __forceinline__ static int digits(unsigned span) { return max(0, 32 - __clz(span) - 9); }
};
""",
    (TEAM,),
)
