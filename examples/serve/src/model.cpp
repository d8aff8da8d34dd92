#include "model.hpp"

#include <cmath>
#include <stdexcept>

#include "json.hpp"
#include "weights.hpp"

namespace serve {
namespace {

constexpr int64_t max_dim = 1 << 16;

// Reads config.json's fields, and refuses what this program would silently compute differently.
class ConfigReader {
 public:
  ConfigReader(const std::string& path, const Json& json) : path_(path), json_(json) {}

  [[noreturn]] void fail(const std::string& what) const { throw std::runtime_error(path_ + ": " + what); }

  int64_t size(const char* key, int64_t high = max_dim) const {
    const Json* value = json_.find(key);
    if (!value) fail(std::string(key) + " is missing");
    return value->integer(path_ + ": " + key, 1, high);
  }

  double positive(const char* key) const {
    const Json* value = json_.find(key);
    if (!value || value->kind != Json::Kind::number || !(value->number > 0))
      fail(std::string(key) + " must be a positive number");
    return value->number;
  }

  void require_true(const char* key) const {
    const Json* value = json_.find(key);
    if (!value || !value->boolean) fail(std::string(key) + " must be true: this server knows no other way");
  }

  void require_text(const char* key, const char* text) const {
    const Json* value = json_.find(key);
    if (!value || value->string != text)
      fail(std::string(key) + " must be \"" + text + "\": this server knows no other");
  }

 private:
  const std::string& path_;
  const Json& json_;
};

Linear read_linear(const Weights& weights, const std::string& name, int64_t out, int64_t in) {
  return Linear(weights.tensor(name + ".weight", {out, in}), out, in);
}

// kv_b_proj is [heads, nope + value, latent]. Scores are (W_uk^T q) . latent and outputs W_uv (sum p latent), so that
// attention itself only ever sees the one shared KV row of a token.
void read_kv_b(const Weights& weights, const std::string& name, const Config& c, LayerWeights& layer) {
  const int64_t rows = c.nope + c.value;
  const std::vector<float> all = weights.tensor(name + ".weight", {c.heads * rows, c.kv_latent});
  for (int64_t h = 0; h < c.heads; ++h) {
    const float* head = all.data() + h * rows * c.kv_latent;
    std::vector<float> uk(static_cast<size_t>(c.kv_latent * c.nope));
    for (int64_t i = 0; i < c.nope; ++i) {
      for (int64_t j = 0; j < c.kv_latent; ++j) uk[static_cast<size_t>(j * c.nope + i)] = head[i * c.kv_latent + j];
    }
    layer.uk.emplace_back(uk, c.kv_latent, c.nope);
    const float* first = head + c.nope * c.kv_latent;
    layer.uv.emplace_back(std::vector<float>(first, first + c.value * c.kv_latent), c.value, c.kv_latent);
  }
}

IndexerWeights read_indexer(const Weights& weights, const std::string& name, const Config& c) {
  return {read_linear(weights, name + "wq_b", c.index_heads * c.index_dim, c.q_latent),
          read_linear(weights, name + "wk", c.index_dim, c.hidden),
          read_linear(weights, name + "weights_proj", c.index_heads, c.hidden),
          weights.tensor(name + "k_norm.weight", {c.index_dim}), weights.tensor(name + "k_norm.bias", {c.index_dim})};
}

LayerWeights read_layer(const Weights& weights, const std::string& name, const Config& c) {
  LayerWeights layer;
  const std::string attention = name + "self_attn.", mlp = name + "mlp.";
  layer.input_norm = weights.tensor(name + "input_layernorm.weight", {c.hidden});
  layer.post_norm = weights.tensor(name + "post_attention_layernorm.weight", {c.hidden});
  layer.q_norm = weights.tensor(attention + "q_a_layernorm.weight", {c.q_latent});
  layer.kv_norm = weights.tensor(attention + "kv_a_layernorm.weight", {c.kv_latent});
  layer.q_a = read_linear(weights, attention + "q_a_proj", c.q_latent, c.hidden);
  layer.q_b = read_linear(weights, attention + "q_b_proj", c.heads * c.qk(), c.q_latent);
  layer.kv_a = read_linear(weights, attention + "kv_a_proj_with_mqa", c.kv_row(), c.hidden);
  layer.o = read_linear(weights, attention + "o_proj", c.hidden, c.heads * c.value);
  read_kv_b(weights, attention + "kv_b_proj", c, layer);
  layer.indexer = read_indexer(weights, attention + "indexer.", c);
  layer.gate = read_linear(weights, mlp + "gate_proj", c.inner, c.hidden);
  layer.up = read_linear(weights, mlp + "up_proj", c.inner, c.hidden);
  layer.down = read_linear(weights, mlp + "down_proj", c.hidden, c.inner);
  return layer;
}

// Eight partial sums, in a fixed order: the compiler may use vector registers without being free to reorder.
template <class Term>
float sum(int64_t count, Term term) {
  float part[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int64_t j = 0; j < 8; ++j) part[j] += term(i + j);
  }
  for (; i < count; ++i) part[0] += term(i);
  return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

}  // namespace

Config load_config(const std::string& path) {
  Config c;
  c.text = read_file(path);
  Json json;
  try {
    json = parse_json(c.text);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(path + ": " + error.what());
  }
  const ConfigReader reader(path, json);
  c.layers = reader.size("num_hidden_layers", 1024);
  c.hidden = reader.size("hidden_size");
  c.inner = reader.size("intermediate_size");
  c.vocab = reader.size("vocab_size");
  c.heads = reader.size("num_attention_heads", 1024);
  c.nope = reader.size("qk_nope_head_dim");
  c.rope = reader.size("qk_rope_head_dim");
  c.value = reader.size("v_head_dim");
  c.q_latent = reader.size("q_lora_rank");
  c.kv_latent = reader.size("kv_lora_rank");
  c.index_heads = reader.size("index_n_heads", 1024);
  c.index_dim = reader.size("index_head_dim");
  c.topk = reader.size("index_topk");
  c.max_positions = reader.size("max_position_embeddings", 1 << 24);
  c.rope_theta = reader.positive("rope_theta");
  c.norm_eps = static_cast<float>(reader.positive("rms_norm_eps"));
  if (c.vocab != 256) reader.fail("vocab_size must be 256: the tokens of this server are bytes");
  if (c.rope % 2 != 0 || c.rope > c.index_dim) reader.fail("qk_rope_head_dim must be even and at most index_head_dim");
  reader.require_true("tie_word_embeddings");
  reader.require_true("rope_interleave");
  reader.require_true("indexer_rope_interleave");
  reader.require_text("hidden_act", "silu");
  if (const Json* dense = json.find("first_k_dense_replace"); dense && dense->number < static_cast<double>(c.layers)) {
    reader.fail("first_k_dense_replace must be num_hidden_layers: this server has no experts");
  }
  return c;
}

Model load_model(const std::string& folder) {
  Model model;
  model.config = load_config(folder + "/config.json");
  const Config& c = model.config;
  const Weights weights(folder + "/model.safetensors");
  model.embedding = weights.tensor("model.embed_tokens.weight", {c.vocab, c.hidden});
  model.head = Linear(model.embedding, c.vocab, c.hidden);
  model.final_norm = weights.tensor("model.norm.weight", {c.hidden});
  for (int64_t l = 0; l < c.layers; ++l) {
    model.layers.push_back(read_layer(weights, "model.layers." + std::to_string(l) + ".", c));
  }
  return model;
}

void rms_norm(const float* x, const std::vector<float>& weight, float eps, float* y) {
  const int64_t count = static_cast<int64_t>(weight.size());
  const float squares = sum(count, [&](int64_t i) { return x[i] * x[i]; });
  const float scale = 1.0f / std::sqrt(squares / static_cast<float>(count) + eps);
  for (int64_t i = 0; i < count; ++i) y[i] = x[i] * scale * weight[static_cast<size_t>(i)];
}

void layer_norm(const float* x, const std::vector<float>& weight, const std::vector<float>& bias, float eps, float* y) {
  const int64_t count = static_cast<int64_t>(weight.size());
  const float n = static_cast<float>(count);
  const float mean = sum(count, [&](int64_t i) { return x[i]; }) / n;
  const float variance = sum(count, [&](int64_t i) { return (x[i] - mean) * (x[i] - mean); }) / n;
  const float scale = 1.0f / std::sqrt(variance + eps);
  for (int64_t i = 0; i < count; ++i) {
    const size_t at = static_cast<size_t>(i);
    y[i] = (x[i] - mean) * scale * weight[at] + bias[at];
  }
}

void silu_multiply(float* a, const float* b, int64_t count) {
  for (int64_t i = 0; i < count; ++i) a[i] = a[i] / (1.0f + std::exp(-a[i])) * b[i];
}

Rope::Rope(const Config& config, int64_t positions) : pairs_(config.rope / 2) {
  for (int64_t position = 0; position < positions; ++position) {
    for (int64_t i = 0; i < pairs_; ++i) {
      const double exponent = -2.0 * static_cast<double>(i) / static_cast<double>(config.rope);
      const double angle = static_cast<double>(position) * std::pow(config.rope_theta, exponent);
      cos_.push_back(static_cast<float>(std::cos(angle)));
      sin_.push_back(static_cast<float>(std::sin(angle)));
    }
  }
}

void Rope::rotate(float* x, int64_t position) const {
  const float* cos = cos_.data() + position * pairs_;
  const float* sin = sin_.data() + position * pairs_;
  for (int64_t i = 0; i < pairs_; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cos[i] - b * sin[i];
    x[2 * i + 1] = a * sin[i] + b * cos[i];
  }
}

}  // namespace serve
