# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""CUDA text of one row: what its options make of its logits, the choice, its log-probabilities."""

from __future__ import annotations

from amx_tvm.runtime import choices
from relax_passes.kernels.cuda.intrinsics.base import Source

from .search_text import SEARCH

_TYPES = {"<f8": "double", "<f4": "float", "<i4": "int"}
_FIELDS = " ".join(
    f"{_TYPES[kind[0].str]} {name};" for name, kind in (choices.CHOICE.fields or {}).items()
)
_FLAGS = ", ".join(f"AMX_{flag.name} = {flag.value}" for flag in choices.Flag)

ROW = Source(
    "amx_choose_row",
    f"""
struct AmxChoice {{ {_FIELDS} }};
static_assert(sizeof(AmxChoice) == {choices.CHOICE.itemsize}, "options are packed otherwise");
enum {{ {_FLAGS}, AMX_EDITED = AMX_PENALIZES | AMX_BIASED | AMX_MASKED }};
constexpr int AMX_BROKEN = {choices.BROKEN}, AMX_NOTHING = {choices.NOTHING};
"""
    r"""
// Make of the row what the options say, bias, penalties, and -inf for what may not be chosen; returns
// the largest key.
template <class Team>
__device__ __forceinline__ unsigned long long amx_edit(Team& team, const AmxChoice& o, const int* seen,
                                                       const int* mask, const int2* biases) {
  __syncthreads();
  if (o.flags & AMX_BIASED) {
    for (int n = team.tid; n < o.bias_count; n += Team::WARPS * 32) {
      const int2 bias = biases[o.bias_first + n];
      const int i = bias.x - team.first;
      if (i >= 0 && i < team.count) team.x[i] += __int_as_float(bias.y);
    }
    __syncthreads();
  }
  unsigned largest = 0;
  int best = 0;
  team.each([&](const float (&values)[4], int from) {
    int made[4] = {0, 0, 0, 0};  // how often each was chosen; the sign says that the prompt has it
    bool allowed[4] = {true, true, true, true};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int token = min(from + 32 * j, Team::LAST);
      if (o.flags & AMX_PENALIZES) made[j] = seen[token];
      if (o.flags & AMX_MASKED) allowed[j] = (unsigned)mask[token >> 5] >> (token & 31) & 1;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float v = values[j];
      if (made[j]) v = v > 0.f ? __fdiv_rn(v, o.repetition_penalty) : __fmul_rn(v, o.repetition_penalty);
      if (made[j] & 0x7fffffff) {
        v = __fsub_rn(v, o.presence_penalty);
        v = __fsub_rn(v, __fmul_rn(o.frequency_penalty, (float)(made[j] & 0x7fffffff)));
      }
      v = allowed[j] ? v + 0.f : __uint_as_float(0xff800000u);
      const int token = from + 32 * j, i = token - team.first;
      if (i < team.count) team.x[i] = v;
      const unsigned order = amx_order(v);
      if (order > largest) { largest = order; best = token; }
    }
  });
  return amx_key(largest, best);
}

template <int VOCAB, int SPLITS, int THREADS, bool DEPENDENT>
__device__ __forceinline__ void amx_choose(float* shared, void* logits, const void* options, void* counts,
                                           const void* masks, const void* biases, void* tokens, int row,
                                           int rank, int tid) {
  if (DEPENDENT) amx_launch_dependents();
  float* values = (float*)logits + (long long)row * VOCAB;
  AmxTeam<VOCAB, SPLITS, THREADS> team(shared, values, rank, tid);
  team.arrive();
  team.clear();
  if (DEPENDENT) amx_wait_prerequisites();
  const AmxChoice o = ((const AmxChoice*)options)[row];
  int* seen = (int*)counts + (long long)o.counts * VOCAB;

  if (!(o.flags & AMX_LIVE)) {
    if (rank + tid == 0) ((int*)tokens)[row] = 0;
    team.await();
    return;
  }
  unsigned long long best = o.flags & (AMX_EDITED | AMX_DRAWS) ? team.template read<true>(values) : team.template read<false>(values);
  if (o.flags & AMX_EDITED)
    best = amx_edit(team, o, seen, (const int*)masks + (long long)o.mask * ((VOCAB + 31) / 32), (const int2*)biases);
  team.await();
  best = team.largest(best);
  const unsigned order = (unsigned)(best >> 32);
  int token = amx_token_of(best), chooser = 0;  // the thread that tells it
  if (order >= amx_order(__uint_as_float(0x7f800000u))) {
    token = AMX_BROKEN;
  } else if (order <= amx_order(__uint_as_float(0xff800000u))) {
    token = o.flags & AMX_MASKED ? AMX_NOTHING : AMX_BROKEN;
  } else if (o.flags & AMX_DRAWS) {
    AmxSearch<VOCAB, SPLITS, THREADS> find = {team, amx_ordered(order), o.inverse_temperature * AMX_STEPS};
    AmxBound bound = find.everything();
#pragma unroll 1
    for (int by_mass = 0; by_mass < 2; ++by_mass)
      if (by_mass ? o.top_p < 1.0 : o.top_k > 0 && o.top_k < VOCAB)
        bound = find.search(bound, by_mass, by_mass ? o.top_p : (double)o.top_k);
    token = find.locate(bound.floor, [&](float v, int t) {
      const float w = find.weight(find.depth(v));
      return find.keeps(bound, v, t) & (w >= o.min_p) ? w : 0.f;
    }, true, o.uniform);
    chooser = token >= 0 ? rank << 10 | tid : -1;
  }
  if (chooser != (rank << 10 | tid)) return;
  ((int*)tokens)[row] = token;
  if (o.flags & AMX_PENALIZES && token >= 0) seen[token] += 1;
}

// Log-probabilities of a row as it is, before its options change it: of the token that was chosen,
// and of the most likely ones, best first. No part of the choice, whose registers it would take.
template <int VOCAB, int SPLITS, int THREADS>
__device__ __noinline__ void amx_logprobs(float* shared, void* logits, const void* options, const void* tokens,
                                             void* ids, void* values, int row, int rank, int tid) {
  const AmxChoice o = ((const AmxChoice*)options)[row];
  const int chosen = ((const int*)tokens)[row];
  if (o.logprobs < 0 || chosen < 0 || !(o.flags & AMX_LIVE)) return;  // the whole team
  float* raw = (float*)logits + (long long)row * VOCAB;
  AmxTeam<VOCAB, SPLITS, THREADS> team(shared, raw, rank, tid);
  team.arrive();
  team.clear();
  const unsigned long long best = team.template read<true>(raw);
  team.await();
  const float top = amx_ordered((unsigned)(team.largest(best) >> 32));
  AmxSearch<VOCAB, SPLITS, THREADS> find = {team, top, AMX_STEPS};
  float part = 0.f;
  team.each([&](const float (&v)[4], int) {
#pragma unroll
    for (int j = 0; j < 4; ++j) part += find.weight(find.depth(v[j]));
  });
  const double total = log(team.over_team((double)part));

  AmxTeamTable<SPLITS>* table = team.table;
  const int count = min(o.logprobs, VOCAB < AMX_MOST_LOGPROBS ? VOCAB : AMX_MOST_LOGPROBS);
  if (count > 0) {
    const AmxBound bound = count < VOCAB ? find.search(find.everything(), false, (double)count) : find.everything();
    AmxTeamTable<SPLITS>* first = SPLITS > 1 ? amx_peer_of(table, 0) : table;
    team.each([&](const float (&v)[4], int token) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (find.keeps(bound, v[j], token + 32 * j))
          first->list[atomicAdd(&first->listed, 1)] = amx_key(amx_order(v[j]), token + 32 * j);
    });
  }
  team.sync();
  if (rank > 0) return;
  float* out = (float*)values + (long long)row * (1 + AMX_MOST_LOGPROBS);
  if (tid == 0) out[0] = (float)((double)raw[chosen] - top - total);
  if (tid < count) {
    const unsigned long long mine = table->list[tid];
    int place = 0;
    for (int n = 0; n < count; ++n) place += table->list[n] > mine;
    ((int*)ids)[(long long)row * AMX_MOST_LOGPROBS + place] = amx_token_of(mine);
    out[1 + place] = (float)((double)amx_ordered((unsigned)(mine >> 32)) - top - total);
  }
}
""",
    (SEARCH,),
)
