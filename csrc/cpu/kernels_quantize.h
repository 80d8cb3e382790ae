// What a level provides for quantization: magnitudes and ranges, rounding to bytes and back, on
// strided matrices whose rows are the channels (each row has its own scale and offset).
#pragma once
#include <stdint.h>

#include "cpu/kernels_gemm.h"

namespace tilewright {

// The integers that there are.
struct Levels {
  float low, high;
};

struct QuantizeKernels {
  // amax[i] = max(amax[i], max over j of |x(i, j)|); NaN stays.
  void (*amax)(const Matrix& x, int64_t rows, int64_t cols, float* amax) = nullptr;
  // low[i] = min(low[i], min over j of x(i, j)), high likewise with max; NaN stays.
  void (*low)(const Matrix& x, int64_t rows, int64_t cols, float* low) = nullptr;
  void (*high)(const Matrix& x, int64_t rows, int64_t cols, float* high) = nullptr;
  // q(i, j) = clamp(rne((x(i, j) - offset[i]) / scale[i]), low, high), one byte; offset may be
  // nullptr: 0. 0 where scale[i] is not finite.
  void (*quantize)(const Matrix& x, int64_t rows, int64_t cols, const float* scale,
                   const float* offset, Levels levels, const Matrix& q) = nullptr;
  // The same with two columns a byte of q, the first one in the lower nibble; an odd last column has
  // 0 beside it. high_first: column 0 is a high nibble, and the low one beside it stays.
  void (*quantize_nibbles)(const Matrix& x, int64_t rows, int64_t cols, const float* scale,
                           const float* offset, Levels levels, const Matrix& q,
                           bool high_first) = nullptr;
  // y(i, j) = scale[i] * q(i, j), or fma(scale[i], q(i, j), offset[i]), rounded to y's dtype.
  void (*dequantize)(const Matrix& q, int64_t rows, int64_t cols, const float* scale,
                     const float* offset, const Matrix& y) = nullptr;
  // The same from two columns a byte.
  void (*dequantize_nibbles)(const Matrix& q, int64_t rows, int64_t cols, const float* scale,
                             const float* offset, const Matrix& y, bool high_first) = nullptr;
};

}  // namespace tilewright
