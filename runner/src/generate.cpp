#include "generate.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "common.h"

namespace amx {
namespace {

constexpr size_t kContextTokens = 6;
const std::string kUndecided = "\xef\xbf\xbd";

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() &&
         text.compare(text.size() - end.size(), std::string::npos, end) == 0;
}

}  // namespace

Sampler::Sampler(const Sampling& options, int64_t vocab_size, const std::vector<int>& prompt)
    : options_(options), vocab_size_(vocab_size), random_(options.seed) {
  if (options.temperature < 0) throw UserError("the temperature is negative, expected at least 0");
  if (options.top_p <= 0 || options.top_p > 1) throw UserError("top-p is not in (0, 1]");
  if (options.min_p < 0 || options.min_p > 1) throw UserError("min-p is not in [0, 1]");
  if (options.repetition_penalty <= 0) throw UserError("the repetition penalty is not above 0");
  if (options.repetition_penalty != 1) seen_.insert(prompt.begin(), prompt.end());
}

int Sampler::operator()(const float* given) {
  std::vector<float> changed;
  const float* logits = given;
  if (!seen_.empty() || options_.temperature > 0) {
    changed.assign(given, given + vocab_size_);
    for (int token : seen_) {
      float& value = changed[token];
      value = value > 0 ? value / options_.repetition_penalty : value * options_.repetition_penalty;
    }
    logits = changed.data();
  }
  // std::max_element stops at nothing: NaN compares false, so finiteness is checked on the sum.
  int best = static_cast<int>(std::max_element(logits, logits + vocab_size_) - logits);
  float sum = std::accumulate(logits, logits + vocab_size_, 0.0f,
                              [](float total, float x) { return total + x * 0.0f; });
  if (sum != 0) {
    throw UserError("the model's logits hold NaN or infinity; its weights or kernels are broken");
  }
  if (options_.temperature > 0) best = draw(changed);
  if (options_.repetition_penalty != 1) seen_.insert(best);
  return best;
}

int Sampler::draw(const std::vector<float>& logits) {
  std::vector<int> tokens(logits.size());
  std::iota(tokens.begin(), tokens.end(), 0);
  auto likelier = [&](int a, int b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  };
  if (options_.top_k > 0 && size_t(options_.top_k) < tokens.size()) {
    std::nth_element(tokens.begin(), tokens.begin() + options_.top_k, tokens.end(), likelier);
    tokens.resize(options_.top_k);
  }
  std::sort(tokens.begin(), tokens.end(), likelier);
  std::vector<double> weights;
  double total = 0;
  for (int token : tokens) {
    weights.push_back(std::exp((logits[token] - logits[tokens[0]]) / options_.temperature));
    total += weights.back();
  }
  size_t kept = tokens.size();
  if (options_.top_p < 1) {
    double reached = 0;
    for (kept = 0; kept < tokens.size() && reached < options_.top_p * total;) {
      reached += weights[kept++];
    }
  }
  while (kept > 1 && weights[kept - 1] < options_.min_p) --kept;
  double sum = std::accumulate(weights.begin(), weights.begin() + kept, 0.0);
  double goal = std::uniform_real_distribution<double>(0, sum)(random_);
  for (size_t i = 0; i < kept; ++i) {
    goal -= weights[i];
    if (goal < 0) return tokens[i];
  }
  return tokens[kept - 1];
}

Detokenizer::Detokenizer(const Tokenizer& tokenizer, const std::vector<int>& prompt)
    : tokenizer_(tokenizer) {
  size_t skip = prompt.size() > kContextTokens ? prompt.size() - kContextTokens : 0;
  tokens_.assign(prompt.begin() + skip, prompt.end());
  read_ = tokens_.size();
}

std::string Detokenizer::add(int token) {
  tokens_.push_back(token);
  return advance(false);
}

std::string Detokenizer::flush() { return advance(true); }

std::string Detokenizer::advance(bool final) {
  std::string before = tokenizer_.decode({tokens_.begin() + start_, tokens_.begin() + read_});
  std::string after = tokenizer_.decode({tokens_.begin() + start_, tokens_.end()});
  // Lengths in characters would be exact; bytes differ only where U+FFFD turns into a character,
  // and that case is seen by the comparison of the texts below.
  if (after == before || (ends_with(after, kUndecided) && !final)) return "";
  std::string known = before;
  while (ends_with(known, kUndecided)) known.erase(known.size() - kUndecided.size());
  if (after.compare(0, before.size(), before) != 0) {
    // The new token completes a character that was broken off before it.
    before = known;
    size_t common = 0;
    while (common < std::min(before.size(), after.size()) && before[common] == after[common]) {
      ++common;
    }
    while (common > 0 && common < after.size() && (after[common] & 0xc0) == 0x80) --common;
    before.resize(common);
  }
  start_ = read_;
  read_ = tokens_.size();
  return after.substr(before.size());
}

}  // namespace amx
