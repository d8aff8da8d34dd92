#include "indexcache-cxx-example/loop.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "indexcache-cxx/src/lib.rs.h"
#include "rust/cxx.h"

namespace ic = indexcache::bridge;

namespace {

constexpr std::size_t kRows = 4, kKeys = 100, kTopk = 16, kHeads = 2, kDim = 32, kQk = 24, kV = 16;

void check(bool ok, const char* what) {
  if (!ok) throw std::runtime_error(what);
}

template <typename T>
ic::Tensor tensor(std::vector<T>& data, ic::DType dtype, std::initializer_list<std::size_t> shape) {
  return ic::tensor(reinterpret_cast<std::uint8_t*>(data.data()), dtype,
                    rust::Slice<const std::size_t>(shape.begin(), shape.size()));
}

// Numbers between -1 and 1 that look random.
std::vector<float> noise(std::size_t n, std::uint32_t seed) {
  std::vector<float> v(n);
  for (float& x : v) {
    seed = seed * 1664525u + 1013904223u;
    x = static_cast<float>(seed >> 8) / 8388608.0f - 1.0f;
  }
  return v;
}

std::vector<std::uint16_t> bf16(const std::vector<float>& v) {
  std::vector<std::uint16_t> out;
  for (float x : v) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    out.push_back(static_cast<std::uint16_t>(bits >> 16));  // Towards zero: good enough here.
  }
  return out;
}

template <typename F>
std::string refusal(F&& call) {
  try {
    call();
  } catch (const rust::Error& e) {
    return e.what();
  }
  return "nothing was refused";
}

bool starts_with(const std::string& text, const char* head) { return text.rfind(head, 0) == 0; }

}  // namespace

void example::run_loop() {
  auto context = ic::open_context(2);
  auto plan = ic::plan_from_pattern("FSSFS", kTopk);
  check(plan->pattern() == "FSSFS" && plan->topk() == kTopk, "plan");
  check(plan->source_layer(2) == 0 && plan->index_k_slot(3) == 1, "layers");
  check(plan->slice(3, 5, false)->pattern() == "FS", "slice");
  auto cache = ic::new_cache(*context, *plan, 1, kRows);

  std::vector<std::int32_t> ends{1, 20, 99, 100};
  cache->step_begin(0, kRows, 1);
  for (std::uint32_t layer = 0; layer < 5; ++layer) {
    auto q = bf16(noise(kRows * kHeads * kDim, layer + 1)), k = bf16(noise(kKeys * kDim, layer + 11));
    auto weights = noise(kRows * kHeads, layer + 21);
    ic::Indexer indexer{};
    if (plan->role(layer) == ic::Role::Full) {
      indexer.q = tensor(q, ic::DType::Bf16, {kRows, kHeads, kDim});
      indexer.weights = tensor(weights, ic::DType::F32, {kRows, kHeads});
      indexer.k = tensor(k, ic::DType::Bf16, {kKeys, kDim});
      indexer.row_end = tensor(ends, ic::DType::I32, {kRows});
    }
    cache->select(0, layer, indexer);

    auto aq = noise(kRows * kQk, layer + 31), kv = noise(kKeys * kQk, layer + 41);
    std::vector<float> out(kRows * kV);
    ic::Attention attention{};
    attention.q = tensor(aq, ic::DType::F32, {kRows, 1, kQk});
    attention.kv = tensor(kv, ic::DType::F32, {kKeys, kQk});
    attention.out = tensor(out, ic::DType::F32, {kRows, 1, kV});
    attention.softmax_scale = 0.2f;
    cache->attend(0, layer, attention);

    // Attention over the indices in use, the long way.
    auto indices = cache->indices(0, layer);
    check(indices.size() == kRows * kTopk, "indices");
    for (std::size_t r = 0; r < kRows; ++r) {
      std::vector<double> sum(kV);
      double total = 0;
      std::int32_t previous = -1;
      for (std::size_t i = 0; i < std::min<std::size_t>(kTopk, ends[r]); ++i) {
        std::int32_t s = indices[r * kTopk + i];
        check(s > previous && s < ends[r], "indices ascend within the row's keys");
        previous = s;
        double dot = 0;
        for (std::size_t d = 0; d < kQk; ++d) dot += double(aq[r * kQk + d]) * kv[s * kQk + d];
        double p = std::exp(0.2f * dot);
        total += p;
        for (std::size_t d = 0; d < kV; ++d) sum[d] += p * kv[s * kQk + d];
      }
      for (std::size_t d = 0; d < kV; ++d) check(std::abs(out[r * kV + d] - sum[d] / total) < 1e-5, "attention");
    }
  }

  cache->step_begin(0, kRows, 2);
  auto stale = refusal([&] { cache->select(0, 1, ic::Indexer{}); });
  check(starts_with(stale, "IDXC_ERR_STALE: layer 1 uses the indices of layer 0"), stale.c_str());
  auto missing = refusal([&] { cache->select(0, 0, ic::Indexer{}); });
  check(starts_with(missing, "IDXC_ERR_INVALID: q: expected a tensor, got none"), missing.c_str());
  auto config = refusal([&] { ic::plan_from_pattern("SF", kTopk); });
  check(starts_with(config, "IDXC_ERR_CONFIG: "), config.c_str());

  std::vector<std::int32_t> own(kRows * kTopk, -1);
  own[0] = 7;
  cache->publish(0, 0, tensor(own, ic::DType::I32, {kRows, kTopk}), ic::Form::Logical, 0);
  check(cache->indices(0, 2)[0] == 7, "publish");
}
