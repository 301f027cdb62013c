// The tokenizers that tokenizer.json describes: byte-level BPE and SentencePiece-type BPE.
//
//   text -> special tokens cut out -> normalizer -> other added tokens cut out -> pre-tokenizer
//        -> BPE -> ids            and ids -> tokens -> decoder -> text
//
// Parts of other kinds are refused when the file is read: a tokenizer that is only nearly right
// would make a model worse without anybody noticing.
#pragma once

#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <unordered_map>
#include <vector>

#include "bpe.h"
#include "text.h"

namespace amx {

class Tokenizer {
 public:
  explicit Tokenizer(const std::string& path);  // of tokenizer.json; throws UserError

  std::vector<int> encode(const std::string& text) const;
  std::string decode(const std::vector<int>& ids) const;  // special tokens left out

 private:
  using Json = nlohmann::json;
  using Pieces = std::vector<std::string>;
  struct Added {
    std::string content;
    int id;
    bool special, normalized, single_word, strip_left, strip_right;
  };
  // Added tokens by their first byte, longest first.
  struct AddedSet {
    std::vector<Added> by_first[256];
    bool empty = true;
    void add(const Added& token);
  };
  struct Section {  // a stretch of text, or a token that was cut out
    std::string text;
    int id = -1;
  };

  void add_normalizer(const Json& json);
  void add_pre_tokenizer(const Json& json);
  void add_decoder(const Json& json);
  static std::vector<Section> cut(const AddedSet& tokens, const std::string& text);

  void count_growth(const Json& step);

  std::unique_ptr<Bpe> bpe_;
  double growth_ = 1;  // how many times longer all replacements together may make a text
  AddedSet raw_, normalized_;
  std::unordered_map<int, Added> added_;
  std::vector<std::function<std::string(const std::string&)>> normalizers_;
  // A pre-tokenizer turns one piece into several; the flag says whether it begins the text.
  std::vector<std::function<void(const std::string&, bool, Pieces&)>> pre_tokenizers_;
  std::vector<std::function<Pieces(Pieces)>> decoders_;
};

}  // namespace amx
