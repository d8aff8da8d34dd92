// A strict JSON reader, as much as config.json and a safetensors header need.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace serve {

struct Json {
  enum class Kind { null, boolean, number, string, array, object };

  Kind kind = Kind::null;
  bool boolean = false;
  double number = 0;
  std::string string;
  std::vector<Json> array;
  std::vector<std::pair<std::string, Json>> object;

  // The member of an object, or nullptr.
  const Json* find(std::string_view key) const;
  // The number as an integer. Throws if it is not one, or not in [low, high]; `what` names it in the message.
  int64_t integer(const std::string& what, int64_t low, int64_t high) const;
};

// Throws std::runtime_error with the byte offset of the first mistake. Duplicate keys are refused.
Json parse_json(std::string_view text);

}  // namespace serve
