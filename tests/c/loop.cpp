// The per-layer loop of a server, with indexcache.hpp alone: a prefill chunk of two requests, then their decode steps,
// over paged fp8 index K and KV, sequences longer than top-k. Every selection and every attention output is compared
// with plain f64 loops over the bytes that the library wrote. With LOADED, through dlopen of the first argument.
#ifdef LOADED
#include <indexcache/dynload.h>
const idxc_api* table();
#define INDEXCACHE_TABLE table()
#endif
#include <indexcache/indexcache.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace ic = indexcache;

#ifdef LOADED
static idxc_library library;
const idxc_api* table() { return library.api; }
#endif

static_assert(!std::is_copy_constructible_v<ic::Context> && !std::is_copy_assignable_v<ic::Plan>);
static_assert(std::is_nothrow_move_constructible_v<ic::Cache> && std::is_nothrow_move_assignable_v<ic::Cache>);
// A temporary tensor is not a pointer that somebody could keep.
static_assert(std::is_convertible_v<ic::Tensor&, const idxc_tensor*>);
static_assert(!std::is_convertible_v<ic::Tensor, const idxc_tensor*>);

[[noreturn]] static void fail(int line, const char* what, const char* text) {
  std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, line, what, text);
  std::exit(1);
}
#define NEED(condition) \
  if (!(condition)) fail(__LINE__, #condition, ic::last_error())
#define OK(call) NEED((call) == IDXC_OK)

template <class T>
static T take(ic::Result<T> result, int line) {
  if (!result) fail(line, ic::status_name(result.status()), result.error());
  return *std::move(result);
}
#define TAKE(call) take((call), __LINE__)

constexpr int index_heads = 4, dim = 128, page = 64, heads = 3, d_qk = 576, d_v = 512, topk = 64, pages = 16;
constexpr int k_page_bytes = page * (dim + 4), kv_bytes = 656;
constexpr char pattern[] = "FSSSFSS";
constexpr int layers = sizeof pattern - 1;
constexpr float softmax_scale = 0.05f;

static float noise() {  // roughly normal
  static std::uint64_t state = 88172645463325252u;
  float sum = 0;
  for (int i = 0; i < 4; ++i) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    sum += static_cast<float>(state >> 40) / 8388608.0f - 1.0f;
  }
  return sum;
}

static std::vector<float> random(std::size_t n) {
  std::vector<float> x(n);
  for (float& v : x) v = noise();
  return x;
}

static double e4m3(std::uint8_t b) {
  const int exponent = b >> 3 & 15, mantissa = b & 7;
  const double size = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return b & 128 ? -size : size;
}

static float f32_at(const std::uint8_t* p) {
  float x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

static double bf16_at(const std::uint8_t* p) {
  const std::uint32_t bits = static_cast<std::uint32_t>(p[0]) << 16 | static_cast<std::uint32_t>(p[1]) << 24;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct Model {
  ic::Context context;
  ic::Plan plan;
  ic::Cache cache;
  std::vector<std::vector<std::uint8_t>> index_k;  // per index-K slot: Shared layers own none
  std::vector<std::vector<std::uint8_t>> kv;       // per layer
  // Page p of request r; -1 where the request has no page, which must never be followed.
  std::int32_t table[2][8] = {{3, 9, 0, 14, 6, 11, 2, -1}, {15, 1, 8, 5, -1, -1, -1, -1}};
  std::uint64_t step = 0;
};

/// Tokens `length - fresh … length - 1` of both requests go through all layers, and `padding` rows with them.
static void step(Model& m, const int (&length)[2], const int (&fresh)[2], int padding) {
  std::vector<std::int32_t> request, end;
  std::vector<std::int64_t> slots;
  for (int r = 0; r < 2; ++r)
    for (int t = length[r] - fresh[r]; t < length[r]; ++t) {
      request.push_back(r);
      end.push_back(t + 1);
      slots.push_back(m.table[r][t / page] * page + t % page);
    }
  for (int i = 0; i < padding; ++i) request.push_back(-1), end.push_back(0), slots.push_back(-1);
  const auto rows = static_cast<std::int32_t>(request.size());
  const auto n = static_cast<std::size_t>(rows);
  const ic::Tensor t_request(request.data(), {rows}), t_end(end.data(), {rows}), t_slots(slots.data(), {rows});
  const ic::Tensor t_table(&m.table[0][0], {2, 8});
  std::vector<char> workspace;
  std::vector<std::int32_t> source(n * topk);  // what the Full layer selected
  OK(m.cache.step_begin(0, rows, ++m.step));

  for (int layer = 0; layer < layers; ++layer) {
    if (m.plan.layer_role(layer) == IDXC_ROLE_FULL) {
      const idxc_layer_info info = TAKE(m.plan.layer_info(layer));
      std::vector<std::uint8_t>& store = m.index_k[static_cast<std::size_t>(info.index_k_slot)];
      const auto k = random(n * dim), q = random(n * index_heads * dim), w = random(n * index_heads);
      std::vector<ic::fp8_e4m3> q8(q.size());
      std::vector<float> w_folded(w.size());

      const ic::Tensor t_k(k.data(), {rows, dim}), t_store(store.data(), {pages, k_page_bytes});
      idxc_index_k_write_desc write = IDXC_INDEX_K_WRITE_DESC_INIT;
      write.k = t_k, write.slots = t_slots, write.pages = t_store;
      OK(m.context.index_k_write(write));

      const ic::Tensor t_q(q.data(), {rows, index_heads, dim}), t_w(w.data(), {rows, index_heads});
      const ic::Tensor t_q8(q8.data(), {rows, index_heads, dim}), t_wf(w_folded.data(), {rows, index_heads});
      idxc_index_q_quantize_desc quantize = IDXC_INDEX_Q_QUANTIZE_DESC_INIT;
      quantize.q = t_q, quantize.weights = t_w, quantize.q_out = t_q8, quantize.weights_out = t_wf;
      OK(m.context.index_q_quantize(quantize));

      idxc_indexer_desc indexer = IDXC_INDEXER_DESC_INIT;
      indexer.q = t_q8, indexer.weights = t_wf, indexer.k = t_store, indexer.block_table = t_table;
      indexer.row_request = t_request, indexer.row_end = t_end;
      workspace.resize(TAKE(m.cache.select_workspace(indexer)));
      OK(m.cache.select(0, layer, &indexer, workspace.data(), workspace.size()));
      const ic::Tensor picked(source.data(), {rows, topk});
      OK(m.cache.export_indices(0, layer, picked));

      for (std::size_t i = 0; i < n; ++i) {
        const std::int32_t* row = &source[i * topk];
        std::vector<double> score;
        for (int s = 0; s < end[i]; ++s) {
          const std::uint8_t* p = &store[static_cast<std::size_t>(m.table[request[i]][s / page]) * k_page_bytes];
          double sum = 0;
          for (std::size_t h = 0; h < index_heads; ++h) {
            double dot = 0;
            for (std::size_t d = 0; d < dim; ++d)
              dot += e4m3(q8[(i * index_heads + h) * dim + d].bits) * e4m3(p[static_cast<std::size_t>(s % page) * dim + d]);
            sum += w_folded[i * index_heads + h] * std::max(dot, 0.0);
          }
          score.push_back(sum * f32_at(p + page * dim + s % page * 4));
        }
        const int want = std::min<int>(topk, end[i]);
        std::vector<double> sorted = score;
        std::sort(sorted.rbegin(), sorted.rend());
        const double kth = want ? sorted[static_cast<std::size_t>(want) - 1] : 0, slack = 1e-5 * (1 + std::fabs(kth));
        std::vector<bool> chosen(score.size());
        for (int j = 0; j < topk; ++j) {
          if (j >= want) {
            NEED(row[j] == -1);
            continue;
          }
          NEED(row[j] >= 0 && row[j] < end[i] && (j == 0 || row[j - 1] < row[j]));
          chosen[static_cast<std::size_t>(row[j])] = true;
          NEED(score[static_cast<std::size_t>(row[j])] >= kth - slack);
        }
        for (std::size_t s = 0; s < score.size(); ++s) NEED(chosen[s] || score[s] <= kth + slack);
      }
    } else {
      OK(m.cache.select(0, layer, nullptr, nullptr, 0));
    }
    const ic::Tensor used = TAKE(m.cache.indices(0, layer));
    NEED(used.ndim() == 2 && used.dim(0) == rows && used.dim(1) == topk && used.data<float>() == nullptr);
    NEED(std::memcmp(used.data<std::int32_t>(), source.data(), source.size() * sizeof source[0]) == 0);

    // Attention over what was selected.
    std::vector<std::uint8_t>& store = m.kv[static_cast<std::size_t>(layer)];
    const auto kv = random(n * d_qk), q = random(n * heads * d_qk), sink = random(heads);
    std::vector<float> out(n * heads * d_v, NAN), lse(n * heads, NAN);
    const ic::Tensor t_kv(kv.data(), {rows, d_qk}), t_store(store.data(), {pages, page, kv_bytes});
    idxc_kv_write_desc write = IDXC_KV_WRITE_DESC_INIT;
    write.kv = t_kv, write.slots = t_slots, write.pages = t_store;
    OK(m.context.kv_write(write));
    const ic::Tensor t_q(q.data(), {rows, heads, d_qk}), t_out(out.data(), {rows, heads, d_v});
    const ic::Tensor t_lse(lse.data(), {rows, heads}), t_sink(sink.data(), {heads});
    idxc_attention_desc attention = IDXC_ATTENTION_DESC_INIT;
    attention.q = t_q, attention.kv = t_store, attention.block_table = t_table, attention.row_request = t_request;
    attention.sink = t_sink, attention.out = t_out, attention.lse = t_lse, attention.softmax_scale = softmax_scale;
    workspace.resize(TAKE(m.cache.attend_workspace(attention)));
    OK(m.cache.attend(0, layer, attention, workspace.data(), workspace.size()));

    for (std::size_t i = 0; i < n; ++i) {
      std::vector<std::vector<double>> token;
      for (int j = 0; j < topk && source[i * topk + static_cast<std::size_t>(j)] >= 0; ++j) {
        const int s = source[i * topk + static_cast<std::size_t>(j)];
        const std::uint8_t* p = &store[static_cast<std::size_t>(m.table[request[i]][s / page] * page + s % page) * kv_bytes];
        std::vector<double> x(d_qk);
        for (std::size_t d = 0; d < 512; ++d) x[d] = e4m3(p[d]) * f32_at(p + 512 + d / 128 * 4);
        for (std::size_t d = 0; d < 64; ++d) x[512 + d] = bf16_at(p + 528 + 2 * d);
        token.push_back(std::move(x));
      }
      for (std::size_t h = 0; h < heads; ++h) {
        std::vector<double> weight, want(d_v);
        double sum = 0;
        for (const auto& x : token) {
          double dot = 0;
          for (std::size_t d = 0; d < d_qk; ++d) dot += q[(i * heads + h) * d_qk + d] * x[d];
          weight.push_back(std::exp(softmax_scale * dot));
          sum += weight.back();
        }
        for (std::size_t j = 0; j < token.size(); ++j)
          for (std::size_t d = 0; d < d_v; ++d)
            want[d] += weight[j] / (sum + std::exp(static_cast<double>(sink[h]))) * token[j][d];
        for (std::size_t d = 0; d < d_v; ++d) NEED(std::fabs(want[d] - out[(i * heads + h) * d_v + d]) < 1e-3);
        const float got = lse[i * heads + h];
        NEED(token.empty() ? got == -INFINITY : std::fabs(std::log(sum) - got) < 1e-3);
      }
    }
  }
}

static void results_and_tensors(const ic::Context& context) {
  // An error keeps its text, whatever comes after it; a failed result holds an empty handle, which is refused.
  idxc_model_desc model = IDXC_MODEL_DESC_INIT;
  model.layers = 3, model.topk = 8;
  const auto bad = ic::Plan::from_pattern(model, "SFF");
  const auto worse = ic::Plan::from_pattern(model, "FF");
  NEED(!bad && bad.status() == IDXC_ERR_CONFIG && std::strcmp(bad.error(), worse.error()) != 0);
  NEED(!*bad && bad->layer_role(0) == -1 && bad->info().status() == IDXC_ERR_INVALID);
  NEED(ic::Cache().step_begin(0, 1, 1) == IDXC_ERR_INVALID);

  ic::Plan plan = TAKE(ic::Plan::from_freq(model, IDXC_DIALECT_HF, 2));
  NEED(TAKE(plan.export_text(IDXC_EXPORT_PATTERN)) == "FFS");
  NEED(TAKE(ic::Plan::from_freq(model, IDXC_DIALECT_HF, 2, 1)).layer_role(1) == IDXC_ROLE_SHARED);
  NEED(TAKE(TAKE(plan.slice(2, 3)).info()).receives_from_layer == 1);
  ic::Plan moved = std::move(plan);
  NEED(moved && !plan);  // NOLINT: that is the question
  ic::Plan adopted(moved.release());
  NEED(adopted && !moved);

  // Tensors own their shape: a copy is whole, and too many dimensions are refused, not read.
  float x[24] = {};
  ic::Tensor copy;
  {
    const ic::Tensor strided(x, {2, 3}, {4, 1});
    copy = strided;
  }
  NEED(copy.get()->shape[1] == 3 && copy.get()->strides[0] == 4 && copy.data<float>() == x);
  const ic::Tensor other(copy);
  NEED(other.get()->shape != copy.get()->shape);
  const ic::Tensor deep(x, {1, 1, 1, 1, 1, 1}), uneven(x, {2, 3}, {4});
  std::int32_t picked[2];
  const ic::Tensor t_picked(picked, {2, 1});
  idxc_topk_desc desc = IDXC_TOPK_DESC_INIT;
  desc.indices = t_picked;
  for (const ic::Tensor* logits : {&deep, &uneven}) {
    desc.logits = *logits;
    NEED(context.topk(desc, nullptr, 0) == IDXC_ERR_INVALID && std::strstr(ic::last_error(), "ndim"));
  }
  desc.logits = copy;
  OK(context.topk(desc, nullptr, 0));
}

int main(int argc, char** argv) {
#ifdef LOADED
  if (argc != 2 || !idxc_library_open(&library, argv[1])) return std::fprintf(stderr, "%s\n", library.error), 1;
#else
  (void)argc, (void)argv;
#endif
  Model m;
  idxc_context_desc context = IDXC_CONTEXT_DESC_INIT;
  context.threads = 2;
  m.context = TAKE(ic::Context::create(context));
  results_and_tensors(m.context);
  idxc_model_desc model = IDXC_MODEL_DESC_INIT;
  model.layers = layers, model.topk = topk;
  m.plan = TAKE(ic::Plan::from_pattern(model, pattern));
  const idxc_plan_info info = TAKE(m.plan.info());
  NEED(info.index_k_slots == 2);
  m.index_k.assign(2, std::vector<std::uint8_t>(pages * k_page_bytes));
  m.kv.assign(layers, std::vector<std::uint8_t>(pages * page * kv_bytes));
  idxc_cache_desc desc = IDXC_CACHE_DESC_INIT;
  desc.max_rows = 200;
  NEED(TAKE(ic::Cache::size(m.plan, desc)) >= 200 * topk * sizeof(std::int32_t));
  m.cache = TAKE(ic::Cache::create(m.context, m.plan, desc));

  step(m, {100, 70}, {100, 70}, 3);  // prefill: rows below and above top-k, padding at the end
  step(m, {160, 71}, {60, 1}, 0);    // a chunk beside a decode row
  step(m, {161, 72}, {1, 1}, 2);     // decode
  step(m, {162, 73}, {1, 1}, 2);
  return 0;
}
