// The scheduler: requests arrive, share steps, and finish.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "engine.hpp"

namespace serve {

struct Workload {
  std::vector<std::string_view> prompts;  // One a request.
  int64_t decode = 0;                     // Tokens to generate for each.
  int64_t chunk = 0;                      // Prompt rows a step, over all requests.
};

struct Outcome {
  // A step with prompt rows counts as prefill, even if other requests decode in it; the rest is decode.
  Times prefill, decode;
  int64_t tokens = 0;              // Rows computed: prompts, and generated tokens fed back.
  int64_t decode_only_tokens = 0;  // Tokens generated in the decode steps.
  int64_t steps = 0, mixed_steps = 0;
  std::vector<double> bits;  // Bits per byte of each prompt.
  std::vector<std::string> generated;

  double bits_per_byte() const;
};

// Serves the whole workload. `progress` is called with the rows of each step.
Outcome serve_all(Engine& engine, Threads& threads, const Workload& workload,
                  const std::function<void(int64_t)>& progress);

// Rows that `serve_all` computes.
int64_t workload_rows(const Workload& workload);
// What an engine must be able to hold for it.
EngineSize workload_size(const Workload& workload);

}  // namespace serve
