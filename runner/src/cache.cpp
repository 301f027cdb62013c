#include "cache.h"

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "common.h"

namespace amx {

namespace ffi = tvm::ffi;

ffi::Tensor view(void* data, const std::vector<int64_t>& shape, DLDataType dtype) {
  struct Holder {
    std::vector<int64_t> shape;
    DLManagedTensor tensor;
  };
  auto* holder = new Holder{shape, {}};
  holder->tensor.dl_tensor = {data, {kDLCPU, 0}, int32_t(shape.size()), dtype,
                              holder->shape.data(), nullptr, 0};
  holder->tensor.manager_ctx = holder;
  holder->tensor.deleter = [](DLManagedTensor* self) {
    delete static_cast<Holder*>(self->manager_ctx);
  };
  return ffi::Tensor::FromDLPack(&holder->tensor);
}

namespace {

constexpr int64_t kSequence = 0;  // the only sequence
constexpr DLDataType kInt32 = {kDLInt, 32, 1};

ffi::Function global(const std::string& name) { return ffi::Function::GetGlobalRequired(name); }

// TVM's object, which decides which page a token gets.
class ObjectCache : public Cache {
 public:
  explicit ObjectCache(const ffi::Any& made)
      : object_(made.cast<ffi::Array<ffi::Any>>()[0]),
        begin_(global("vm.builtin.kv_state_begin_forward")),
        end_(global("vm.builtin.kv_state_end_forward")) {
    global("vm.builtin.kv_state_add_sequence")(object_, kSequence);
  }
  ffi::Any begin(int64_t count) override {
    begin_(object_, ffi::Shape({kSequence}), ffi::Shape({count}));
    return object_;
  }
  void end() override { end_(object_); }

 private:
  ffi::Any object_;
  ffi::Function begin_, end_;
};

// Keys and values in few bits: amx_tvm/runtime/kv_packed.py says what the functions are told.
class PackedCache : public Cache {
 public:
  PackedCache(const ffi::Any& made, const Manifest& m) : page_(m.page_size), newest_(m.newest) {
    auto tensors = made.cast<ffi::Array<ffi::Any>>();
    pages_ = tensors[0].cast<ffi::Tensor>();
    recent_ = tensors[1].cast<ffi::Tensor>();
    int64_t page = bytes(pages_), sequence = bytes(recent_);
    if (page != m.page_bytes || sequence != m.sequence_bytes) {
      throw UserError("the library's cache has " + std::to_string(page) + " bytes a page and " +
                      std::to_string(sequence) + " a sequence, the manifest says " +
                      std::to_string(m.page_bytes) + " and " + std::to_string(m.sequence_bytes) +
                      "; compile the model again");
    }
    std::memset(recent_.data_ptr(), 0, sequence);
  }
  ffi::Any begin(int64_t count) override {
    int64_t end = length_ + count, pages = (end + page_ - 1) / page_;
    rows_.assign(2 * count, 0);
    std::iota(rows_.begin(), rows_.begin() + count, int32_t(length_));
    told_ = {0, int32_t(count), int32_t(length_), int32_t(exact_), 0, 0, 0, 0};
    table_.resize(pages);
    std::iota(table_.begin(), table_.end(), 0);
    length_ = end;
    exact_ = std::max(exact_, end - newest_);
    return ffi::Array<ffi::Any>{view(rows_.data(), {2, count}, kInt32),
                                view(told_.data(), {1, int64_t(told_.size())}, kInt32),
                                view(table_.data(), {1, pages}, kInt32), pages_, recent_};
  }
  void end() override {}

 private:
  // Bytes of a row of a tensor.
  static int64_t bytes(const ffi::Tensor& tensor) {
    int64_t size = tensor.dtype().bits / 8;
    for (size_t i = 1; i < tensor.shape().size(); ++i) size *= tensor.shape()[i];
    return size;
  }

  ffi::Tensor pages_, recent_;
  int64_t page_, newest_, length_ = 0, exact_ = 0;
  std::vector<int32_t> rows_, told_, table_;
};

}  // namespace

std::unique_ptr<Cache> make_cache(const ffi::Any& made, const Manifest& manifest) {
  if (manifest.page_bytes) return std::make_unique<PackedCache>(made, manifest);
  return std::make_unique<ObjectCache>(made);
}

}  // namespace amx
