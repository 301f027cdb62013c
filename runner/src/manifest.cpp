#include "manifest.h"

#include <algorithm>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <sstream>

#include "common.h"
#include "cpu.h"
#include "digest.h"
#include "mapped.h"
#include "versions.h"

namespace amx {
namespace {

using Json = nlohmann::json;
constexpr int kSchema = 3;
const std::string kAgain = "; copy the artifact anew or compile the model again";

std::string read_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return "";
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

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
      if (c == '\\') out += text[++i];
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
  if (info.st_size != bytes) {
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
  m.library = chosen.at("library").at("file");
  m.library_bytes = chosen.at("library").at("bytes");
  m.library_sha256 = chosen.at("library").at("sha256");
  m.target_key = chosen.at("target").at("key");
  m.name = model.at("name");
  m.vocab_size = model.at("vocab_size");
  m.context_length = model.at("context_length");
  // Longer sequences turn by another rotary table, from their first token on (longrope).
  m.context_length = std::min(m.context_length, model.value("long_after", m.context_length));
  m.eos = model.at("eos_token_ids").get<std::vector<int>>();
  if (model.contains("prompt_prefix")) {
    m.prompt_prefix = model.at("prompt_prefix").get<std::vector<int>>();
  } else if (model.value("add_bos", false) && model.at("bos_token_id").is_number()) {
    m.prompt_prefix = {model.at("bos_token_id").get<int>()};  // artifacts of version 0.1.0
  }
  m.page_size = cache.at("page_size");
  m.prefill_chunk = cache.value("prefill_chunk", 512);
  m.layers = cache.at("layers");
  m.kv_heads = cache.at("kv_heads");
  m.head_dim = cache.at("head_dim");
  m.kv_dtype = cache.at("dtype");
  m.heads = config.at("num_attention_heads");
  m.hidden = config.at("hidden_size");
  m.inner = config.at("intermediate_size");
  const Json& parameters = json.at("parameters");
  for (const Json& s : parameters.at("shards")) {
    m.shards.push_back({s.at("file"), s.at("bytes"), s.at("block_bytes"),
                        s.at("crc32").get<std::vector<uint32_t>>()});
  }
  for (const std::string name : parameters.at("order")) {
    const Json& t = parameters.at("tensors").at(name);
    TensorRecord record{name,           t.at("dtype"),  t.at("shape").get<std::vector<int64_t>>(),
                        t.at("shard"), t.at("offset"), t.at("bytes")};
    if (record.shard < 0 || record.shard >= int(m.shards.size()) || record.offset < 0 ||
        record.offset % 64 || record.offset + record.bytes > m.shards[record.shard].bytes) {
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

Manifest open_artifact(const std::string& root, bool contents) {
  std::string text = read_text(root + "/manifest.json");
  if (text.empty()) {
    throw UserError(root + " is not an artifact: it has no manifest.json; expected a directory "
                    "that `amx-tvm compile` or `amx-tvm export` made");
  }
  Json json = Json::parse(text, nullptr, false);
  if (json.is_discarded() || !json.is_object() || !json.contains("schema")) {
    throw UserError(root + "/manifest.json cannot be read as JSON" + kAgain);
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
      for (auto& [name, digest] : json.at("files").items()) check_file(m, name, digest);
      for (const Shard& shard : m.shards) {
        MappedFile file(m.root + "/" + shard.file);
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
