// The model: its shape (config.json), its weights (model.safetensors), and the arithmetic that no library call does.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gemm.hpp"

namespace serve {

// The keys of Hugging Face's GLM-MoE-DSA configs.
struct Config {
  std::string text;  // config.json as it is, for the library to read the plan from.
  int64_t layers, hidden, inner, vocab;
  int64_t heads, nope, rope, value, q_latent, kv_latent;
  int64_t index_heads, index_dim, topk;
  int64_t max_positions;
  double rope_theta;
  float norm_eps;

  int64_t qk() const { return nope + rope; }           // A head's query as the projection makes it.
  int64_t kv_row() const { return kv_latent + rope; }  // A token's KV row, and a head's query in absorbed form.
};

// The indexer of one layer. A Shared layer never touches it.
struct IndexerWeights {
  Linear wq_b, wk, weights_proj;
  std::vector<float> k_norm_weight, k_norm_bias;
};

struct LayerWeights {
  std::vector<float> input_norm, post_norm, q_norm, kv_norm;
  Linear q_a, q_b, kv_a, o, gate, up, down;
  // kv_b_proj, cut into what the absorbed form of MLA multiplies: per head, W_uk transposed and W_uv.
  std::vector<Linear> uk, uv;
  IndexerWeights indexer;
};

struct Model {
  Config config;
  std::vector<float> embedding;  // [vocab, hidden]
  Linear head;                   // The same, as the output projection.
  std::vector<float> final_norm;
  std::vector<LayerWeights> layers;
};

// Throw std::runtime_error with the file and what is wrong with it.
Config load_config(const std::string& path);
Model load_model(const std::string& folder);

// y = x / rms(x) * weight, for one row. y may be x.
void rms_norm(const float* x, const std::vector<float>& weight, float eps, float* y);
// y = (x - mean) / deviation * weight + bias, for one row. y may be x.
void layer_norm(const float* x, const std::vector<float>& weight, const std::vector<float>& bias, float eps, float* y);
// a = silu(a) * b
void silu_multiply(float* a, const float* b, int64_t count);

// Rotary embedding over interleaved pairs (x[2i], x[2i + 1]).
class Rope {
 public:
  Rope(const Config& config, int64_t positions);
  // Rotates the first `config.rope` numbers at x.
  void rotate(float* x, int64_t position) const;

 private:
  int64_t pairs_;
  std::vector<float> cos_, sin_;  // [positions, pairs]
};

}  // namespace serve
