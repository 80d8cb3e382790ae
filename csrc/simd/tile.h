// The register tile that the matrix products share: MR x NR accumulators, blocks of KC words of K.
//
// Parameter  bounded by                                          generic   avx2    avx512   neon
// MR x NR    registers: 2 MR accumulators + 2 of b + a's         4 x 8     6 x 16  14 x 32  12 x 8
//   int8     the same and its products                           4 x 8     6 x 16  14 x 32  8 x 8
// KC         b's panel (KC x NR words) in L1 beside a's          256       256     256      256
#pragma once
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

}  // namespace
}  // namespace tilewright::ISA
