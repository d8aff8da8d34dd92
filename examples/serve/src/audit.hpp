// Would the Shared layers have selected what they reuse?
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "engine.hpp"
#include "server.hpp"

namespace serve {

// How much of what a Shared layer's own indexer selects is in the selection it reuses.
struct Coverage {
  int64_t layer = 0, source = 0;
  std::optional<double> share;  // Absent if no row sees more than top-k tokens: there is nothing to choose from.
};

// Serves the workload's prompts with `all_full`, where every layer selects, and compares the selection of each layer
// that is Shared in `plan` with that of its source. Rows that see at most top-k tokens do not count.
std::vector<Coverage> audit(Engine& all_full, const indexcache::Plan& plan, const indexcache::Context& context,
                            Threads& threads, Workload workload, const std::function<void(int64_t)>& progress);

}  // namespace serve
