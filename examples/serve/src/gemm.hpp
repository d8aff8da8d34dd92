// y = x W^T in float32, with the weight packed for the kernel.
#pragma once

#include <cstdint>
#include <vector>

namespace serve {

// A weight `[out, in]`. Every output is one sum over `in` in order, so that a row's result does not depend on the
// rows it is computed with: chunking and batching change no bit.
class Linear {
 public:
  Linear() = default;
  Linear(const std::vector<float>& weight, int64_t out, int64_t in);

  int64_t out() const { return out_; }

  // Row i of x is at `x + i * x_stride`, row i of y at `y + i * y_stride`.
  void apply(const float* x, int64_t x_stride, int64_t rows, float* y, int64_t y_stride) const;
  // Dense rows.
  void apply(const float* x, int64_t rows, float* y) const { apply(x, in_, rows, y, out_); }

 private:
  int64_t out_ = 0, in_ = 0;
  std::vector<float> packed_;  // Panels of 16 outputs: [panel][in][16], zero-padded.
};

}  // namespace serve
