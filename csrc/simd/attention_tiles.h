// Products of attention on tiles, by bfloat16 terms, with other work between them:
//
//   out (rows, 32) = left (rows, kc) * right (kc, 32)        panels and terms of simd/gemm_split.cc
//
//   one term on the left     tmm4: 16 rows     tmm6: half of the lanes by turns -> tmm0, tmm1
//   three terms              tmm4: 16 rows     tmm6: half of the lanes          -> tmm0
//
// Few tiles in use, for the reason that simd/amx.h gives. One sum after the other costs nothing, since
// products are passed on from one to the next, and loading each operand where it is used hides behind
// them: a product takes 16 cycles, a load 8.
//
// Numerics: the order of terms in a sum is that of simd/split_tiles.h, smallest first.
#pragma once
#include "simd/amx.h"
#include "simd/terms.h"

namespace tilewright::ISA {
namespace {

static_assert(kTermBytes == 2 * kTileBytes);
constexpr int64_t kSumLine = 128;  // bytes

template <int tile>
TW_INLINE void load_lanes(const char* term) {
  load_tile<tile>(term, kSumLine);
}

// A step of one tile of sums: a2 b0 + a1 b0 + a1 b1 + a0 b1 + a0 b2 + a0 b0.
TW_INLINE void multiply_three(const char* a, const char* b) {
  constexpr Words w = Words::bf16;
  load_lanes<6>(b);
  load_tile<4>(a + 2 * kTermBytes, 64);
  multiply_tiles<w, 0, 4, 6>();
  load_tile<4>(a + kTermBytes, 64);
  multiply_tiles<w, 0, 4, 6>();
  load_lanes<6>(b + kTermBytes);
  multiply_tiles<w, 0, 4, 6>();
  load_tile<4>(a, 64);
  multiply_tiles<w, 0, 4, 6>();
  load_lanes<6>(b + 2 * kTermBytes);
  multiply_tiles<w, 0, 4, 6>();
  load_lanes<6>(b);
  multiply_tiles<w, 0, 4, 6>();
}

// A step of two tiles beside each other: a0 b1 + a0 b0, or only the latter.
template <int TermsB, class Work>
TW_INLINE void multiply_one(const char* a, const char* b, Work& beside) {
  constexpr Words w = Words::bf16;
  load_tile<4>(a, 64);
#pragma GCC unroll 2
  for (int t = TermsB - 1; t >= 0; --t) {
    load_lanes<6>(b + t * kTermBytes);
    multiply_tiles<w, 0, 4, 6>();
    if constexpr (TermsB == 1) beside.next_part();
    load_lanes<6>(b + t * kTermBytes + 64);
    multiply_tiles<w, 1, 4, 6>();
    beside.next_part();
  }
}

// 16 rows of sums.
template <int TermsA, int TermsB, class Work>
TW_INLINE void multiply_rows(int64_t kc, const char* a, const char* b, char* out, Work& beside) {
  static_assert(TermsA == 1 || (TermsA == 3 && TermsB == 3));
  const int64_t steps = (kc + kStep - 1) / kStep;
  if constexpr (TermsA == 1) {
    clear_tile<0>(), clear_tile<1>();
    for (int64_t k = 0; k < steps; ++k) {
      multiply_one<TermsB>(a + k * kTermBytes, b + k * TermsB * kTermBytes, beside);
    }
    store_tile<0>(out, kSumLine), store_tile<1>(out + 64, kSumLine);
  } else {
    for (int half = 0; half < kSumLine; half += 64) {
      clear_tile<0>();
      for (int64_t k = 0; k < steps; ++k) {
        multiply_three(a + k * 3 * kTermBytes, b + k * 3 * kTermBytes + half);
        beside.next_part();
      }
      store_tile<0>(out + half, kSumLine);
    }
  }
}

// 64 parts where there are 128 keys and 64 dims.
template <int TermsA, int TermsB, class Work>
TW_INLINE void multiply_terms(const TileProduct& p, Work& beside) {
  for (int64_t i = 0; i < p.rows; i += kTileLines) {
    const char* const a = static_cast<const char*>(p.left) + i / (2 * kTileLines) * p.panel_bytes +
                          i / kTileLines % 2 * kTileBytes;
    multiply_rows<TermsA, TermsB>(p.kc, a, static_cast<const char*>(p.right),
                                  reinterpret_cast<char*>(p.out) + i * kSumLine, beside);
  }
}

}  // namespace
}  // namespace tilewright::ISA
