#include "model.h"

#include <dlfcn.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <unistd.h>

#include <climits>
#include <cstdlib>
#include <map>

#include "cache.h"
#include "common.h"
#include "cpu.h"
#include "mapped.h"

namespace amx {
namespace {

namespace ffi = tvm::ffi;

constexpr int kCpu = 1;               // DLPack's kDLCPU
constexpr int kPooledAllocator = 2;   // of TVM's virtual machine

DLDataType dtype_of(const std::string& name) {
  static const std::map<std::string, DLDataType> known = {
      {"uint8", {kDLUInt, 8, 1}},   {"int8", {kDLInt, 8, 1}},     {"int32", {kDLInt, 32, 1}},
      {"int64", {kDLInt, 64, 1}},   {"uint16", {kDLUInt, 16, 1}}, {"uint32", {kDLUInt, 32, 1}},
      {"float16", {kDLFloat, 16, 1}}, {"float32", {kDLFloat, 32, 1}},
  };
  auto found = known.find(name);
  if (found == known.end()) throw UserError("a parameter has the unknown type " + name);
  return found->second;
}

}  // namespace

struct Model::Impl {
  std::vector<MappedFile> shards;
  ffi::Optional<ffi::Module> machine;
  ffi::Any parameters;
  std::unique_ptr<Cache> cache;
  ffi::Function forward, forward_one;
  ffi::Any logits;

  ffi::Function function(const std::string& name) {
    auto found = machine.value()->GetFunction(name);
    if (!found.has_value()) {
      throw UserError("the library has no function " + name + "; compile the model again");
    }
    return found.value();
  }
};

Model::Model(const Manifest& m, Plan plan, const std::string& runtime, Weights weights,
             int threads)
    : impl_(std::make_unique<Impl>()), plan_(plan), vocab_size_(m.vocab_size) {
  setenv("TVM_NUM_THREADS", std::to_string(threads).c_str(), 1);  // read when the pool starts
  if (!dlopen(runtime.c_str(), RTLD_NOW | RTLD_GLOBAL)) {
    throw UserError(runtime + " cannot be loaded: " + dlerror());
  }
  int64_t bytes = m.weight_bytes();
  bool huge = weights == Weights::kHuge ||
              (weights == Weights::kAuto && huge_pages_granted() && 2 * bytes <= available_memory());
  for (const Shard& shard : m.shards) {
    impl_->shards.emplace_back(m.root + "/" + shard.file, huge);
    if (int64_t(impl_->shards.back().size()) != shard.bytes) {
      throw UserError(m.root + ": " + shard.file + " has changed since it was checked");
    }
  }
  ffi::Module executable = ffi::Module::LoadFromFile(m.root + "/" + m.library);
  auto load = executable->GetFunction("vm_load_executable");
  if (!load.has_value()) throw UserError(m.root + "/" + m.library + " is no TVM executable");
  impl_->machine = load.value()().cast<ffi::Module>();
  impl_->function("vm_initialization")(kCpu, 0, kPooledAllocator);
  std::vector<ffi::Any> tensors;
  for (const TensorRecord& t : m.order) {
    void* data = impl_->shards[t.shard].data() + t.offset;
    tensors.emplace_back(view(data, t.shape, dtype_of(t.dtype)));
  }
  impl_->parameters = ffi::Array<ffi::Any>(tensors.begin(), tensors.end());
  auto one = [](int64_t value) { return ffi::Shape({value}); };
  ffi::Any made = impl_->function("create_kv_cache")(one(1), one(plan.context), one(plan.chunk));
  impl_->cache = make_cache(made, m);
  impl_->forward = impl_->function("forward");
  impl_->forward_one = impl_->function("forward_one");
}

Model::~Model() = default;

const float* Model::append(const std::vector<int>& tokens) {
  if (tokens.empty()) throw UserError("the prompt is empty, expected at least one token");
  if (length_ + int64_t(tokens.size()) > plan_.context) {
    throw UserError(std::to_string(tokens.size()) + " tokens after " + std::to_string(length_) +
                    " exceed the context of " + std::to_string(plan_.context) +
                    "; shorten the prompt or raise --context or --max-memory");
  }
  for (int token : tokens) {
    if (token < 0 || token >= vocab_size_) {  // the compiled embedding lookup does not check
      throw UserError("token id " + std::to_string(token) + " is outside the vocabulary of " +
                      std::to_string(vocab_size_));
    }
  }
  for (size_t start = 0; start < tokens.size(); start += plan_.chunk) {
    int64_t count = std::min<int64_t>(plan_.chunk, tokens.size() - start);
    std::vector<int32_t> part(tokens.begin() + start, tokens.begin() + start + count);
    int32_t last = int32_t(count) - 1;  // the row whose logits are wanted
    ffi::Tensor ids = view(part.data(), {count}, {kDLInt, 32, 1});
    ffi::Any cache = impl_->cache->begin(count);
    if (count == 1) {
      impl_->logits = impl_->forward_one(ids, cache, impl_->parameters);
    } else {
      ffi::Tensor picks = view(&last, {1}, {kDLInt, 32, 1});
      impl_->logits = impl_->forward(ids, picks, cache, impl_->parameters);
    }
    impl_->cache->end();
    length_ += count;
  }
  return static_cast<const float*>(impl_->logits.cast<ffi::Tensor>().data_ptr());
}

std::string find_runtime() {
  std::vector<std::string> places;
  if (const char* given = std::getenv("AMX_TVM_RUNTIME")) {
    places = {given, std::string(given) + "/libtvm_runtime.so"};
  } else {
    char self[PATH_MAX + 1] = {};
    if (readlink("/proc/self/exe", self, PATH_MAX) > 0) {
      std::string folder(self);
      folder.erase(folder.rfind('/'));
      places = {folder + "/../runtime/tvm/lib/libtvm_runtime.so", folder + "/libtvm_runtime.so"};
    }
  }
  for (const std::string& place : places) {
    if (place.size() > 3 && place.compare(place.size() - 3, 3, ".so") == 0 &&
        access(place.c_str(), R_OK) == 0) {
      return place;
    }
  }
  throw UserError("libtvm_runtime.so was not found beside the runner; set AMX_TVM_RUNTIME to the "
                  "folder that holds it");
}

}  // namespace amx
