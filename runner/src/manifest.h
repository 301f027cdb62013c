// manifest.json of an artifact, and the checks that come before any of its code is loaded.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace amx {

struct TensorRecord {
  std::string name, dtype;
  std::vector<int64_t> shape;
  int shard;
  int64_t offset, bytes;
};

struct Shard {
  std::string file;
  int64_t bytes, block_bytes;
  std::vector<uint32_t> crc32;
};

struct Manifest {
  std::string root, library, library_sha256, target_key, name, kv_dtype;
  int64_t library_bytes = 0;
  std::vector<TensorRecord> order;  // in the order of the functions' parameter tuple
  std::vector<Shard> shards;
  int64_t vocab_size = 0, context_length = 0, page_size = 0, prefill_chunk = 0;
  int64_t layers = 0, kv_heads = 0, head_dim = 0, heads = 0, hidden = 0, inner = 0;
  // Of keys and values in few bits; 0 where they are stored as numbers of kv_dtype.
  int64_t page_bytes = 0, sequence_bytes = 0, newest = 0;
  std::vector<int> eos;
  std::vector<int> prompt_prefix;  // what every prompt begins with, most often BOS or nothing

  int64_t weight_bytes() const;
  int64_t token_bytes() const;  // of the cache
};

// Read the manifest of `root` and check it, the target and every file's size; with `contents` also
// all checksums. Throws UserError with the first thing that is wrong and what to do.
Manifest open_artifact(const std::string& root, bool contents);

}  // namespace amx
