// The cache of keys and values of one sequence, as the compiled functions take it.
#pragma once

#include <tvm/ffi/any.h>
#include <tvm/ffi/container/tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "budget.h"
#include "manifest.h"

namespace amx {

class Cache {
 public:
  virtual ~Cache() = default;
  // Reserve `count` positions for one call; returns the functions' argument.
  virtual tvm::ffi::Any begin(int64_t count) = 0;
  virtual void end() = 0;
};

// `made` is what the library's create_kv_cache returned: TVM's object, or the memory of a cache of
// few bits, whose pages are counted here.
std::unique_ptr<Cache> make_cache(const tvm::ffi::Any& made, const Manifest& manifest);

// A tensor over memory that outlives it; only shape and descriptor are owned.
tvm::ffi::Tensor view(void* data, const std::vector<int64_t>& shape, DLDataType dtype);

}  // namespace amx
