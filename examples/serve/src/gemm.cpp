#include "gemm.hpp"

#include <algorithm>
#include <cstring>

namespace serve {
namespace {

constexpr int64_t panel = 16;
constexpr int tile = 6;  // 6 rows x 16 outputs: 12 accumulators of 8 floats, three quarters of the AVX2 registers.

// A GNU vector: the compiler splits it where the machine's registers are shorter.
typedef float Vec __attribute__((vector_size(32)));
typedef float Unaligned __attribute__((vector_size(32), aligned(4), may_alias));

struct Rows {
  const float* x;
  int64_t x_stride;
  float* y;
  int64_t y_stride;
};

template <int N>
[[gnu::always_inline]] inline void multiply_tile(const Rows& rows, int64_t in, const float* weights, int64_t outputs) {
  Vec sum[N][2] = {};
  for (int64_t k = 0; k < in; ++k) {
    const Unaligned* w = reinterpret_cast<const Unaligned*>(weights + k * panel);
    const Vec low = w[0], high = w[1];
#pragma GCC unroll 8
    for (int r = 0; r < N; ++r) {
      const float value = rows.x[r * rows.x_stride + k];
      sum[r][0] += low * value;
      sum[r][1] += high * value;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < N; ++r) {
    const Vec result[2] = {sum[r][0], sum[r][1]};  // A copy, so that the sums themselves stay in registers.
    std::memcpy(rows.y + r * rows.y_stride, result, static_cast<size_t>(outputs) * sizeof(float));
  }
}

[[gnu::always_inline]] inline void multiply_panel(Rows rows, int64_t count, int64_t in, const float* weights,
                                                  int64_t outputs) {
  for (; count >= tile; count -= tile) {
    multiply_tile<tile>(rows, in, weights, outputs);
    rows.x += tile * rows.x_stride;
    rows.y += tile * rows.y_stride;
  }
  switch (count) {
    case 5:
      return multiply_tile<5>(rows, in, weights, outputs);
    case 4:
      return multiply_tile<4>(rows, in, weights, outputs);
    case 3:
      return multiply_tile<3>(rows, in, weights, outputs);
    case 2:
      return multiply_tile<2>(rows, in, weights, outputs);
    case 1:
      return multiply_tile<1>(rows, in, weights, outputs);
    default:
      return;
  }
}

using Kernel = void (*)(Rows, int64_t, int64_t, const float*, int64_t);

void panel_portable(Rows rows, int64_t count, int64_t in, const float* weights, int64_t outputs) {
  multiply_panel(rows, count, in, weights, outputs);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void panel_avx2(Rows rows, int64_t count, int64_t in, const float* weights,
                                                    int64_t outputs) {
  multiply_panel(rows, count, in, weights, outputs);
}

Kernel choose_kernel() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? panel_avx2 : panel_portable;
}
#else
Kernel choose_kernel() { return panel_portable; }
#endif

const Kernel kernel = choose_kernel();

}  // namespace

Linear::Linear(const std::vector<float>& weight, int64_t out, int64_t in) : out_(out), in_(in) {
  packed_.resize(static_cast<size_t>((out + panel - 1) / panel * panel * in));
  for (int64_t o = 0; o < out; ++o) {
    float* column = packed_.data() + o / panel * panel * in + o % panel;
    for (int64_t k = 0; k < in; ++k) column[k * panel] = weight[static_cast<size_t>(o * in + k)];
  }
}

void Linear::apply(const float* x, int64_t x_stride, int64_t rows, float* y, int64_t y_stride) const {
  for (int64_t first = 0; first < out_; first += panel) {
    const Rows block{x, x_stride, y + first, y_stride};
    kernel(block, rows, in_, packed_.data() + first * in_, std::min(panel, out_ - first));
  }
}

}  // namespace serve
