#include "json_file.h"

#include <algorithm>
#include <cstddef>

#include "common.h"

namespace amx {
namespace {

using Json = nlohmann::json;
constexpr int kMostLevels = 64;  // copies of a value recurse
constexpr std::ptrdiff_t kMostValues = 1 << 22;  // some 100 bytes each

}  // namespace

Json parse_json(const std::string& text, const std::string& source) {
  auto opens = [](char c) { return c == ',' || c == '[' || c == '{'; };
  if (std::count_if(text.begin(), text.end(), opens) > kMostValues) {
    throw UserError(source + " has more than " + std::to_string(kMostValues) + " values");
  }
  bool deep = false;
  auto watch = [&](int depth, Json::parse_event_t, Json&) {
    if (depth > kMostLevels) {
      deep = true;
      throw UserError(source + " is nested deeper than " + std::to_string(kMostLevels) + " levels");
    }
    return true;
  };
  Json json = Json::parse(text, watch, false);
  if (json.is_discarded() || deep) throw UserError(source + " cannot be read as JSON");
  return json;
}

int64_t whole_number(const Json& value, const std::string& name, int64_t low, int64_t high) {
  bool fits = value.is_number_unsigned() ? value.get<uint64_t>() <= uint64_t(INT64_MAX)
                                         : value.is_number_integer();
  int64_t number = fits ? value.get<int64_t>() : low - 1;
  if (!fits || number < low || number > high) {
    throw UserError("the field " + name + " is " + (value.is_number() ? value.dump() : "no number") +
                    "; expected a whole number from " + std::to_string(low) + " to " +
                    std::to_string(high));
  }
  return number;
}

int64_t whole(const Json& object, const char* key, int64_t low, int64_t high) {
  return whole_number(object.at(key), key, low, high);
}

std::vector<int64_t> whole_list(const Json& object, const char* key, int64_t low, int64_t high) {
  const Json& list = object.at(key);
  if (!list.is_array()) throw UserError(std::string("the field ") + key + " is no list");
  std::vector<int64_t> numbers;
  for (const Json& value : list) numbers.push_back(whole_number(value, key, low, high));
  return numbers;
}

}  // namespace amx
