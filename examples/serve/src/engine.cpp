#include "engine.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "error.hpp"

namespace serve {
namespace {

using indexcache::Tensor;

// One batch at a time: one lane. A server that overlaps micro-batches gives each its own.
constexpr int32_t lane = 0;

// The indexer's key norm has its own, fixed epsilon.
constexpr float k_norm_eps = 1e-6f;

class Stopwatch {
 public:
  explicit Stopwatch(double& sum) : sum_(sum), start_(std::chrono::steady_clock::now()) {}
  ~Stopwatch() { sum_ += std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start_).count(); }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  double& sum_;
  std::chrono::steady_clock::time_point start_;
};

indexcache::Cache make_cache(const indexcache::Context& context, const indexcache::Plan& plan, int64_t max_rows) {
  idxc_cache_desc desc = IDXC_CACHE_DESC_INIT;
  desc.max_rows = static_cast<int32_t>(max_rows);
  return check(indexcache::Cache::create(context, plan, desc));
}

}  // namespace

void Batch::clear() {
  token.clear();
  position.clear();
  slot.clear();
  request.clear();
  visible.clear();
}

void Batch::add(uint8_t byte, int64_t at, int64_t stored, int64_t owner) {
  token.push_back(byte);
  position.push_back(at);
  slot.push_back(stored);
  request.push_back(static_cast<int32_t>(owner));
  visible.push_back(static_cast<int32_t>(at + 1));
}

Engine::Engine(const Model& model, const indexcache::Context& context, const indexcache::Plan& plan, Threads& threads,
               EngineSize size)
    : model_(model),
      config_(model.config),
      context_(context),
      plan_(plan),
      threads_(threads),
      size_(size),
      rope_(model.config, size.max_tokens),
      stores_(model.config, plan, size.pages),
      cache_(make_cache(context, plan, size.max_rows)) {
  const Config& c = config_;
  const auto rows_of = [&](int64_t width) { return std::vector<float>(static_cast<size_t>(size.max_rows * width)); };
  hidden_ = rows_of(c.hidden);
  normed_ = rows_of(c.hidden);
  q_latent_ = rows_of(c.q_latent);
  q_heads_ = rows_of(c.heads * c.qk());
  q_ = rows_of(c.heads * c.kv_row());
  kv_ = rows_of(c.kv_row());
  attended_ = rows_of(c.heads * c.kv_latent);
  mixed_ = rows_of(c.heads * c.value);
  output_ = rows_of(c.hidden);
  gate_ = rows_of(c.inner);
  up_ = rows_of(c.inner);
  logits_ = rows_of(c.vocab);
  index_q_ = rows_of(c.index_heads * c.index_dim);
  index_k_ = rows_of(c.index_dim);
  index_weights_ = rows_of(c.index_heads);
  index_q8_.resize(index_q_.size());
  reserve_workspace();
}

// The loop that a server's own forward pass would contain. Everything that knows of Full and Shared is in it.
void Engine::forward(const Batch& batch, const BlockTable& table, Times& times) {
  const int64_t rows = batch.rows();
  check(cache_.step_begin(lane, static_cast<int32_t>(rows), ++step_));
  embed(batch);
  for (int64_t l = 0; l < config_.layers; ++l) {
    const LayerWeights& layer = model_.layers[static_cast<size_t>(l)];
    project(layer, batch);
    write_kv(l, batch);
    {
      const Stopwatch watch(times.indexer);
      if (plan_.layer_role(static_cast<int32_t>(l)) == IDXC_ROLE_FULL) {
        project_indexer(layer, batch);
        write_index_k(l, batch);
        quantize_index_q(rows);
      }
      select(l, batch, table);
    }
    if (on_select) on_select(batch, l, cache_);
    {
      const Stopwatch watch(times.attention);
      attend(l, batch, table);
    }
    finish(layer, rows);
  }
  predict(rows);
}

void Engine::embed(const Batch& batch) {
  for (int64_t row = 0; row < batch.rows(); ++row) {
    const float* from = model_.embedding.data() + batch.token[static_cast<size_t>(row)] * config_.hidden;
    std::copy_n(from, config_.hidden, hidden_.data() + row * config_.hidden);
  }
}

// Queries in absorbed form and the KV row, rotated.
void Engine::project(const LayerWeights& layer, const Batch& batch) {
  const Config& c = config_;
  const int64_t q_width = c.heads * c.qk(), absorbed = c.heads * c.kv_row();
  threads_.for_rows(batch.rows(), [&](int64_t first, int64_t last) {
    const int64_t count = last - first;
    float* x = normed_.data() + first * c.hidden;
    float* latent = q_latent_.data() + first * c.q_latent;
    float* heads = q_heads_.data() + first * q_width;
    float* q = q_.data() + first * absorbed;
    float* kv = kv_.data() + first * c.kv_row();
    for (int64_t row = 0; row < count; ++row) {
      rms_norm(hidden_.data() + (first + row) * c.hidden, layer.input_norm, c.norm_eps, x + row * c.hidden);
    }
    layer.q_a.apply(x, count, latent);
    for (int64_t row = 0; row < count; ++row) {
      rms_norm(latent + row * c.q_latent, layer.q_norm, c.norm_eps, latent + row * c.q_latent);
    }
    layer.q_b.apply(latent, count, heads);
    layer.kv_a.apply(x, count, kv);
    for (int64_t h = 0; h < c.heads; ++h) {
      layer.uk[static_cast<size_t>(h)].apply(heads + h * c.qk(), q_width, count, q + h * c.kv_row(), absorbed);
    }
    for (int64_t row = 0; row < count; ++row) {
      const int64_t position = batch.position[static_cast<size_t>(first + row)];
      for (int64_t h = 0; h < c.heads; ++h) {
        float* rotary = q + row * absorbed + h * c.kv_row() + c.kv_latent;
        std::copy_n(heads + row * q_width + h * c.qk() + c.nope, c.rope, rotary);
        rope_.rotate(rotary, position);
      }
      float* kv_row = kv + row * c.kv_row();
      rms_norm(kv_row, layer.kv_norm, c.norm_eps, kv_row);
      rope_.rotate(kv_row + c.kv_latent, position);
    }
  });
}

void Engine::write_kv(int64_t layer, const Batch& batch) {
  const Tensor kv(kv_.data(), {batch.rows(), config_.kv_row()});
  const Tensor slots(batch.slot.data(), {batch.rows()});
  const Tensor pages = stores_.kv(layer);
  idxc_kv_write_desc desc = IDXC_KV_WRITE_DESC_INIT;
  desc.kv = kv;
  desc.slots = slots;
  desc.pages = pages;
  check(context_.kv_write(desc));
}

// The indexer's queries, key and head weights, from the inputs that `project` left behind.
void Engine::project_indexer(const LayerWeights& layer, const Batch& batch) {
  const Config& c = config_;
  const IndexerWeights& indexer = layer.indexer;
  const int64_t q_width = c.index_heads * c.index_dim;
  threads_.for_rows(batch.rows(), [&](int64_t first, int64_t last) {
    const int64_t count = last - first;
    const float* x = normed_.data() + first * c.hidden;
    float* q = index_q_.data() + first * q_width;
    float* k = index_k_.data() + first * c.index_dim;
    indexer.wq_b.apply(q_latent_.data() + first * c.q_latent, count, q);
    indexer.wk.apply(x, count, k);
    indexer.weights_proj.apply(x, count, index_weights_.data() + first * c.index_heads);
    for (int64_t row = 0; row < count; ++row) {
      const int64_t position = batch.position[static_cast<size_t>(first + row)];
      for (int64_t h = 0; h < c.index_heads; ++h) rope_.rotate(q + row * q_width + h * c.index_dim, position);
      float* key = k + row * c.index_dim;
      layer_norm(key, indexer.k_norm_weight, indexer.k_norm_bias, k_norm_eps, key);
      rope_.rotate(key, position);
    }
  });
}

void Engine::write_index_k(int64_t layer, const Batch& batch) {
  const Tensor k(index_k_.data(), {batch.rows(), config_.index_dim});
  const Tensor slots(batch.slot.data(), {batch.rows()});
  const Tensor pages = stores_.index_k(layer);
  idxc_index_k_write_desc desc = IDXC_INDEX_K_WRITE_DESC_INIT;
  desc.k = k;
  desc.slots = slots;
  desc.pages = pages;
  check(context_.index_k_write(desc));
}

// Queries to fp8; their scales, and dim^-0.5 * heads^-0.5, go into the head weights, in place.
void Engine::quantize_index_q(int64_t rows) {
  const Tensor q(index_q_.data(), {rows, config_.index_heads, config_.index_dim});
  const Tensor q8(index_q8_.data(), {rows, config_.index_heads, config_.index_dim});
  const Tensor weights(index_weights_.data(), {rows, config_.index_heads});
  idxc_index_q_quantize_desc desc = IDXC_INDEX_Q_QUANTIZE_DESC_INIT;
  desc.q = q;
  desc.weights = weights;
  desc.q_out = q8;
  desc.weights_out = weights;
  check(context_.index_q_quantize(desc));
}

// Full: scores and selects. Shared: makes sure that the selection it reuses is of this step, and needs no description.
void Engine::select(int64_t layer, const Batch& batch, const BlockTable& table) {
  const int32_t l = static_cast<int32_t>(layer);
  if (plan_.layer_role(l) != IDXC_ROLE_FULL) return check(cache_.select(lane, l, nullptr, nullptr, 0));
  with_indexer(layer, batch.rows(), batch, table, [&](const idxc_indexer_desc& desc) {
    check(cache_.select(lane, l, &desc, workspace_.data(), workspace_.size()));
  });
}

// Over the indices of the layer's source, which the cache knows.
void Engine::attend(int64_t layer, const Batch& batch, const BlockTable& table) {
  with_attention(layer, batch.rows(), batch, table, [&](const idxc_attention_desc& desc) {
    check(cache_.attend(lane, static_cast<int32_t>(layer), desc, workspace_.data(), workspace_.size()));
  });
}

// Values out of latents, output projection, and the MLP.
void Engine::finish(const LayerWeights& layer, int64_t rows) {
  const Config& c = config_;
  const int64_t latent_width = c.heads * c.kv_latent, value_width = c.heads * c.value;
  const auto add = [&](const float* from, int64_t first, int64_t count) {
    float* to = hidden_.data() + first * c.hidden;
    for (int64_t i = 0; i < count * c.hidden; ++i) to[i] += from[i];
  };
  threads_.for_rows(rows, [&](int64_t first, int64_t last) {
    const int64_t count = last - first;
    const float* latents = attended_.data() + first * latent_width;
    float* values = mixed_.data() + first * value_width;
    float* x = normed_.data() + first * c.hidden;
    float* out = output_.data() + first * c.hidden;
    float* gate = gate_.data() + first * c.inner;
    float* up = up_.data() + first * c.inner;
    for (int64_t h = 0; h < c.heads; ++h) {
      layer.uv[static_cast<size_t>(h)].apply(latents + h * c.kv_latent, latent_width, count, values + h * c.value,
                                             value_width);
    }
    layer.o.apply(values, count, out);
    add(out, first, count);
    for (int64_t row = 0; row < count; ++row) {
      rms_norm(hidden_.data() + (first + row) * c.hidden, layer.post_norm, c.norm_eps, x + row * c.hidden);
    }
    layer.gate.apply(x, count, gate);
    layer.up.apply(x, count, up);
    silu_multiply(gate, up, count * c.inner);
    layer.down.apply(gate, count, out);
    add(out, first, count);
  });
}

void Engine::predict(int64_t rows) {
  const Config& c = config_;
  threads_.for_rows(rows, [&](int64_t first, int64_t last) {
    float* x = normed_.data() + first * c.hidden;
    for (int64_t row = 0; row < last - first; ++row) {
      rms_norm(hidden_.data() + (first + row) * c.hidden, model_.final_norm, c.norm_eps, x + row * c.hidden);
    }
    model_.head.apply(x, last - first, logits_.data() + first * c.vocab);
  });
}

// Sized once for the largest step; sizes depend on shapes only, so an empty batch serves.
void Engine::reserve_workspace() {
  const Batch batch;
  const BlockTable table(size_.requests, size_.max_tokens);
  size_t bytes = 0;
  with_indexer(0, size_.max_rows, batch, table,
               [&](const idxc_indexer_desc& desc) { bytes = check(cache_.select_workspace(desc)); });
  with_attention(0, size_.max_rows, batch, table, [&](const idxc_attention_desc& desc) {
    bytes = std::max(bytes, check(cache_.attend_workspace(desc)));
  });
  workspace_.resize(bytes);
}

template <class Use>
void Engine::with_indexer(int64_t layer, int64_t rows, const Batch& batch, const BlockTable& table, Use use) {
  const Tensor q(index_q8_.data(), {rows, config_.index_heads, config_.index_dim});
  const Tensor weights(index_weights_.data(), {rows, config_.index_heads});
  const Tensor k = stores_.index_k(layer);
  const Tensor block_table = table.tensor();
  const Tensor row_request(batch.request.data(), {rows});
  const Tensor row_end(batch.visible.data(), {rows});
  idxc_indexer_desc desc = IDXC_INDEXER_DESC_INIT;
  desc.q = q;
  desc.weights = weights;
  desc.k = k;
  desc.block_table = block_table;
  desc.row_request = row_request;
  desc.row_end = row_end;
  use(desc);
}

template <class Use>
void Engine::with_attention(int64_t layer, int64_t rows, const Batch& batch, const BlockTable& table, Use use) {
  const Tensor q(q_.data(), {rows, config_.heads, config_.kv_row()});
  const Tensor kv = stores_.kv(layer);
  const Tensor block_table = table.tensor();
  const Tensor row_request(batch.request.data(), {rows});
  const Tensor out(attended_.data(), {rows, config_.heads, config_.kv_latent});
  idxc_attention_desc desc = IDXC_ATTENTION_DESC_INIT;
  desc.q = q;
  desc.kv = kv;
  desc.block_table = block_table;
  desc.row_request = row_request;
  desc.out = out;
  desc.softmax_scale = 1.0f / std::sqrt(static_cast<float>(config_.qk()));
  use(desc);
}

}  // namespace serve
