// The two ways in which vocabularies spell bytes: GPT-2's alphabet and tokens such as "<0x0A>".
#pragma once

#include <string>
#include <vector>

namespace amx {

// How GPT-2 cuts text into words; the `use_regex` of a ByteLevel pre-tokenizer.
extern const char* const kGpt2Pattern;

// Each byte becomes a printable character: itself where it is one, else U+0100 and up.
std::string bytes_to_alphabet(const std::string& bytes);
std::string alphabet_to_bytes(const std::string& token);  // the token itself if it has others

// Runs of byte tokens become the text they spell, or one U+FFFD a byte where they spell none.
std::vector<std::string> join_byte_tokens(std::vector<std::string> tokens);

}  // namespace amx
