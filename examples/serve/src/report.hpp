// What the program shows: a progress bar while it works, then a table or JSON.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "audit.hpp"
#include "engine.hpp"

namespace serve {

// One of the two runs, over all its passes.
struct Run {
  std::string name;
  std::string pattern;
  uint64_t fingerprint = 0;
  int64_t full_layers = 0, shared_layers = 0;
  int64_t passes = 0;
  Times prefill, decode;  // Mean of the passes.
  int64_t steps = 0, mixed_steps = 0;
  int64_t tokens = 0, decode_only_tokens = 0;
  double bits_per_byte = 0;
  std::vector<double> bits;
  std::vector<std::string> generated;
  double index_k_bytes_per_token = 0;
  int64_t index_k_bytes = 0;

  double total() const { return prefill.total + decode.total; }
  double indexer() const { return prefill.indexer + decode.indexer; }
  double attention() const { return prefill.attention + decode.attention; }
  double tokens_per_s() const { return static_cast<double>(tokens) / total() * 1e3; }
};

struct Report {
  std::string model, isa;
  int64_t layers = 0, topk = 0;
  int64_t requests = 0, context = 0, decode = 0, chunk = 0, threads = 0, repeats = 0;
  std::vector<Run> runs;  // All-Full, then the pattern.
  std::vector<Coverage> coverage;
};

std::string as_table(const Report& report);
std::string as_json(const Report& report);

// A bar on stderr, if that is a terminal.
class Progress {
 public:
  explicit Progress(int64_t total);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void phase(const std::string& name) { name_ = name; }
  void advance(int64_t rows);

 private:
  bool terminal_;
  int64_t total_, done_ = 0, shown_ = -1;
  std::string name_;
};

}  // namespace serve
