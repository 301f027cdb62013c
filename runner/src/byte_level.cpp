#include "byte_level.h"

#include <array>
#include <cstdlib>
#include <unordered_map>

#include "text.h"

namespace amx {
namespace {

struct Alphabet {
  std::array<std::string, 256> character;
  std::unordered_map<uint32_t, unsigned char> byte;
  Alphabet() {
    uint32_t next = 256;
    for (int b = 0; b < 256; ++b) {
      bool printable = (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
      uint32_t code = printable ? uint32_t(b) : next++;
      character[b] = encode_utf8(code);
      byte[code] = static_cast<unsigned char>(b);
    }
  }
};

const Alphabet& alphabet() {
  static const Alphabet instance;
  return instance;
}

// The byte of a token "<0xNN>", or -1.
int byte_token(const std::string& token) {
  if (token.size() != 6 || token.compare(0, 3, "<0x") != 0 || token[5] != '>') return -1;
  char* end;
  std::string digits = token.substr(3, 2);
  long value = std::strtol(digits.c_str(), &end, 16);
  return *end ? -1 : static_cast<int>(value);
}

}  // namespace

const char* const kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

std::string bytes_to_alphabet(const std::string& bytes) {
  std::string out;
  for (unsigned char byte : bytes) out += alphabet().character[byte];
  return out;
}

std::string alphabet_to_bytes(const std::string& token) {
  std::string out;
  for (uint32_t code : decode_utf8(token)) {
    auto found = alphabet().byte.find(code);
    if (found == alphabet().byte.end()) return token;
    out += static_cast<char>(found->second);
  }
  return out;
}

std::vector<std::string> join_byte_tokens(std::vector<std::string> tokens) {
  std::vector<std::string> out;
  std::string bytes;
  auto flush = [&] {
    if (bytes.empty()) return;
    if (is_utf8(bytes)) {
      out.push_back(bytes);
    } else {
      for (size_t i = 0; i < bytes.size(); ++i) out.push_back("\xef\xbf\xbd");
    }
    bytes.clear();
  };
  for (std::string& token : tokens) {
    int byte = byte_token(token);
    if (byte >= 0) {
      bytes += static_cast<char>(byte);
      continue;
    }
    flush();
    out.push_back(std::move(token));
  }
  flush();
  return out;
}

}  // namespace amx
