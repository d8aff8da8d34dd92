// The command line.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace serve {

struct Options {
  std::string model;  // Folder of config.json and model.safetensors.
  std::string text;   // Empty: heldout.txt of the model's folder.
  std::optional<std::string> pattern;
  std::optional<int64_t> freq;
  std::optional<std::string> config;
  int64_t requests = 4;
  std::optional<int64_t> context;
  int64_t decode = 48;
  int64_t chunk = 256;
  int64_t threads = 0;
  int64_t repeats = 2;
  bool json = false;
  bool help = false;
};

// Throws UsageError.
Options parse_options(const std::vector<std::string>& arguments, const std::string& default_model);

extern const char* const usage;

}  // namespace serve
