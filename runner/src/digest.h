// SHA-256 (FIPS 180-4) and CRC-32 (IEEE 802.3, as zlib's), for the checks before loading.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace amx {

class Sha256 {
 public:
  void update(const void* data, size_t size);
  std::string hex();  // finishes; use once

 private:
  void block(const uint8_t* data);
  std::array<uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  uint8_t buffer_[64];
  size_t filled_ = 0;
  uint64_t total_ = 0;
};

std::string sha256(const void* data, size_t size);
uint32_t crc32(const void* data, size_t size);

}  // namespace amx
