// The compiled model: TVM's virtual machine, the parameters, one sequence in the paged KV cache.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "budget.h"
#include "manifest.h"

namespace amx {

enum class Weights { kAuto, kMap, kHuge };  // huge: a copy in 2 MiB pages, which decodes faster

class Model {
 public:
  // `runtime`: path of libtvm_runtime.so. Its thread pool has `threads` threads.
  Model(const Manifest& manifest, Plan plan, const std::string& runtime, Weights weights,
        int threads);
  ~Model();

  // Add tokens to the sequence; returns the logits after the last one, valid until the next call.
  const float* append(const std::vector<int>& tokens);

  int64_t length() const { return length_; }
  const Plan& plan() const { return plan_; }

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
  Plan plan_;
  int64_t length_ = 0, vocab_size_;
};

// libtvm_runtime.so: AMX_TVM_RUNTIME, or its place in a bundle around the runner; else UserError.
std::string find_runtime();

}  // namespace amx
