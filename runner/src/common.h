// Errors that the user can cause: one message, exit code 2, as in the Python runtime.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

namespace amx {

struct UserError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline std::string mebibytes(double bytes) {
  return std::to_string(static_cast<long long>(bytes / (1 << 20) + 0.5)) + " MiB";
}

}  // namespace amx
