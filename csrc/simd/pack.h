// Packing: any strided matrix into panels of 4-byte words that a tile kernel reads front to back.
//
//   panel of A: (kc, MR)   word [k][i] = A[i0 + i][k0 + k]
//   panel of B: (kc, NR)   word [k][j] = B[k0 + k][j0 + j]
//
// Both are "kc lines of `width` words"; what differs is only which stride of the matrix runs along
// a line. So one function serves both: `line` is the matrix's stride along a line (rows of A,
// columns of B), `step` its stride along K.
#pragma once
#include "simd/vec.h"

namespace tilewright::ISA {
namespace {

// kWidth rows of kWidth lanes, transposed: log2(n) rounds in which row i of a group of n is
// interleaved with row i + n/2. Where interleaving stays inside parts of a register (n < kWidth),
// the parts have been gathered before.
TW_INLINE void transpose(Vec (&r)[kWidth]) {
  constexpr int n = kInterleaved;
  gather_halves(r);
#pragma GCC unroll 4
  for (int round = 1; round < n; round *= 2) {
    Vec t[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth / 2; ++i) {
      const int row = i / (n / 2) * n + i % (n / 2);
      t[2 * i] = interleave_low(r[row], r[row + n / 2]);
      t[2 * i + 1] = interleave_high(r[row], r[row + n / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) r[i] = t[i];
  }
}

// A block of up to kWidth words of a line, for `kc` lines, where K runs contiguously in memory:
// load along K, transpose. Writes kWidth words a line, also where count < kWidth; callers order
// their writes so that the surplus is overwritten.
template <class T>
TW_INLINE void pack_transposed(const T* src, int64_t line, int count, int64_t kc, float* dst,
                               int64_t dst_line) {
  int64_t k = 0;
  for (; k + kWidth <= kc; k += kWidth) {
    Vec r[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) r[i] = i < count ? load(src + i * line + k) : Vec{};
    transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) store(dst + (k + i) * dst_line, r[i]);
  }
  for (; k < kc; ++k) {
    Vec v = {};
    for (int i = 0; i < count; ++i) v[i] = load_one(src + i * line + k);
    store(dst + k * dst_line, v);
  }
}

// kc lines of `width` words, the first `count` of each from the matrix, the others zero. The panel
// has room for kWidth words beyond its end.
template <class T>
void pack_panel(const T* src, int64_t line, int64_t step, int width, int count, int64_t kc,
                float* panel) {
  const bool whole = count == width;
  if (line == 1 && (whole || count > 0)) {
    for (int64_t k = 0; k < kc; ++k) {
      const T* p = src + k * step;
      float* q = panel + k * width;
      int i = 0;
      for (; i + kWidth <= count; i += kWidth) store(q + i, load(p + i));
      // A whole vector: masked stores are slow on some CPUs, and the next line overwrites the rest.
      if (i < count) store(q + i, load_partial(p + i, count - i));
      for (i = count; i < width; ++i) q[i] = 0.0f;
    }
  } else if (step == 1) {
    for (int i = 0; i < width; i += kWidth) {
      const int n = count - i < kWidth ? (count - i > 0 ? count - i : 0) : kWidth;
      pack_transposed(src + i * line, line, n, kc, panel + i, width);
    }
  } else {
    for (int64_t k = 0; k < kc; ++k) {
      for (int i = 0; i < width; ++i) {
        panel[k * width + i] = i < count ? load_one(src + i * line + k * step) : 0.0f;
      }
    }
  }
}

}  // namespace
}  // namespace tilewright::ISA
