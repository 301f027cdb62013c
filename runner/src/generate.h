// From logits to tokens and from tokens to text that can be shown.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <unordered_set>
#include <vector>

#include "tokenizer.h"

namespace amx {

struct Sampling {
  float temperature = 0;  // 0 is greedy
  int top_k = 0;          // 0 keeps all
  float top_p = 1, min_p = 0, repetition_penalty = 1;
  uint64_t seed = 0;
};

// Steps and their order are those of the Python runtime: repetition penalty, temperature, top-k,
// top-p, min-p, one draw. Greedy choices are equal to its; drawn ones come from another generator.
class Sampler {
 public:
  Sampler(const Sampling& options, int64_t vocab_size, const std::vector<int>& prompt);
  int operator()(const float* logits);

 private:
  int draw(const std::vector<float>& logits);
  Sampling options_;
  int64_t vocab_size_;
  std::unordered_set<int> seen_;
  std::mt19937_64 random_;
};

// Text appears when it is decided: never half a character. Decodes a short window of tokens, whose
// first ones are context: decoders of SentencePiece type drop a space at the start of a text.
class Detokenizer {
 public:
  Detokenizer(const Tokenizer& tokenizer, const std::vector<int>& prompt);
  std::string add(int token);
  std::string flush();

 private:
  std::string advance(bool final);
  const Tokenizer& tokenizer_;
  std::vector<int> tokens_;
  size_t start_ = 0, read_;
};

}  // namespace amx
