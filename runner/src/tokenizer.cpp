#include "tokenizer.h"

#include <algorithm>

#include "byte_level.h"
#include "common.h"
#include "json_file.h"
#include "mapped.h"

namespace amx {
namespace {

using Json = nlohmann::json;
constexpr size_t kMostText = 256 << 20;  // of one text while it is normalized or decoded
constexpr double kMostGrowth = 256;
constexpr size_t kMostSteps = 64;

[[noreturn]] void refuse(const std::string& what, const std::string& type) {
  throw UserError("the tokenizer has a " + what + " of type " + type +
                  ", which this runner does not know; use the Python runtime or token ids");
}

void check_growth(size_t bytes) {
  if (bytes > kMostText) {
    throw UserError("the tokenizer makes more than " + std::to_string(kMostText) +
                    " bytes of this text");
  }
}

// A text of the tokenizer that is looked for: an empty one is everywhere.
std::string literal(const Json& json) {
  std::string text = json;
  if (text.empty()) throw UserError("the tokenizer looks for an empty text, which is everywhere");
  return text;
}

std::string replaced(const std::string& text, const std::string& from, const std::string& to) {
  std::string out;
  size_t at = 0;
  for (size_t hit; (hit = text.find(from, at)) != std::string::npos; at = hit + from.size()) {
    out.append(text, at, hit - at).append(to);
    check_growth(out.size());
  }
  return out.append(text, at, std::string::npos);
}

std::string replaced(const std::string& text, const std::vector<Range>& hits,
                     const std::string& to) {
  std::string out;
  size_t at = 0;
  for (const Range& hit : hits) {
    out.append(text, at, hit.start - at).append(to);
    check_growth(out.size());
    at = hit.end;
  }
  return out.append(text, at, std::string::npos);
}

// A pattern of tokenizer.json: {"String": s} or {"Regex": r}; returns a finder of its matches.
std::function<std::vector<Range>(const std::string&)> finder(const Json& pattern) {
  if (pattern.contains("Regex")) {
    Regex regex(pattern.at("Regex").get<std::string>());
    return [regex](const std::string& text) { return regex.find_all(text); };
  }
  std::string wanted = literal(pattern.at("String"));
  return [wanted](const std::string& text) {
    std::vector<Range> hits;
    for (size_t at = 0; (at = text.find(wanted, at)) != std::string::npos; at += wanted.size()) {
      hits.push_back({at, at + wanted.size()});
    }
    return hits;
  };
}

// Cut a text at matches; behaviors as in tokenizers' SplitDelimiterBehavior.
void split(const std::string& text, const std::vector<Range>& hits, const std::string& behavior,
           bool invert, std::vector<std::string>& out) {
  struct Part {
    Range range;
    bool hit;
  };
  std::vector<Part> parts;
  size_t at = 0;
  for (const Range& hit : hits) {
    if (hit.start > at) parts.push_back({{at, hit.start}, invert});
    parts.push_back({hit, !invert});
    at = hit.end;
  }
  if (at < text.size()) parts.push_back({{at, text.size()}, invert});
  std::vector<Range> kept;
  if (behavior == "Isolated") {
    for (const Part& p : parts) kept.push_back(p.range);
  } else if (behavior == "Removed") {
    for (const Part& p : parts) {
      if (!p.hit) kept.push_back(p.range);
    }
  } else if (behavior == "Contiguous") {
    for (size_t i = 0; i < parts.size(); ++i) {
      if (i && parts[i].hit == parts[i - 1].hit) kept.back().end = parts[i].range.end;
      else kept.push_back(parts[i].range);
    }
  } else if (behavior == "MergedWithPrevious") {
    for (size_t i = 0; i < parts.size(); ++i) {
      if (parts[i].hit && i && !parts[i - 1].hit) kept.back().end = parts[i].range.end;
      else kept.push_back(parts[i].range);
    }
  } else if (behavior == "MergedWithNext") {
    for (size_t i = 0; i < parts.size(); ++i) {
      if (!parts[i].hit && i && parts[i - 1].hit) kept.back().end = parts[i].range.end;
      else kept.push_back(parts[i].range);
    }
  } else {
    refuse("split behavior", behavior);
  }
  for (const Range& range : kept) out.push_back(text.substr(range.start, range.end - range.start));
}

bool word_character(const std::string& text, size_t at) {
  static const Regex word("^\\w");
  return at < text.size() && !word.find_all(std::string_view(text).substr(at)).empty();
}

size_t previous_character(const std::string& text, size_t at) {
  do --at;
  while (at > 0 && (static_cast<unsigned char>(text[at]) & 0xc0) == 0x80);
  return at;
}

}  // namespace

Tokenizer::Tokenizer(const std::string& path) {
  Json json = parse_json(read_text(path), path);
  try {
    bpe_ = std::make_unique<Bpe>(json.at("model"));
    for (const Json& entry : json.value("added_tokens", Json::array())) {
      Added token{entry.at("content"),
                  int(whole(entry, "id", 0, kMostTokens)),
                  entry.value("special", false),
                  entry.value("normalized", false),
                  entry.value("single_word", false),
                  entry.value("lstrip", false),
                  entry.value("rstrip", false)};
      added_[token.id] = token;
      (token.normalized ? normalized_ : raw_).add(token);
    }
    add_normalizer(json.value("normalizer", Json()));
    add_pre_tokenizer(json.value("pre_tokenizer", Json()));
    add_decoder(json.value("decoder", Json()));
    if (std::max({normalizers_.size(), pre_tokenizers_.size(), decoders_.size()}) > kMostSteps) {
      throw UserError(path + " has more than " + std::to_string(kMostSteps) + " steps");
    }
  } catch (const Json::exception& error) {
    throw UserError(path + " is no tokenizer that can be read: " + error.what());
  }
}

void Tokenizer::AddedSet::add(const Added& token) {
  if (token.content.empty()) return;
  auto& list = by_first[static_cast<unsigned char>(token.content[0])];
  auto longer = [&](const Added& other) { return other.content.size() < token.content.size(); };
  list.insert(std::find_if(list.begin(), list.end(), longer), token);
  empty = false;
}

// Forty replacements of "a" by "aa" would make 2^40 times the text.
void Tokenizer::count_growth(const Json& step) {
  const Json& pattern = step.at("pattern");
  std::string content = step.at("content");
  size_t shortest = pattern.contains("Regex") ? 1 : literal(pattern.at("String")).size();
  growth_ *= std::max(1.0, double(content.size()) / double(shortest));
  if (growth_ > kMostGrowth) {
    throw UserError("the tokenizer's replacements may make a text more than 256 times as long");
  }
}

void Tokenizer::add_normalizer(const Json& json) {
  if (json.is_null()) return;
  std::string type = json.at("type");
  if (type == "Sequence") {
    for (const Json& step : json.at("normalizers")) add_normalizer(step);
  } else if (type == "NFC" || type == "NFD" || type == "NFKC" || type == "NFKD") {
    normalizers_.push_back([type](const std::string& text) { return normalize(text, type); });
  } else if (type == "Prepend") {
    std::string prefix = json.at("prepend");
    normalizers_.push_back(
        [prefix](const std::string& text) { return text.empty() ? text : prefix + text; });
  } else if (type == "Replace") {
    count_growth(json);
    auto find = finder(json.at("pattern"));
    std::string content = json.at("content");
    normalizers_.push_back([find, content](const std::string& text) {
      return replaced(text, find(text), content);
    });
  } else {
    refuse("normalizer", type);
  }
}

void Tokenizer::add_pre_tokenizer(const Json& json) {
  if (json.is_null()) return;
  std::string type = json.at("type");
  if (type == "Sequence") {
    for (const Json& step : json.at("pretokenizers")) add_pre_tokenizer(step);
  } else if (type == "Split") {
    auto find = finder(json.at("pattern"));
    std::string behavior = json.at("behavior");
    bool invert = json.value("invert", false);
    pre_tokenizers_.push_back([=](const std::string& piece, bool, Pieces& out) {
      split(piece, find(piece), behavior, invert, out);
    });
  } else if (type == "Digits") {
    bool each = json.value("individual_digits", false);
    Regex digits("\\p{N}");
    pre_tokenizers_.push_back([=](const std::string& piece, bool, Pieces& out) {
      split(piece, digits.find_all(piece), each ? "Isolated" : "Contiguous", false, out);
    });
  } else if (type == "ByteLevel") {
    bool prefix = json.value("add_prefix_space", true), cut = json.value("use_regex", true);
    Regex words(kGpt2Pattern);
    pre_tokenizers_.push_back([=](const std::string& piece, bool, Pieces& out) {
      std::string text = prefix && piece[0] != ' ' ? " " + piece : piece;
      Pieces parts;
      if (cut) split(text, words.find_all(text), "Isolated", false, parts);
      else parts.push_back(text);
      for (const std::string& part : parts) out.push_back(bytes_to_alphabet(part));
    });
  } else if (type == "Metaspace") {
    std::string mark = literal(json.at("replacement")), scheme = json.value("prepend_scheme", "always");
    bool cut = json.value("split", true);
    pre_tokenizers_.push_back([=](const std::string& piece, bool first, Pieces& out) {
      std::string text = replaced(piece, " ", mark);
      bool wanted = scheme == "always" || (scheme == "first" && first);
      if (wanted && text.rfind(mark, 0) != 0) text = mark + text;
      if (!cut) {
        out.push_back(text);
        return;
      }
      std::vector<Range> hits;
      for (size_t at = 0; (at = text.find(mark, at)) != std::string::npos; at += mark.size()) {
        hits.push_back({at, at + mark.size()});
      }
      split(text, hits, "MergedWithNext", false, out);
    });
  } else {
    refuse("pre-tokenizer", type);
  }
}

void Tokenizer::add_decoder(const Json& json) {
  if (json.is_null()) return;
  std::string type = json.at("type");
  if (type == "Sequence") {
    for (const Json& step : json.at("decoders")) add_decoder(step);
  } else if (type == "ByteLevel") {
    decoders_.push_back([](Pieces tokens) {
      std::string bytes;
      for (const std::string& token : tokens) bytes += alphabet_to_bytes(token);
      return Pieces{lossy_utf8(bytes)};
    });
  } else if (type == "Replace") {
    count_growth(json);
    auto find = finder(json.at("pattern"));
    std::string content = json.at("content");
    decoders_.push_back([=](Pieces tokens) {
      for (std::string& token : tokens) token = replaced(token, find(token), content);
      return tokens;
    });
  } else if (type == "ByteFallback") {
    decoders_.push_back(join_byte_tokens);
  } else if (type == "Fuse") {
    decoders_.push_back([](Pieces tokens) {
      std::string all;
      for (const std::string& token : tokens) all += token;
      return Pieces{all};
    });
  } else if (type == "Strip") {
    std::string content = literal(json.at("content"));
    int64_t start = whole(json, "start", 0, INT32_MAX), stop = whole(json, "stop", 0, INT32_MAX);
    decoders_.push_back([=](Pieces tokens) {
      for (std::string& token : tokens) {
        for (int64_t i = 0; i < start && token.rfind(content, 0) == 0; ++i) {
          token.erase(0, content.size());
        }
        for (int64_t i = 0; i < stop && token.size() >= content.size() &&
                        token.compare(token.size() - content.size(), std::string::npos,
                                      content) == 0;
             ++i) {
          token.erase(token.size() - content.size());
        }
      }
      return tokens;
    });
  } else if (type == "Metaspace") {
    std::string mark = literal(json.at("replacement"));
    bool prefix = json.value("prepend_scheme", "always") != "never";
    decoders_.push_back([=](Pieces tokens) {
      for (size_t i = 0; i < tokens.size(); ++i) {
        if (i == 0 && prefix && tokens[i].rfind(mark, 0) == 0) tokens[i].erase(0, mark.size());
        tokens[i] = replaced(tokens[i], mark, " ");
      }
      return tokens;
    });
  } else {
    refuse("decoder", type);
  }
}

std::vector<Tokenizer::Section> Tokenizer::cut(const AddedSet& tokens, const std::string& text) {
  std::vector<Section> sections;
  if (tokens.empty) return {{text, -1}};
  static const Regex spaces_after("^\\s+"), spaces_before("\\s+$");
  size_t start = 0;
  for (size_t at = 0; at < text.size();) {
    const Added* match = nullptr;
    for (const Added& token : tokens.by_first[static_cast<unsigned char>(text[at])]) {
      if (text.compare(at, token.content.size(), token.content) == 0) {
        match = &token;
        break;
      }
    }
    size_t end = match ? at + match->content.size() : at;
    if (match && match->single_word &&
        ((at > 0 && word_character(text, previous_character(text, at))) ||
         word_character(text, end))) {
      at = end;
      continue;
    }
    if (!match) {
      ++at;
      continue;
    }
    size_t begin = at;
    if (match->strip_left) {
      auto found = spaces_before.find_all(std::string_view(text).substr(start, at - start));
      if (!found.empty()) begin = start + found.back().start;
    }
    if (match->strip_right) {
      auto found = spaces_after.find_all(std::string_view(text).substr(end));
      if (!found.empty()) end += found[0].end;
    }
    if (begin > start) sections.push_back({text.substr(start, begin - start), -1});
    sections.push_back({"", match->id});
    start = at = end;
  }
  if (start < text.size()) sections.push_back({text.substr(start), -1});
  return sections;
}

std::vector<int> Tokenizer::encode(const std::string& text) const {
  std::vector<int> ids;
  bool first = true;
  for (const Section& outer : cut(raw_, lossy_utf8(text))) {
    if (outer.id >= 0) {
      ids.push_back(outer.id);
      first = false;
      continue;
    }
    std::string plain = outer.text;
    for (const auto& step : normalizers_) {
      plain = step(plain);
      check_growth(plain.size());
    }
    for (const Section& inner : cut(normalized_, plain)) {
      if (inner.id >= 0) {
        ids.push_back(inner.id);
        first = false;
        continue;
      }
      Pieces pieces{inner.text};
      for (const auto& step : pre_tokenizers_) {
        Pieces cut_pieces;
        for (size_t i = 0; i < pieces.size(); ++i) {
          if (!pieces[i].empty()) step(pieces[i], first && i == 0, cut_pieces);
        }
        pieces = std::move(cut_pieces);
      }
      for (const std::string& piece : pieces) bpe_->encode(piece, ids);
      first = false;
    }
  }
  return ids;
}

std::string Tokenizer::decode(const std::vector<int>& ids) const {
  Pieces tokens;
  for (int id : ids) {
    auto added = added_.find(id);
    if (added != added_.end()) {
      if (!added->second.special) tokens.push_back(added->second.content);
    } else if (const std::string* token = bpe_->token_of(id)) {
      tokens.push_back(*token);
    }
  }
  for (const auto& step : decoders_) {
    tokens = step(std::move(tokens));
    size_t size = 0;
    for (const std::string& token : tokens) size += token.size();
    check_growth(size);
  }
  std::string text;
  for (const std::string& token : tokens) text += token;
  return text;
}

}  // namespace amx
