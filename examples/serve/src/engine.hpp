// One forward pass: the model's layers around the library's calls.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "indexcache/indexcache.hpp"
#include "model.hpp"
#include "pages.hpp"
#include "threads.hpp"

namespace serve {

// The rows of one step. A prefill chunk is many rows of one request, decode is one row a request: the library does not
// tell them apart, so one step may hold both.
struct Batch {
  std::vector<uint8_t> token;
  std::vector<int64_t> position;
  std::vector<int64_t> slot;     // Where the row's own token is stored.
  std::vector<int32_t> request;  // The row of the block table.
  std::vector<int32_t> visible;  // Tokens the row sees: all before it, and itself.

  int64_t rows() const { return static_cast<int64_t>(token.size()); }
  void clear();
  void add(uint8_t byte, int64_t at, int64_t stored, int64_t owner);
};

// Where the time of some steps went, in milliseconds.
struct Times {
  double total = 0;
  double indexer = 0;    // Projections, quantisation, index-K write and selection, on Full layers.
  double attention = 0;  // Sparse attention, on all layers.
};

struct EngineSize {
  int64_t max_rows = 0;    // Of a step.
  int64_t requests = 0;    // At once.
  int64_t max_tokens = 0;  // Of a request.
  int64_t pages = 0;
};

class Engine {
 public:
  Engine(const Model& model, const indexcache::Context& context, const indexcache::Plan& plan, Threads& threads,
         EngineSize size);

  // Runs all rows and adds to `times` (not to its total). Logits: `logits() + row * vocab`.
  void forward(const Batch& batch, const BlockTable& table, Times& times);
  const float* logits() const { return logits_.data(); }

  const Config& config() const { return config_; }
  const Stores& stores() const { return stores_; }
  const EngineSize& size() const { return size_; }

  // Called after each layer's selection, for audits. Its time is not measured.
  std::function<void(const Batch&, int64_t layer, const indexcache::Cache&)> on_select;

 private:
  void embed(const Batch& batch);
  void project(const LayerWeights& layer, const Batch& batch);
  void write_kv(int64_t layer, const Batch& batch);
  void project_indexer(const LayerWeights& layer, const Batch& batch);
  void write_index_k(int64_t layer, const Batch& batch);
  void quantize_index_q(int64_t rows);
  void select(int64_t layer, const Batch& batch, const BlockTable& table);
  void attend(int64_t layer, const Batch& batch, const BlockTable& table);
  void finish(const LayerWeights& layer, int64_t rows);
  void predict(int64_t rows);
  void reserve_workspace();

  // Describe the operation to the library and pass the description to `use`.
  template <class Use>
  void with_indexer(int64_t layer, int64_t rows, const Batch& batch, const BlockTable& table, Use use);
  template <class Use>
  void with_attention(int64_t layer, int64_t rows, const Batch& batch, const BlockTable& table, Use use);

  const Model& model_;
  const Config& config_;
  const indexcache::Context& context_;
  const indexcache::Plan& plan_;
  Threads& threads_;
  EngineSize size_;
  Rope rope_;
  Stores stores_;
  indexcache::Cache cache_;
  uint64_t step_ = 0;
  std::vector<char> workspace_;

  // Activations, [max_rows, …].
  std::vector<float> hidden_, normed_, q_latent_, q_heads_, q_, kv_, attended_, mixed_, output_, gate_, up_, logits_;
  std::vector<float> index_q_, index_k_, index_weights_;
  std::vector<indexcache::fp8_e4m3> index_q8_;
};

}  // namespace serve
