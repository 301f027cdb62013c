// Byte-pair encoding of one piece of text, as Hugging Face's tokenizers does it.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace amx {

class Bpe {
 public:
  explicit Bpe(const nlohmann::json& model);  // the "model" of tokenizer.json

  void encode(const std::string& piece, std::vector<int>& ids) const;
  int id_of(const std::string& token) const;  // -1 if there is none
  const std::string* token_of(int id) const;  // nullptr if there is none

 private:
  struct Merge {
    int rank, id;
  };
  void merge(std::vector<int>& symbols) const;
  void characters(const std::string& piece, std::vector<int>& symbols) const;

  std::unordered_map<std::string, int> vocabulary_;
  std::vector<std::string> tokens_;
  std::unordered_map<uint64_t, Merge> merges_;  // left id << 32 | right id
  bool ignore_merges_ = false, byte_fallback_ = false, fuse_unknown_ = false;
  int unknown_ = -1;
  int bytes_[256];
  mutable std::unordered_map<std::string, std::vector<int>> cache_;
};

}  // namespace amx
