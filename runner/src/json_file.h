// JSON that somebody else wrote: bounded files of bounded depth, and numbers within bounds.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace amx {

constexpr int64_t kMostTokens = 1 << 24;  // ids of a vocabulary are below
constexpr int64_t kMostBytes = int64_t(1) << 53;

// The JSON of a text of at most 64 levels; throws UserError with `source` in front.
nlohmann::json parse_json(const std::string& text, const std::string& source);

// The field `key` of an object as a whole number between two bounds, both included. nlohmann's own
// conversion cuts fractions off and wraps what is too large. Throws Json::exception where the field
// is missing and UserError where it is no such number.
int64_t whole(const nlohmann::json& object, const char* key, int64_t low, int64_t high);
// The value itself, which messages call `name`.
int64_t whole_number(const nlohmann::json& value, const std::string& name, int64_t low,
                     int64_t high);

// The same for a list of them.
std::vector<int64_t> whole_list(const nlohmann::json& object, const char* key, int64_t low,
                                int64_t high);

}  // namespace amx
