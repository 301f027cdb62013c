// A whole file in memory: mapped, or copied into huge pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace amx {

class MappedFile {
 public:
  // `huge`: copy into anonymous memory of 2 MiB pages, which saves address translations when every
  // byte is read for each token; the mapping itself can be dropped under pressure, a copy cannot.
  explicit MappedFile(const std::string& path, bool huge = false);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  ~MappedFile();

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void* area_ = nullptr;
  size_t area_size_ = 0;
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// The content of a regular file of at most `most` bytes; throws UserError.
std::string read_text(const std::string& path, size_t most = 128u << 20);

}  // namespace amx
