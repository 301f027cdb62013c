#include "mapped.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "common.h"

namespace amx {

MappedFile::MappedFile(const std::string& path, bool huge) {
  // Without O_NONBLOCK opening a named pipe waits for somebody who writes to it.
  int file = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  struct stat info;
  if (file < 0 || fstat(file, &info) != 0) {
    if (file >= 0) close(file);
    throw UserError(path + " cannot be opened: " + std::strerror(errno));
  }
  if (!S_ISREG(info.st_mode)) {
    close(file);
    throw UserError(path + " is no regular file; one was expected");
  }
  size_ = static_cast<size_t>(info.st_size);
  constexpr size_t kHuge = 2u << 20;
  area_size_ = huge ? size_ + kHuge : size_;
  if (area_size_ == 0) {
    close(file);
    return;
  }
  int flags = huge ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_PRIVATE;
  area_ = mmap(nullptr, area_size_, PROT_READ | PROT_WRITE, flags, huge ? -1 : file, 0);
  if (area_ == MAP_FAILED) {
    area_ = nullptr;
    close(file);
    throw UserError(path + " cannot be mapped: " + std::strerror(errno));
  }
  data_ = static_cast<uint8_t*>(area_);
  if (huge) {
    madvise(area_, area_size_, MADV_HUGEPAGE);
    data_ += (kHuge - reinterpret_cast<uintptr_t>(data_) % kHuge) % kHuge;
    for (size_t done = 0; done < size_;) {
      ssize_t count = pread(file, data_ + done, size_ - done, static_cast<off_t>(done));
      if (count <= 0) {
        close(file);
        munmap(area_, area_size_);
        throw UserError(path + " ended at byte " + std::to_string(done));
      }
      done += static_cast<size_t>(count);
    }
  }
  close(file);
}

std::string read_text(const std::string& path, size_t most) {
  MappedFile file(path);
  if (file.size() > most) {
    throw UserError(path + " has " + std::to_string(file.size()) + " bytes; at most " +
                    std::to_string(most) + " are read of such a file");
  }
  return std::string(reinterpret_cast<const char*>(file.data()), file.size());
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : area_(other.area_), area_size_(other.area_size_), data_(other.data_), size_(other.size_) {
  other.area_ = nullptr;
}

MappedFile::~MappedFile() {
  if (area_) munmap(area_, area_size_);
}

}  // namespace amx
