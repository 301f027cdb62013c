// Memory of a model that is loaded, known before: the rules of the Python runtime's budget.py.
#pragma once

#include <cstdint>
#include <string>

#include "manifest.h"

namespace amx {

struct Plan {
  int64_t context, chunk;  // tokens
};

int64_t parse_size(const std::string& text);  // "300M" -> bytes

// Context length and prefill chunk; `limit` 0 is none, `context` 0 is as long as fits (at most
// 4096 without a limit). Throws UserError with the numbers if the model does not fit.
Plan fit(const Manifest& manifest, int64_t limit, int64_t context);

}  // namespace amx
