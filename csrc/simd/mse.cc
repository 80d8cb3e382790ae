// Squared differences of n elements:
//
//   squares    loss = (x - y)^2
//   sum        the sum of (x - y)^2: simd/squares.h
//   backward   dx = (x - y) scale, times dloss where that is an array
//
// Parameter   bounded by
// kAhead      elements asked for ahead, over the ends of pages, where the hardware stops
//
// Bound by memory. Numerics: the difference is rounded to float32, what follows in the sum is
// double. Not handled: dtypes and strides (cpu/rowwise.h).
#include "cpu/kernel_table.h"
#include "simd/fill.h"
#include "simd/squares.h"

namespace tilewright::ISA {
namespace {

constexpr int kAhead = 1024;

TW_INLINE Vec difference(const float* x, const float* y, int64_t i, int64_t n) {
  __builtin_prefetch(x + i + kAhead);
  __builtin_prefetch(y + i + kAhead);
  return load_n(x + i, n) - load_n(y + i, n);
}

void squares(const float* x, const float* y, int64_t n, float* loss) {
  fill(loss, n, [=](int64_t i, int64_t count) {
    const Vec d = difference(x, y, i, count);
    return d * d;
  });
}

double sum(const float* x, const float* y, int64_t n) {
  return sum_of_squares(n, [=](int64_t i, int64_t count) { return difference(x, y, i, count); });
}

void backward(const float* x, const float* y, const float* dloss, float scale, int64_t n,
              float* dx) {
  fill(dx, n, [=](int64_t i, int64_t count) {
    __builtin_prefetch(dx + i + kAhead, 1);
    const Vec d = difference(x, y, i, count) * scale;
    return dloss ? d * load_n(dloss + i, count) : d;
  });
}

}  // namespace

void fill_mse(KernelTable& table) {
  table.mse = {squares, sum, backward};
}

}  // namespace tilewright::ISA
