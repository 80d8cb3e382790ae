// A GEMM's products of bfloat16 terms on tiles (simd/gemm_split.cc has the terms and their order), with
// other work between them.
#pragma once
#include "simd/amx.h"
#include "simd/terms.h"

namespace tilewright::ISA {
namespace {

static_assert(kTermBytes == 2 * kTileBytes);

// Panels of the left operand come from the second cache and should stay there.
TW_INLINE void load_left(const char* term) {
  stream_tile<4>(term, 64);
}
TW_INLINE void load_right(const char* term) {
  load_tile<6>(term, 128);
  load_tile<7>(term + 64, 128);
}
TW_INLINE void multiply_both() {
  multiply_tiles<Words::bf16, 0, 4, 6>();
  multiply_tiles<Words::bf16, 1, 4, 7>();
}

// Each term of one side stays loaded for as long as the next product wants it.
template <int TermsA, int TermsB, class Work>
TW_INLINE void multiply_step(const char* a, const char* b, Work& beside) {
  static_assert(TermsA == TermsB || (TermsA == 1 && TermsB == 2));
  if constexpr (TermsA == 1) {
    load_left(a);
    if constexpr (TermsB == 2) {
      load_right(b + kTermBytes);
      multiply_both();  // a0 b1
      beside.next_part();
    }
    load_right(b);
    multiply_both();  // a0 b0
    beside.next_part();
  } else {
    load_right(b);
    if constexpr (TermsA == 3) {
      load_left(a + 2 * kTermBytes);
      multiply_both();  // a2 b0
    }
    load_left(a + kTermBytes);
    multiply_both();  // a1 b0
    beside.next_part();
    load_right(b + kTermBytes);
    if constexpr (TermsA == 3) multiply_both();  // a1 b1
    load_left(a);
    multiply_both();  // a0 b1
    beside.next_part();
    if constexpr (TermsA == 3) {
      load_right(b + 2 * kTermBytes);
      multiply_both();  // a0 b2
    }
    load_right(b);
    multiply_both();  // a0 b0
    beside.next_part();
  }
}
// How often that is next_part().
template <int TermsA, int TermsB>
constexpr int kPartsOfStep = TermsA == 1 ? TermsB : 3;

// 16 rows of sums over kc elements of K, to rows `line` bytes apart.
template <int TermsA, int TermsB, class Work>
TW_INLINE void multiply_steps(int64_t kc, const char* a, const char* b, char* out, int64_t line,
                              Work& beside) {
  clear_sums();
  for (int64_t k = 0; k < kc; k += kStep, a += TermsA * kTermBytes, b += TermsB * kTermBytes) {
    multiply_step<TermsA, TermsB>(a, b, beside);
  }
  store_sums(out, line);
}

}  // namespace
}  // namespace tilewright::ISA
