#include "audit.hpp"

#include "error.hpp"

namespace serve {
namespace {

using indexcache::Cache;
using indexcache::Context;
using indexcache::Plan;
using indexcache::Tensor;

// Compares, along an all-Full run, what each layer of `plan` that is Shared selects for itself with what it would
// reuse.
class Auditor {
 public:
  Auditor(const Context& context, const Plan& plan, const Config& config, int64_t max_rows)
      : context_(context), config_(config) {
    for (int64_t layer = 0; layer < config.layers; ++layer) {
      source_.push_back(check(plan.layer_info(static_cast<int32_t>(layer))).source_layer);
      selected_.emplace_back(static_cast<size_t>(max_rows * config.topk));
    }
    overlap_.resize(static_cast<size_t>(max_rows));
    sum_.resize(source_.size());
    rows_.resize(source_.size());
  }

  void observe(const Batch& batch, int64_t layer, const Cache& cache) {
    const size_t at = static_cast<size_t>(layer), source = static_cast<size_t>(source_[at]);
    const Tensor own(selected_[at].data(), {batch.rows(), config_.topk});
    check(cache.export_indices(0, static_cast<int32_t>(layer), own));
    if (source == at) return;
    const Tensor reused(selected_[source].data(), {batch.rows(), config_.topk});
    const Tensor overlap(overlap_.data(), {batch.rows()});
    check(context_.indices_overlap(own, reused, overlap));
    for (size_t row = 0; row < batch.visible.size(); ++row) {
      if (batch.visible[row] <= config_.topk) continue;  // Every layer takes every token: no choice to compare.
      sum_[at] += static_cast<double>(overlap_[row]);
      rows_[at] += 1;
    }
  }

  std::vector<Coverage> result() const {
    std::vector<Coverage> result;
    for (size_t layer = 0; layer < source_.size(); ++layer) {
      if (source_[layer] == static_cast<int32_t>(layer)) continue;
      Coverage coverage{static_cast<int64_t>(layer), source_[layer], {}};
      if (rows_[layer] > 0) coverage.share = sum_[layer] / static_cast<double>(rows_[layer]);
      result.push_back(coverage);
    }
    return result;
  }

 private:
  const Context& context_;
  const Config& config_;
  std::vector<int32_t> source_;
  std::vector<std::vector<int32_t>> selected_;  // Of each layer in this step, [rows, topk].
  std::vector<float> overlap_;
  std::vector<double> sum_;
  std::vector<int64_t> rows_;
};

}  // namespace

std::vector<Coverage> audit(Engine& all_full, const indexcache::Plan& plan, const indexcache::Context& context,
                            Threads& threads, Workload workload, const std::function<void(int64_t)>& progress) {
  Auditor auditor(context, plan, all_full.config(), all_full.size().max_rows);
  workload.decode = 1;  // The prompts' rows are enough.
  all_full.on_select = [&](const Batch& batch, int64_t layer, const Cache& cache) {
    auditor.observe(batch, layer, cache);
  };
  serve_all(all_full, threads, workload, progress);
  all_full.on_select = nullptr;
  return auditor.result();
}

}  // namespace serve
