// The sum of f(i)^2 in double, as kSquareSums vectors of lanes folded in one order.
//
// Parameter     bounded by
// kSquareSums   latency of an addition: 4 cycles, up to 2 a cycle
//
// A square of a float32 is exact in double.
#pragma once
#include "simd/vec.h"

namespace tilewright::ISA {
namespace {

constexpr int kSquareSums = 4;
constexpr int kHalf = kWidth / 2;

// values(i, n): n elements from i on, zeros beyond.
template <class Values>
TW_INLINE double sum_of_squares(int64_t n, const Values& values) {
  HalfD part[kSquareSums][2] = {};
  const auto add = [&](int v, int64_t i, int64_t count) {
    const Vec x = values(i, count);
    Half halves[2];
    memcpy(halves, &x, sizeof x);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const HalfD d = to_double(halves[h]);
      part[v][h] = part[v][h] + d * d;
    }
  };
  int64_t i = 0;
  for (; i + kSquareSums * kWidth <= n; i += kSquareSums * kWidth) {
#pragma GCC unroll 4
    for (int v = 0; v < kSquareSums; ++v) add(v, i + v * kWidth, kWidth);
  }
  for (int v = 0; i < n; ++v, i += kWidth) add(v, i, n - i < kWidth ? n - i : kWidth);
  double total = 0;
  for (int h = 0; h < 2; ++h) {
    const HalfD all = (part[0][h] + part[1][h]) + (part[2][h] + part[3][h]);
    for (int lane = 0; lane < kHalf; ++lane) total += all[lane];
  }
  return total;
}

}  // namespace
}  // namespace tilewright::ISA
