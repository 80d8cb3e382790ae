// Rotary position embedding of one row: pairs of elements turned by angles,
//
//   (a, b) -> (a c - b s, b c + a s)       c = cos[i], s = sign sin[i], i < half
//
//   halves        a = x[i], b = x[i + half]:      | a a a a … | b b b b … |   two vectors, c and s of
//                                                                             the same lanes
//   interleaved   a = x[2i], b = x[2i + 1]:       | a b a b | a b a b |   every lane of c and s twice;
//                 y = x c + swap(x) (-s s -s s …)
//
// Bound by memory: two products an element. Numerics: one fused multiply-add over one rounded
// product, the same in both layouts. Not handled: dtypes and strides (cpu/rowwise.h), what lies
// beyond 2 half elements (cpu/rope.cc).
//
// Source: Su, Lu, Pan, Murtadha, Wen & Liu, "RoFormer" (2021).
#include "cpu/kernel_table.h"
#include "simd/vec.h"

namespace tilewright::ISA {
namespace {

void halves(const float* x, const float* cos, const float* sin, float sign, int64_t half,
            float* y) {
  for (int64_t i = 0; i < half; i += kWidth) {
    const int64_t n = half - i < kWidth ? half - i : kWidth;
    const Vec a = load_n(x + i, n), b = load_n(x + half + i, n);
    const Vec c = load_n(cos + i, n), s = sign * load_n(sin + i, n);
    store_n(y + i, fma(a, c, -(b * s)), n);
    store_n(y + half + i, fma(b, c, a * s), n);
  }
}

void interleaved(const float* x, const float* cos, const float* sin, float sign, int64_t half,
                 float* y) {
  const VecI lane = lane_numbers(), first = lane >> 1, second = first + kWidth / 2;
  const Vec signs = (lane & 1) == 1 ? broadcast(sign) : broadcast(-sign);
  const auto turn = [&](const float* from, float* to, Vec c, Vec s, int64_t n) {
    const Vec v = load_n(from, n);
    store_n(to, fma(v, c, __builtin_shuffle(v, lane ^ 1) * (signs * s)), n);
  };
  for (int64_t i = 0; i < half; i += kWidth) {
    const int64_t n = half - i < kWidth ? half - i : kWidth, low = 2 * n < kWidth ? 2 * n : kWidth;
    const Vec c = load_n(cos + i, n), s = load_n(sin + i, n);
    const float* from = x + 2 * i;
    float* to = y + 2 * i;
    turn(from, to, __builtin_shuffle(c, first), __builtin_shuffle(s, first), low);
    if (low == 2 * n) continue;
    turn(from + kWidth, to + kWidth, __builtin_shuffle(c, second), __builtin_shuffle(s, second),
         2 * n - kWidth);
  }
}

}  // namespace

void fill_rope(KernelTable& table) {
  table.rope = {halves, interleaved};
}

}  // namespace tilewright::ISA
