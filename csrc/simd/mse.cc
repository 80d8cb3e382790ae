// Squared differences of n elements:
//
//   squares    loss = (x - y)^2
//   sum        the sum of (x - y)^2 as kSums vectors of doubles, folded in one order
//   backward   dx = (x - y) scale, times dloss where that is an array
//
// Parameter   bounded by
// kSums       latency of an addition: 4 cycles, up to 2 a cycle
//
// Bound by memory. Numerics: the difference is rounded to float32, what follows in the sum is
// double. Not handled: dtypes and strides (cpu/rowwise.h).
#include "cpu/kernel_table.h"
#include "simd/vec.h"

namespace tilewright::ISA {
namespace {

constexpr int kSums = 4;
typedef double VecD __attribute__((vector_size(kWidth * 8)));

TW_INLINE Vec difference(const float* x, const float* y, int64_t i, int64_t n) {
  return load_n(x + i, n) - load_n(y + i, n);
}

void squares(const float* x, const float* y, int64_t n, float* loss) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t count = n - i < kWidth ? n - i : kWidth;
    const Vec d = difference(x, y, i, count);
    store_n(loss + i, d * d, count);
  }
}

double sum(const float* x, const float* y, int64_t n) {
  VecD part[kSums] = {};
  for (int64_t i = 0; i < n; i += kSums * kWidth) {
#pragma GCC unroll 4
    for (int v = 0; v < kSums; ++v) {
      const int64_t at = i + v * kWidth;
      if (at >= n) continue;
      const Vec diff = difference(x, y, at, n - at < kWidth ? n - at : kWidth);
      const VecD d = __builtin_convertvector(diff, VecD);
      part[v] = part[v] + d * d;
    }
  }
  const VecD all = (part[0] + part[1]) + (part[2] + part[3]);
  double total = 0;
  for (int i = 0; i < kWidth; ++i) total += all[i];
  return total;
}

void backward(const float* x, const float* y, const float* dloss, float scale, int64_t n,
              float* dx) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t count = n - i < kWidth ? n - i : kWidth;
    const Vec d = difference(x, y, i, count) * scale;
    store_n(dx + i, dloss ? d * load_n(dloss + i, count) : d, count);
  }
}

}  // namespace

void fill_mse(KernelTable& table) {
  table.mse = {squares, sum, backward};
}

}  // namespace tilewright::ISA
