// Floats as sums of bfloat16 terms, and where tiles expect them (simd/gemm_split.cc).
#pragma once
#include "simd/dot_bf16.h"

namespace tilewright::ISA {
namespace {

constexpr int64_t kStep = 32;         // elements of K that a product of tiles takes
constexpr int64_t kTermBytes = 2048;  // of a step of 32 rows or columns

TW_INLINE int64_t round_to_step(int64_t k) {
  return (k + kStep - 1) / kStep * kStep;
}

#if defined(ISA_amx)
constexpr uint32_t kUpper = 0xffff0000u;

// first and second as sums of terms, pairs of which make a word, by integer operations alone: ties go
// away from zero. Three terms hold all 24 bits whichever way those go, and what two leave of them is a
// bfloat16 already; a NaN whose bits wrap to a zero in the first two is one in the third. Fewer terms
// feel a tie in the last. (The instruction for pairs takes two to three cycles, and one to put them in
// order.)
template <int Terms>
TW_INLINE void split_fast(Vec first, Vec second, VecU (&pairs)[Terms]) {
  for (int t = 0; t < Terms; ++t) {
    const bool exact = t == 2;  // a bfloat16 already
    const VecU a = exact ? (VecU)first : (VecU)first + 0x8000u;
    const VecU b = exact ? (VecU)second : (VecU)second + 0x8000u;
    pairs[t] = a >> 16 | (b & kUpper);
    if (t + 1 == Terms) return;
    first = first - (Vec)(a & kUpper);
    second = second - (Vec)(b & kUpper);
  }
}

// The same of 32 numbers beside each other: words of neighbours.
template <int Terms>
TW_INLINE void split_beside(Vec left, Vec right, VecU (&words)[Terms]) {
  VecU a, b;
  order_for_pack((VecU)left, (VecU)right, a, b);
#pragma GCC unroll 3
  for (int t = 0; t < Terms; ++t) {
    const bool exact = t == 2;
    const VecU x = exact ? a : a + 0x8000u, y = exact ? b : b + 0x8000u;
    words[t] = pack_halves(x >> 16, y >> 16);
    if (t + 1 == Terms) return;
    a = (VecU)((Vec)a - (Vec)(x & kUpper));
    b = (VecU)((Vec)b - (Vec)(y & kUpper));
  }
}

// As split_fast, ties to even.
template <int Terms>
TW_INLINE void split(Vec first, Vec second, VecU (&pairs)[Terms]) {
  if constexpr (Terms == 3) return split_fast(first, second, pairs);
  for (int t = 0; t < Terms; ++t) {
    pairs[t] = round_pairs(first, second);
    first = first - (Vec)(pairs[t] << 16);
    second = second - (Vec)(pairs[t] & kUpper);
  }
}

// 16 elements along K and the next 16 as a line of a left operand, a term every kTermBytes.
template <int Terms>
TW_INLINE void store_line(Vec left, Vec right, char* to) {
  if constexpr (Terms == 3) {
    VecU lines[Terms];
    split_beside(left, right, lines);
    for (int t = 0; t < Terms; ++t) memcpy(to + t * kTermBytes, &lines[t], sizeof lines[t]);
    return;
  }
#pragma GCC unroll 3
  for (int t = 0; t < Terms; ++t) {
    const VecU line = round_beside(left, right);
    memcpy(to + t * kTermBytes, &line, sizeof line);
    if (t + 1 == Terms) return;
    left = left - widen_lower(line);
    right = right - widen_upper(line);
  }
}

// Elements k and k + 1 of 16 columns from `lane` on, in a right operand of 32 columns.
template <int Terms>
TW_INLINE void store_terms(Vec first, Vec second, int64_t k, int lane, char* panel) {
  VecU terms[Terms];
  split_fast(first, second, terms);
  char* const line = panel + k / kStep * Terms * kTermBytes + k % kStep / 2 * 128 + lane * 4;
#pragma GCC unroll 3
  for (int t = 0; t < Terms; ++t) memcpy(line + t * kTermBytes, &terms[t], sizeof terms[t]);
}
#endif

}  // namespace
}  // namespace tilewright::ISA
