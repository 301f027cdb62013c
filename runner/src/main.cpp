// amx-run: generate text with a compiled model, without Python.
//
//   amx-run BUNDLE "The capital of France is" -n 64

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>

#include "common.h"
#include "cpu.h"
#include "generate.h"
#include "json_file.h"
#include "model.h"

namespace {

using namespace amx;

const char kHelp[] =
    "usage: amx-run DIR PROMPT [options]      continue a text; - reads standard input\n"
    "       amx-run DIR --ids 1,2,3 [options] continue token ids\n"
    "       amx-run DIR --encode | --decode   JSON lines of texts or ids on standard input\n"
    "DIR is a directory that `amx-tvm compile` or `amx-tvm export` made.\n\n"
    "  -n, --max-new-tokens N   most tokens to generate (128)\n"
    "  -t, --temperature X      0 is greedy (0)\n"
    "      --top-k K  --top-p P  --min-p P  --repetition-penalty R  --seed S\n"
    "      --ignore-eos         go on after the end of the text\n"
    "      --threads N          by default TVM_NUM_THREADS or the physical cores\n"
    "      --context N          longest prompt and answer in tokens (at most 4096)\n"
    "      --max-memory SIZE    such as 300M: the context takes what the weights leave, or the\n"
    "                           model is refused before it is loaded\n"
    "      --weights WHERE      auto, map (the file, mapped) or huge (a copy in huge pages)\n"
    "      --no-verify          check sizes only, not the checksums\n"
    "      --print-ids          print the new token ids after the text\n"
    "  -q, --quiet              no timings on standard error\n";

struct Options {
  std::string root, prompt, ids, mode = "generate";
  bool has_prompt = false, verify = true, ignore_eos = false, print_ids = false, quiet = false;
  int max_new_tokens = 128, threads = 0;
  int64_t context = 0, max_memory = 0;
  Weights weights = Weights::kAuto;
  Sampling sampling;
};

template <typename T>
T number(const std::string& name, const std::string& text) {
  std::istringstream stream(text);
  T value;
  if (!(stream >> value) || !stream.eof()) {
    throw UserError(name + " is '" + text + "', expected a number");
  }
  return value;
}

Options parse(int argc, char** argv) {
  Options o;
  std::vector<std::string> plain;
  for (int i = 1; i < argc; ++i) {
    std::string a = argv[i];
    auto value = [&] {
      if (i + 1 >= argc) throw UserError(a + " needs a value; `amx-run --help` lists the options");
      return std::string(argv[++i]);
    };
    if (a == "-h" || a == "--help") {
      std::fputs(kHelp, stdout);
      std::exit(0);
    }
    if (a == "-n" || a == "--max-new-tokens") o.max_new_tokens = number<int>(a, value());
    else if (a == "-t" || a == "--temperature") o.sampling.temperature = number<float>(a, value());
    else if (a == "--top-k") o.sampling.top_k = number<int>(a, value());
    else if (a == "--top-p") o.sampling.top_p = number<float>(a, value());
    else if (a == "--min-p") o.sampling.min_p = number<float>(a, value());
    else if (a == "--repetition-penalty") o.sampling.repetition_penalty = number<float>(a, value());
    else if (a == "--seed") o.sampling.seed = number<uint64_t>(a, value());
    else if (a == "--threads") o.threads = number<int>(a, value());
    else if (a == "--context") o.context = number<int64_t>(a, value());
    else if (a == "--max-memory") o.max_memory = parse_size(value());
    else if (a == "--ids") o.ids = value();
    else if (a == "--weights") {
      std::string where = value();
      if (where != "auto" && where != "map" && where != "huge") {
        throw UserError("--weights is '" + where + "', expected auto, map or huge");
      }
      o.weights = where == "auto" ? Weights::kAuto : where == "map" ? Weights::kMap : Weights::kHuge;
    }
    else if (a == "--no-verify") o.verify = false;
    else if (a == "--ignore-eos") o.ignore_eos = true;
    else if (a == "--print-ids") o.print_ids = true;
    else if (a == "-q" || a == "--quiet") o.quiet = true;
    else if (a == "--encode" || a == "--decode") o.mode = a.substr(2);
    else if (a.size() > 1 && a[0] == '-') throw UserError("unknown option " + a);
    else plain.push_back(a);
  }
  if (plain.empty() || plain.size() > 2) throw UserError("expected DIR and PROMPT; see --help");
  o.root = plain[0];
  o.has_prompt = plain.size() == 2;
  if (o.has_prompt) o.prompt = plain[1];
  if (o.mode == "generate" && o.has_prompt == !o.ids.empty()) {
    throw UserError("expected a PROMPT or --ids; see --help");
  }
  if (o.max_new_tokens < 1) throw UserError("--max-new-tokens is below 1");
  if (o.prompt == "-") {
    o.prompt.assign(std::istreambuf_iterator<char>(std::cin), {});
  }
  return o;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// For comparing tokenizers on much text: one JSON value a line in, one out.
int convert(const Options& o) {
  Tokenizer tokenizer(o.root + "/tokenizer.json");
  for (std::string line; std::getline(std::cin, line);) {
    auto json = parse_json(line, "a line of standard input");
    nlohmann::json out;
    if (o.mode == "encode") {
      if (!json.is_string()) throw UserError("a line of standard input is no JSON text");
      out = tokenizer.encode(json.get<std::string>());
    } else {
      std::vector<int> ids;
      for (const auto& id : json) ids.push_back(int(whole_number(id, "token id", 0, kMostTokens)));
      out = tokenizer.decode(ids);
    }
    // A tokenizer may decode to bytes that are no text; JSON has none of them.
    std::cout << out.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << '\n';
  }
  return 0;
}

std::vector<int> prompt_ids(const Options& o, const Manifest& m, const Tokenizer* tokenizer) {
  std::vector<int> ids;
  if (!o.ids.empty()) {
    std::istringstream stream(o.ids);
    for (std::string part; std::getline(stream, part, ',');) ids.push_back(number<int>("--ids", part));
    return ids;
  }
  ids = tokenizer->encode(o.prompt);
  const std::vector<int>& prefix = m.prompt_prefix;
  if (ids.size() < prefix.size() || !std::equal(prefix.begin(), prefix.end(), ids.begin())) {
    ids.insert(ids.begin(), prefix.begin(), prefix.end());
  }
  return ids;
}

int generate(const Options& o) {
  auto start = std::chrono::steady_clock::now();
  std::string runtime = find_runtime();
  Manifest m = open_artifact(o.root, o.verify);
  Plan plan = fit(m, o.max_memory, o.context);
  std::unique_ptr<Tokenizer> tokenizer;
  if (std::ifstream(o.root + "/tokenizer.json")) {
    tokenizer = std::make_unique<Tokenizer>(o.root + "/tokenizer.json");
  } else if (o.has_prompt) {
    throw UserError(o.root + " has no tokenizer.json; give token ids with --ids");
  }
  const char* set = std::getenv("TVM_NUM_THREADS");
  int threads = o.threads > 0 ? o.threads : set && std::atoi(set) > 0 ? std::atoi(set)
                                                                      : physical_cores();
  Model model(m, plan, runtime, o.max_memory ? Weights::kMap : o.weights, threads);
  double loaded = seconds_since(start);

  auto asked = std::chrono::steady_clock::now();
  std::vector<int> prompt = prompt_ids(o, m, tokenizer.get()), ids;
  std::unique_ptr<Detokenizer> text;
  if (tokenizer) text = std::make_unique<Detokenizer>(*tokenizer, prompt);
  Sampler sample(o.sampling, m.vocab_size, prompt);
  const float* logits = model.append(prompt);
  double first = 0;
  auto decoding = asked;
  while (true) {
    int token = sample(logits);
    ids.push_back(token);
    bool ended = !o.ignore_eos && std::find(m.eos.begin(), m.eos.end(), token) != m.eos.end();
    if (text) {
      std::string piece = ended ? "" : text->add(token);
      std::fwrite(piece.data(), 1, piece.size(), stdout);
      std::fflush(stdout);
    }
    if (ids.size() == 1) {
      first = seconds_since(asked);
      decoding = std::chrono::steady_clock::now();
    }
    if (ended || int(ids.size()) >= o.max_new_tokens || model.length() >= plan.context) break;
    logits = model.append({token});
  }
  double decoded = seconds_since(decoding);
  if (text) {
    std::string rest = text->flush();
    std::fwrite(rest.data(), 1, rest.size(), stdout);
    std::fputc('\n', stdout);
  }
  if (o.print_ids) {
    std::string line = "ids:";
    for (size_t i = 0; i < ids.size(); ++i) line += (i ? "," : " ") + std::to_string(ids[i]);
    std::puts(line.c_str());
  }
  if (!o.quiet) {
    double rate = decoded > 0 ? double(ids.size() - 1) / decoded : 0;
    std::fprintf(stderr, "load %.2f s, first token %.2f s, %.2f tokens/s, peak memory %lld MB, "
                 "code for %s\n",
                 loaded, first, rate, peak_memory() >> 20, m.target_key.c_str());
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    Options options = parse(argc, argv);
    return options.mode == "generate" ? generate(options) : convert(options);
  } catch (const amx::UserError& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
