// libFuzzer over what the runner reads: manifests, tokenizers, and texts for them.
//
//   sh runner/fuzz/build.sh OUTPUT && OUTPUT -max_total_time=60 -rss_limit_mb=1024 -timeout=10
//
// The first byte chooses the reader. Every input must be read or refused with a UserError; the
// sanitizers end the process for anything else.
#include <cstdlib>
#include <fstream>
#include <string>

#include "../src/budget.h"
#include "../src/common.h"
#include "../src/digest.h"
#include "../src/generate.h"
#include "../src/json_file.h"
#include "../src/manifest.h"
#include "../src/tokenizer.h"
#include "../src/versions.h"

namespace {

using Json = nlohmann::json;

const std::string& folder() {
  static const std::string place = [] {
    char name[] = "/dev/shm/amx-fuzz-XXXXXX";
    if (!mkdtemp(name)) std::abort();
    return std::string(name);
  }();
  return place;
}

void write(const std::string& name, const std::string& text) {
  std::ofstream(folder() + "/" + name, std::ios::binary) << text;
}

// A manifest with the schema, versions and digest that are asked for, so that the rest is reached.
std::string completed(const std::string& text) {
  Json json;
  try {
    json = amx::parse_json(text, "input");
  } catch (const amx::UserError&) {
    return text;
  }
  if (!json.is_object()) return text;
  json.erase("digest");
  json["schema"] = 4;
  json["versions"] = {{"tvm", amx::kTvmVersion}, {"tvm_ffi", amx::kFfiVersion}};
  std::string plain = json.dump(-1, ' ', true);
  json["digest"] = amx::sha256(plain.data(), plain.size());
  return json.dump(-1, ' ', true);
}

void manifest(const std::string& text) {
  write("manifest.json", completed(text));
  write("lib.so", "");
  amx::Manifest m = amx::open_artifact(folder(), true);
  amx::fit(m, int64_t(1) << 30, 0);
}

// What stands behind the last brace is the text that is encoded.
void tokenizer(const std::string& text) {
  size_t end = std::min(text.rfind('}'), text.size() - 1) + 1;
  write("tokenizer.json", text.substr(0, end));
  amx::Tokenizer made(folder() + "/tokenizer.json");
  std::vector<int> ids = made.encode(text.substr(end) + " a\xff" "b");
  made.decode(ids);
  amx::Detokenizer stream(made, {});
  for (int id : ids) stream.add(id);
  stream.flush();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2) return 0;
  std::string text(reinterpret_cast<const char*>(data) + 1, size - 1);
  try {
    if (data[0] % 2) manifest(text);
    else tokenizer(text);
  } catch (const amx::UserError&) {
  }
  return 0;
}
