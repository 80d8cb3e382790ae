// The register tile that the matrix products share: MR x NR accumulators, blocks of KC words of K.
//
// Parameter  bounded by                                          generic   avx2    avx512   neon
// MR x NR    registers: 2 MR accumulators + 2 of b + a's         4 x 8     6 x 16  14 x 32  12 x 8
//   int8     the same and its products                           4 x 8     6 x 16  14 x 32  8 x 8
// KC         b's panel (KC x NR words) in L1 beside a's          256       256     256      256
#pragma once
#include "cpu/kernels_gemm.h"
#include "simd/vec.h"

namespace tilewright::ISA {
namespace {

constexpr int kVectors = 2;
constexpr int NR = kVectors * kWidth;
constexpr int kFloatRows = kTileRows;
// A pair product of NEON is two vectors before it is one.
constexpr int kPairRows = kMultipliesByLane ? 8 : kTileRows;
constexpr int KC = 256;
static_assert((kFloatRows <= kWidth || kFloatRows % kWidth == 0) &&
                  (kPairRows <= kWidth || kPairRows % kWidth == 0),
              "lines are written kWidth words at a time; the surplus must fall into the next line");

// The memory that is soon read: by one line at most with each word of K. In bursts, tiles would wait.
struct Ahead {
  const char* at;
  int64_t step;

  TW_INLINE Ahead(const TileOut& out, const void* b)
      : at(out.ahead ? out.ahead : static_cast<const char*>(b)),
        step(out.ahead ? out.ahead_step : 0) {}
  TW_INLINE void fetch() {
    __builtin_prefetch(at, 0, 2);
    at += step;
  }
};

// Finished accumulators, V: vectors of floats or of words.
template <int Rows, int Vectors, class V>
TW_INLINE void put_tile(const V (&acc)[Rows][Vectors], const TileOut& out) {
  constexpr int64_t kBytes = sizeof(V);
  char* to = static_cast<char*>(out.data);
  const char* sum = static_cast<const char*>(out.sum);
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i, to += out.row * 4) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      V x = acc[i][v];
      if (sum) {
        V before;
        memcpy(&before, sum + (i * Vectors + v) * kBytes, sizeof before);
        x = before + x;
      }
      memcpy(to + v * kBytes, &x, sizeof x);
    }
  }
}

}  // namespace
}  // namespace tilewright::ISA
