// Text in UTF-8: code points, lossy decoding, Unicode normal forms, and regular expressions.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace amx {

struct Range {
  size_t start, end;  // bytes
};

// Bytes of the character that starts with this byte; 1 for what starts none.
size_t char_length(unsigned char first);

// Replace invalid UTF-8 by U+FFFD, one for every longest invalid prefix of a character.
std::string lossy_utf8(std::string_view bytes);
bool is_utf8(std::string_view bytes);

std::string encode_utf8(uint32_t code_point);
std::vector<uint32_t> decode_utf8(std::string_view text);

// `form` is "NFC", "NFD", "NFKC" or "NFKD".
std::string normalize(std::string_view text, const std::string& form);

// A pattern with Unicode properties, as tokenizer.json files have them (PCRE2).
class Regex {
 public:
  explicit Regex(const std::string& pattern);
  std::vector<Range> find_all(std::string_view text) const;

 private:
  std::shared_ptr<void> code_, match_;
};

}  // namespace amx
