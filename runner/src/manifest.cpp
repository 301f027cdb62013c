#include "manifest.h"

#include <algorithm>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <unordered_map>

#include "common.h"
#include "cpu.h"
#include "digest.h"
#include "json_file.h"
#include "mapped.h"
#include "versions.h"

namespace amx {
namespace {

using Json = nlohmann::json;
constexpr int kSchema = 4;
constexpr int64_t kMostWidth = 1 << 20, kMostLayers = 1 << 12;
const std::string kAgain = "; copy the artifact anew or compile the model again";

// The manifest's digest is over its JSON with sorted keys, without white space and without the
// top-level key "digest". The file has sorted keys already, so the text is reduced, not rewritten:
// no number has to be printed exactly as Python prints it.
std::string canonical(const std::string& text) {
  std::string out;
  bool quoted = false;
  for (size_t i = 0; i < text.size(); ++i) {
    char c = text[i];
    if (quoted) {
      out += c;
      if (c == '\\' && i + 1 < text.size()) out += text[++i];
      else if (c == '"') quoted = false;
    } else if (!std::isspace(static_cast<unsigned char>(c))) {
      out += c;
      quoted = c == '"';
    }
  }
  // "digest" sorts before "files" and holds no comma; shard digests are named "sha256".
  size_t start = out.find("\"digest\":\"");
  if (start == std::string::npos) return out;
  size_t end = out.find('"', start + 10) + 1;
  if (end < out.size() && out[end] == ',') ++end;
  return out.erase(start, end - start);
}

// A file's name as the manifest has it: a path that stays inside the artifact.
std::string file_name(const Json& value) {
  std::string name = value;
  std::string parts = "/" + name + "/";
  if (name.empty() || name[0] == '/' || parts.find("/../") != std::string::npos ||
      name.find('\0') != std::string::npos) {
    throw UserError("the manifest names the file '" + name + "', which is none of the artifact" +
                    kAgain);
  }
  return name;
}

int64_t bytes_of(const std::string& dtype) {
  static const std::unordered_map<std::string, int64_t> known = {
      {"uint8", 1},   {"int8", 1},   {"int32", 4},   {"int64", 8},
      {"uint16", 2},  {"uint32", 4}, {"float16", 2}, {"float32", 4},
  };
  auto found = known.find(dtype);
  if (found == known.end()) throw UserError("a parameter has the unknown type " + dtype + kAgain);
  return found->second;
}

// Whether a tensor has the bytes of its shape and lies inside its shard; nothing overflows.
bool fits(const TensorRecord& t, const std::vector<Shard>& shards) {
  int64_t size = bytes_of(t.dtype);
  for (int64_t length : t.shape) {
    if (__builtin_mul_overflow(size, length, &size)) return false;
  }
  int64_t room = shards[t.shard].bytes;
  return size == t.bytes && t.offset % 64 == 0 && t.offset <= room && t.bytes <= room - t.offset;
}

void check_file(const Manifest& m, const std::string& name, const std::string& digest) {
  MappedFile file(m.root + "/" + name);
  if (sha256(file.data(), file.size()) != digest) {
    throw UserError(m.root + ": " + name + " is damaged: its SHA-256 is not the manifest's" +
                    kAgain);
  }
}

void check_size(const Manifest& m, const std::string& name, int64_t bytes) {
  struct stat info;
  if (stat((m.root + "/" + name).c_str(), &info) != 0) {
    throw UserError(m.root + ": " + name + " is missing" + kAgain);
  }
  if (!S_ISREG(info.st_mode)) throw UserError(m.root + ": " + name + " is no regular file" + kAgain);
  if (bytes >= 0 && info.st_size != bytes) {
    throw UserError(m.root + ": " + name + " has " + std::to_string(info.st_size) +
                    " bytes, the manifest says " + std::to_string(bytes) +
                    " (truncated or replaced)" + kAgain);
  }
}

// The part of the manifest with "target" and "library" for this CPU: of a bundle with several
// libraries the first (they come with the most demanding first) whose features are all here.
const Json& for_cpu(const Json& json) {
  auto present = cpu_features();
  if (present.empty() || !json.contains("variants")) return json;
  for (const Json& variant : json.at("variants")) {
    if (missing_features(variant.at("target").at("features"), present).empty()) return variant;
  }
  return json;
}

void check_target(const std::string& root, const Json& target) {
  std::string key = target.at("key"), device = target.at("device"), triple = target.at("triple");
  if (device != "cpu") {
    throw UserError(root + " was compiled for device '" + device +
                    "'; this runner runs CPU artifacts, use the Python runtime");
  }
  std::string built = triple.substr(0, triple.find('-')), here = machine();
  if (built == "arm64") built = "aarch64";
  if (!built.empty() && built != here) {
    throw UserError(root + " was compiled for " + triple + ", this machine is " + here +
                    "; compile the model with this machine's --target");
  }
  auto missing = missing_features(target.at("features"), cpu_features());
  if (!missing.empty()) {
    std::string names;
    for (const auto& name : missing) names += (names.empty() ? "" : ", ") + name;
    throw UserError(root + " was compiled for " + key + " and needs the CPU features " + names +
                    ", which this CPU lacks; compile it for this CPU");
  }
}

void check_versions(const std::string& root, const Json& versions) {
  for (auto [key, here] : {std::pair{"tvm", kTvmVersion}, std::pair{"tvm_ffi", kFfiVersion}}) {
    std::string made = versions.at(key);
    if (made != here) {
      throw UserError(root + " was compiled with " + key + " " + made + ", this runner is for " +
                      here + "; compile the model again, or build the runner for that version");
    }
  }
}

Manifest parse(const std::string& root, const Json& json, const Json& chosen) {
  Manifest m;
  m.root = root;
  const Json& model = json.at("model");
  const Json& config = model.at("config");
  const Json& cache = json.at("kv_cache");
  m.library = file_name(chosen.at("library").at("file"));
  m.library_bytes = whole(chosen.at("library"), "bytes", 0, kMostBytes);
  m.library_sha256 = chosen.at("library").at("sha256");
  m.target_key = chosen.at("target").at("key");
  m.name = model.at("name");
  m.vocab_size = whole(model, "vocab_size", 1, kMostTokens);
  m.context_length = whole(model, "context_length", 1, INT32_MAX);
  // Longer sequences turn by another rotary table, from their first token on (longrope).
  if (model.contains("long_after")) {
    int64_t after = whole(model, "long_after", 0, INT32_MAX);
    m.context_length = std::min(m.context_length, std::max<int64_t>(after, 1));
  }
  auto ids = [&](const char* key) {
    auto found = whole_list(model, key, 0, m.vocab_size - 1);
    return std::vector<int>(found.begin(), found.end());
  };
  m.eos = ids("eos_token_ids");
  if (model.contains("prompt_prefix")) {
    m.prompt_prefix = ids("prompt_prefix");
  } else if (model.value("add_bos", false) && model.at("bos_token_id").is_number()) {
    // Artifacts of version 0.1.0.
    m.prompt_prefix = {int(whole(model, "bos_token_id", 0, m.vocab_size - 1))};
  }
  m.page_size = whole(cache, "page_size", 1, kMostWidth);
  m.prefill_chunk = cache.contains("prefill_chunk") ? whole(cache, "prefill_chunk", 1, 1 << 20) : 512;
  m.layers = whole(cache, "layers", 1, kMostLayers);
  m.kv_heads = whole(cache, "kv_heads", 1, kMostLayers);
  m.head_dim = whole(cache, "head_dim", 1, kMostLayers);
  m.kv_dtype = cache.at("dtype");
  if (cache.contains("packed")) {
    const Json& packed = cache.at("packed");
    m.page_bytes = whole(packed, "page_bytes", 1, int64_t(1) << 40);
    m.sequence_bytes = whole(packed, "sequence_bytes", 1, int64_t(1) << 40);
    m.newest = whole(packed, "newest", 1, kMostWidth);
  }
  m.heads = whole(config, "num_attention_heads", 1, kMostLayers);
  m.hidden = whole(config, "hidden_size", 1, kMostWidth);
  m.inner = whole(config, "intermediate_size", 1, kMostWidth);
  const Json& parameters = json.at("parameters");
  for (const Json& s : parameters.at("shards")) {
    Shard shard{file_name(s.at("file")), whole(s, "bytes", 0, kMostBytes),
                whole(s, "block_bytes", 1, kMostBytes), {}};
    for (int64_t sum : whole_list(s, "crc32", 0, UINT32_MAX)) shard.crc32.push_back(uint32_t(sum));
    int64_t blocks = shard.bytes / shard.block_bytes + (shard.bytes % shard.block_bytes != 0);
    if (int64_t(shard.crc32.size()) != blocks) {
      throw UserError(root + ": " + shard.file + " has " + std::to_string(shard.crc32.size()) +
                      " checksums for " + std::to_string(blocks) + " blocks" + kAgain);
    }
    m.shards.push_back(std::move(shard));
  }
  int64_t most = int64_t(m.shards.size()) - 1;
  for (const std::string name : parameters.at("order")) {
    const Json& t = parameters.at("tensors").at(name);
    TensorRecord record{name,
                        t.at("dtype"),
                        whole_list(t, "shape", 0, kMostBytes),
                        int(whole(t, "shard", 0, most)),
                        whole(t, "offset", 0, kMostBytes),
                        whole(t, "bytes", 0, kMostBytes)};
    if (!fits(record, m.shards)) {
      throw UserError(root + ": parameter " + name + " lies outside its shard" + kAgain);
    }
    m.order.push_back(std::move(record));
  }
  return m;
}

}  // namespace

int64_t Manifest::weight_bytes() const {
  int64_t sum = 0;
  for (const Shard& shard : shards) sum += shard.bytes;
  return sum;
}

int64_t Manifest::token_bytes() const {
  if (page_bytes) return (page_bytes + page_size - 1) / page_size;
  return 2 * layers * kv_heads * head_dim * (kv_dtype == "float16" ? 2 : 4);
}

Manifest open_artifact(const std::string& root, bool contents) {
  std::string file = root + "/manifest.json";
  if (access(file.c_str(), F_OK) != 0) {
    throw UserError(root + " is not an artifact: it has no manifest.json; expected a directory "
                    "that `amx-tvm compile` or `amx-tvm export` made");
  }
  std::string text = read_text(file);
  Json json = parse_json(text, file);
  if (!json.is_object() || !json.contains("schema")) {
    throw UserError(file + " is no manifest" + kAgain);
  }
  if (json["schema"] != kSchema) {
    throw UserError(root + " has schema " + json["schema"].dump() + ", this runner reads schema " +
                    std::to_string(kSchema) + "; compile the model again or take a newer runner");
  }
  std::string reduced = canonical(text);
  if (!json.contains("digest") || json["digest"] != sha256(reduced.data(), reduced.size())) {
    throw UserError(root + "/manifest.json does not match its own digest: it was edited or "
                    "damaged" + kAgain);
  }
  try {
    if (json.at("kind") != "causal_lm") {
      throw UserError(root + " is a compiled function; this runner runs language models");
    }
    check_versions(root, json.at("versions"));
    const Json& chosen = for_cpu(json);
    check_target(root, chosen.at("target"));
    Manifest m = parse(root, json, chosen);
    if (m.library_sha256.empty()) {
      throw UserError(root + " holds object files that are not linked yet; `python3 link.py "
                      "COMPILER` in that folder makes lib.so");
    }
    check_size(m, m.library, m.library_bytes);
    for (const Shard& shard : m.shards) check_size(m, shard.file, shard.bytes);
    if (contents) {
      check_file(m, m.library, m.library_sha256);
      for (auto& [name, digest] : json.at("files").items()) {
        check_size(m, file_name(name), -1);
        check_file(m, name, digest);
      }
      for (const Shard& shard : m.shards) {
        MappedFile file(m.root + "/" + shard.file);
        if (int64_t(file.size()) != shard.bytes) {
          throw UserError(root + ": " + shard.file + " has changed while it was read" + kAgain);
        }
        for (size_t i = 0; i < shard.crc32.size(); ++i) {
          int64_t start = int64_t(i) * shard.block_bytes;
          int64_t size = std::min(shard.block_bytes, shard.bytes - start);
          if (crc32(file.data() + start, size) != shard.crc32[i]) {
            throw UserError(root + ": " + shard.file + " is damaged between bytes " +
                            std::to_string(start) + " and " + std::to_string(start + size) +
                            kAgain);
          }
        }
      }
    }
    return m;
  } catch (const Json::exception& error) {
    throw UserError(root + "/manifest.json lacks or misnames a field (" + error.what() + ")" +
                    kAgain);
  }
}

}  // namespace amx
