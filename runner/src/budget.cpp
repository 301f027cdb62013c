#include "budget.h"

#include <algorithm>
#include <cctype>

#include "common.h"
#include "cpu.h"

namespace amx {
namespace {

constexpr int64_t kChunks[] = {512, 256, 128, 64, 32};
constexpr int64_t kSmallestContext = 128, kDefaultContext = 4096;
// libtvm_ffi, libtvm_runtime, thread stacks, the tokenizer and its file while it is read.
constexpr int64_t kRuntimeBytes = 48 << 20;

int64_t working_bytes(const Manifest& m, int64_t chunk) {
  int64_t row = 4 * (6 * m.hidden + 4 * m.inner + 6 * m.heads * m.head_dim);
  return 2 * chunk * row + 2 * 4 * m.vocab_size;
}

}  // namespace

int64_t parse_size(const std::string& text) {
  size_t end = 0;
  double number = -1;
  try {
    number = std::stod(text, &end);
  } catch (const std::exception&) {
  }
  std::string unit;
  for (size_t i = end; i < text.size(); ++i) unit += char(std::toupper(text[i]));
  if (unit.size() > 1 && unit.back() == 'B') unit.pop_back();
  if (unit.size() > 1 && unit.back() == 'I') unit.pop_back();
  double scale = unit.empty() ? 1 : unit == "K" ? 1 << 10 : unit == "M" ? 1 << 20
                 : unit == "G" ? 1 << 30 : -1;
  if (!(number >= 0) || scale < 0 || number * scale > 1e18) {
    throw UserError("memory size '" + text + "' is none; expected a number with K, M or G: 300M");
  }
  return static_cast<int64_t>(number * scale);
}

Plan fit(const Manifest& m, int64_t limit, int64_t context) {
  if (context < 0 || context > m.context_length) {
    throw UserError("the context is " + std::to_string(context) + " tokens, expected 1 to " +
                    std::to_string(m.context_length) + ", the model's own");
  }
  if (!limit) {
    return {context ? context : std::min(m.context_length, kDefaultContext), m.prefill_chunk};
  }
  int64_t used = resident_memory();
  int64_t fixed = used + kRuntimeBytes + m.weight_bytes() + m.library_bytes + m.sequence_bytes;
  // Below 2^43 and 2^62: the manifest's numbers are bounded.
  // Few bits are decoded into float32 keys and values of two heads.
  int64_t token = m.token_bytes() + (m.page_bytes ? 2 * 2 * 4 * m.head_dim : 0);
  int64_t wanted = context ? context : std::min(kSmallestContext, m.context_length);
  for (int64_t chunk : kChunks) {
    int64_t room = limit - fixed - working_bytes(m, chunk);
    room = room < 0 ? 0 : room / (m.page_size * token) * m.page_size;
    bool last = chunk == kChunks[4];
    if (room >= std::max(wanted, std::min(4 * chunk, m.context_length)) ||
        (last && room >= wanted)) {
      return {context ? context : std::min(room, m.context_length), chunk};
    }
  }
  int64_t work = working_bytes(m, kChunks[4]);
  throw UserError(
      "the model does not fit into " + mebibytes(limit) + ": the process has " + mebibytes(used) +
      ", the runtime takes " + mebibytes(kRuntimeBytes) + ", weights " +
      mebibytes(m.weight_bytes()) + ", the library " + mebibytes(m.library_bytes) +
      ", working memory " + mebibytes(work) + " and " + std::to_string(wanted) +
      " tokens of context " + mebibytes(double(wanted) * token) + ": " +
      mebibytes(double(fixed + work) + double(wanted) * token) +
      " together; raise the limit, shorten the context or take a smaller model");
}

}  // namespace amx
