#include "bpe.h"

#include <algorithm>
#include <cstdio>
#include <queue>

#include "common.h"
#include "json_file.h"
#include "text.h"

namespace amx {
namespace {

constexpr size_t kCached = 20000, kCachedLength = 256;

uint64_t pair_key(int left, int right) {
  return uint64_t(uint32_t(left)) << 32 | uint32_t(right);
}

std::string optional_text(const nlohmann::json& model, const char* key) {
  auto found = model.find(key);
  return found == model.end() || found->is_null() ? "" : found->get<std::string>();
}

bool flag(const nlohmann::json& model, const char* key) {
  auto found = model.find(key);
  return found != model.end() && found->is_boolean() && found->get<bool>();
}

}  // namespace

Bpe::Bpe(const nlohmann::json& model) {
  std::string type = model.value("type", "BPE");
  if (type != "BPE") {
    throw UserError("the tokenizer's model is " + type + "; this runner knows BPE");
  }
  if (!optional_text(model, "continuing_subword_prefix").empty() ||
      !optional_text(model, "end_of_word_suffix").empty()) {
    throw UserError("the tokenizer marks subwords by a prefix or suffix, which this runner does "
                    "not know; use the Python runtime");
  }
  const auto& vocabulary = model.at("vocab");
  vocabulary_.reserve(vocabulary.size());
  tokens_.resize(vocabulary.size());
  for (auto& [token, value] : vocabulary.items()) {
    int id = int(whole_number(value, "vocab of the tokenizer", 0, kMostTokens));
    vocabulary_.emplace(token, id);
    if (size_t(id) >= tokens_.size()) tokens_.resize(id + 1);
    tokens_[id] = token;
  }
  const auto& merges = model.at("merges");
  merges_.reserve(merges.size());
  int rank = 0;
  for (const auto& merge : merges) {
    std::string left, right;
    if (merge.is_array()) {
      left = merge.at(0);
      right = merge.at(1);
    } else {
      std::string both = merge;
      size_t space = both.find(' ');
      if (space == std::string::npos) {
        throw UserError("the tokenizer has the merge '" + both + "'; two tokens and a space are "
                        "expected");
      }
      left = both.substr(0, space);
      right = both.substr(space + 1);
    }
    int a = id_of(left), b = id_of(right), joined = id_of(left + right);
    if (a < 0 || b < 0 || joined < 0) {
      throw UserError("the tokenizer merges tokens that its vocabulary lacks: " + left + right);
    }
    merges_[pair_key(a, b)] = {rank++, joined};  // of two equal merges the later one counts
  }
  ignore_merges_ = flag(model, "ignore_merges");
  byte_fallback_ = flag(model, "byte_fallback");
  fuse_unknown_ = flag(model, "fuse_unk");
  std::string unknown = optional_text(model, "unk_token");
  if (!unknown.empty()) unknown_ = id_of(unknown);
  for (int byte = 0; byte < 256; ++byte) {
    char name[8];
    std::snprintf(name, sizeof name, "<0x%02X>", byte);
    bytes_[byte] = id_of(name);
  }
}

int Bpe::id_of(const std::string& token) const {
  auto found = vocabulary_.find(token);
  return found == vocabulary_.end() ? -1 : found->second;
}

const std::string* Bpe::token_of(int id) const {
  return id >= 0 && size_t(id) < tokens_.size() ? &tokens_[id] : nullptr;
}

void Bpe::encode(const std::string& piece, std::vector<int>& ids) const {
  if (piece.empty()) return;
  if (auto cached = cache_.find(piece); cached != cache_.end()) {
    ids.insert(ids.end(), cached->second.begin(), cached->second.end());
    return;
  }
  std::vector<int> symbols;
  int whole = ignore_merges_ ? id_of(piece) : -1;
  if (whole >= 0) {
    symbols.push_back(whole);
  } else {
    characters(piece, symbols);
    merge(symbols);
  }
  ids.insert(ids.end(), symbols.begin(), symbols.end());
  if (piece.size() <= kCachedLength && cache_.size() < kCached) {
    cache_.emplace(piece, std::move(symbols));
  }
}

void Bpe::characters(const std::string& piece, std::vector<int>& symbols) const {
  bool unknown_before = false;
  for (size_t i = 0; i < piece.size();) {
    size_t length = char_length(static_cast<unsigned char>(piece[i]));
    std::string character = piece.substr(i, length);
    i += length;
    if (int id = id_of(character); id >= 0) {
      symbols.push_back(id);
      unknown_before = false;
      continue;
    }
    if (byte_fallback_) {
      bool all = true;
      for (unsigned char byte : character) all = all && bytes_[byte] >= 0;
      if (all) {
        for (unsigned char byte : character) symbols.push_back(bytes_[byte]);
        unknown_before = false;
        continue;
      }
    }
    if (unknown_ >= 0 && !(fuse_unknown_ && unknown_before)) symbols.push_back(unknown_);
    unknown_before = true;
  }
}

// Repeatedly join the pair of lowest rank, the leftmost of equals; a heap, since a text without
// pre-tokenizer is one piece.
void Bpe::merge(std::vector<int>& symbols) const {
  struct Candidate {
    int rank, position, id;
    bool operator<(const Candidate& other) const {  // the heap's top is its greatest
      return rank != other.rank ? rank > other.rank : position > other.position;
    }
  };
  int count = static_cast<int>(symbols.size());
  std::vector<int> next(count), previous(count);
  std::priority_queue<Candidate> heap;
  auto offer = [&](int left, int right) {
    auto found = merges_.find(pair_key(symbols[left], symbols[right]));
    if (found != merges_.end()) heap.push({found->second.rank, left, found->second.id});
  };
  for (int i = 0; i < count; ++i) {
    next[i] = i + 1 < count ? i + 1 : -1;
    previous[i] = i - 1;
    if (i + 1 < count) offer(i, i + 1);
  }
  constexpr int kGone = -1;
  while (!heap.empty()) {
    Candidate top = heap.top();
    heap.pop();
    int left = top.position, right = symbols[left] == kGone ? -1 : next[left];
    if (right < 0) continue;
    auto found = merges_.find(pair_key(symbols[left], symbols[right]));
    if (found == merges_.end() || found->second.id != top.id) continue;  // it changed since
    symbols[left] = top.id;
    symbols[right] = kGone;
    next[left] = next[right];
    if (next[left] >= 0) previous[next[left]] = left;
    if (previous[left] >= 0) offer(previous[left], left);
    if (next[left] >= 0) offer(left, next[left]);
  }
  symbols.erase(std::remove(symbols.begin(), symbols.end(), kGone), symbols.end());
}

}  // namespace amx
