#include "text.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <utf8proc.h>

#include <cstdlib>

#include "common.h"

namespace amx {
namespace {

// Length of the valid character at `i`, or 0 and the length of what to replace in `bad`.
size_t valid_at(std::string_view s, size_t i, size_t* bad) {
  auto byte = [&](size_t k) { return static_cast<unsigned char>(s[k]); };
  unsigned char first = byte(i);
  *bad = 1;
  if (first < 0x80) return 1;
  size_t length = first >= 0xc2 && first <= 0xdf ? 2
                  : (first & 0xf0) == 0xe0       ? 3
                  : first >= 0xf0 && first <= 0xf4 ? 4
                                                   : 0;
  if (!length) return 0;
  for (size_t k = 1; k < length; ++k) {
    if (i + k >= s.size()) return 0;
    unsigned char low = 0x80, high = 0xbf;
    if (k == 1) {  // no overlong forms, no surrogates, nothing above U+10FFFF
      if (first == 0xe0) low = 0xa0;
      if (first == 0xed) high = 0x9f;
      if (first == 0xf0) low = 0x90;
      if (first == 0xf4) high = 0x8f;
    }
    if (byte(i + k) < low || byte(i + k) > high) return 0;
    *bad = k + 1;
  }
  return length;
}

}  // namespace

size_t char_length(unsigned char first) {
  return first < 0xc0 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
}

std::string lossy_utf8(std::string_view bytes) {
  std::string out;
  out.reserve(bytes.size());
  for (size_t i = 0, bad; i < bytes.size();) {
    if (size_t length = valid_at(bytes, i, &bad)) {
      out.append(bytes.substr(i, length));
      i += length;
    } else {
      out += "\xef\xbf\xbd";
      i += bad;
    }
  }
  return out;
}

bool is_utf8(std::string_view bytes) {
  for (size_t i = 0, bad; i < bytes.size();) {
    size_t length = valid_at(bytes, i, &bad);
    if (!length) return false;
    i += length;
  }
  return true;
}

std::string encode_utf8(uint32_t c) {
  std::string out;
  if (c < 0x80) {
    out += char(c);
  } else if (c < 0x800) {
    out += char(0xc0 | c >> 6);
    out += char(0x80 | (c & 63));
  } else if (c < 0x10000) {
    out += char(0xe0 | c >> 12);
    out += char(0x80 | (c >> 6 & 63));
    out += char(0x80 | (c & 63));
  } else {
    out += char(0xf0 | c >> 18);
    out += char(0x80 | (c >> 12 & 63));
    out += char(0x80 | (c >> 6 & 63));
    out += char(0x80 | (c & 63));
  }
  return out;
}

std::vector<uint32_t> decode_utf8(std::string_view text) {
  std::vector<uint32_t> out;
  for (size_t i = 0; i < text.size();) {
    auto first = static_cast<unsigned char>(text[i]);
    size_t length = std::min(char_length(first), text.size() - i);
    uint32_t c = length == 1 ? first : first & (0x7f >> length);
    for (size_t k = 1; k < length; ++k) c = c << 6 | (static_cast<unsigned char>(text[i + k]) & 63);
    out.push_back(c);
    i += length;
  }
  return out;
}

std::string normalize(std::string_view text, const std::string& form) {
  int options = UTF8PROC_STABLE;
  if (form == "NFC" || form == "NFKC") options |= UTF8PROC_COMPOSE;
  if (form == "NFD" || form == "NFKD") options |= UTF8PROC_DECOMPOSE;
  if (form == "NFKC" || form == "NFKD") options |= UTF8PROC_COMPAT;
  utf8proc_uint8_t* result = nullptr;
  auto size = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                           static_cast<utf8proc_ssize_t>(text.size()), &result,
                           static_cast<utf8proc_option_t>(options));
  if (size < 0) throw UserError(std::string("the text is no UTF-8: ") + utf8proc_errmsg(size));
  std::string out(reinterpret_cast<char*>(result), static_cast<size_t>(size));
  std::free(result);
  return out;
}

Regex::Regex(const std::string& pattern) {
  int error;
  PCRE2_SIZE offset;
  auto* code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                             PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &offset, nullptr);
  if (!code) {
    PCRE2_UCHAR message[256];
    pcre2_get_error_message(error, message, sizeof message);
    throw UserError("the tokenizer's pattern " + pattern + " is not understood: " +
                    reinterpret_cast<char*>(message));
  }
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);  // matching falls back where there is no JIT
  code_.reset(code, [](void* p) { pcre2_code_free(static_cast<pcre2_code*>(p)); });
  match_.reset(pcre2_match_data_create(1, nullptr),
               [](void* p) { pcre2_match_data_free(static_cast<pcre2_match_data*>(p)); });
}

std::vector<Range> Regex::find_all(std::string_view text) const {
  auto* code = static_cast<pcre2_code*>(code_.get());
  auto* match = static_cast<pcre2_match_data*>(match_.get());
  auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  std::vector<Range> found;
  uint32_t options = 0;  // the first match checks the whole text's UTF-8
  for (size_t at = 0; at <= text.size(); options = PCRE2_NO_UTF_CHECK) {
    int count = pcre2_match(code, subject, text.size(), at, options, match, nullptr);
    if (count == PCRE2_ERROR_NOMATCH) break;
    if (count < 0) throw UserError("a regular expression of the tokenizer failed on this text");
    const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer(match);
    if (bounds[0] < at || bounds[1] < bounds[0]) {  // \K in a lookahead can do both
      throw UserError("a regular expression of the tokenizer matches backwards");
    }
    if (bounds[1] > bounds[0]) found.push_back({bounds[0], bounds[1]});
    at = bounds[1];
    if (bounds[1] == bounds[0]) {
      at += at < text.size() ? char_length(static_cast<unsigned char>(text[at])) : 1;
    }
  }
  return found;
}

}  // namespace amx
