// The instructions for bfloat16: pairs of them in a lane, the first in its lower half.
#pragma once
#include "simd/vec.h"

namespace tilewright::ISA {
namespace {

#if defined(ISA_avx512_bf16)
// acc[l] += a[l].second * b[l].second, then a[l].first * b[l].first.
TW_INLINE Vec add_dot_bf16(Vec acc, VecU a, VecU b) {
  return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}
#endif

#if defined(ISA_amx)
// Both to the nearest bfloat16, ties to even, one after the other; subnormal numbers count as zero.
TW_INLINE VecU round_beside(Vec first, Vec second) {
  return (VecU)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
// Two vectors of numbers below 2^16 as 32 halves in order, if they were put into this order before.
TW_INLINE void order_for_pack(VecU left, VecU right, VecU& a, VecU& b) {
  const __m512i first = _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13);
  const __m512i second = _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15);
  a = (VecU)_mm512_permutex2var_epi64((__m512i)left, first, (__m512i)right);
  b = (VecU)_mm512_permutex2var_epi64((__m512i)left, second, (__m512i)right);
}
TW_INLINE VecU pack_halves(VecU a, VecU b) {
  return (VecU)_mm512_packus_epi32((__m512i)a, (__m512i)b);
}
// The first and the last 16 of 32 bfloat16 as floats.
TW_INLINE Vec widen_lower(VecU line) {
  uint16_t half __attribute__((vector_size(32)));
  memcpy(&half, &line, sizeof half);
  return (Vec)((VecU)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)half) << 16);
}
TW_INLINE Vec widen_upper(VecU line) {
  return widen_lower((VecU)__builtin_shuffle(
      (VecI)line, VecI{8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15}));
}

// The same in pairs.
TW_INLINE VecU round_pairs(Vec first, Vec second) {
  typedef uint16_t Halves __attribute__((vector_size(64)));
  const Halves apart = (Halves)round_beside(first, second);
  Halves order;
  for (int i = 0; i < 16; ++i) order[2 * i] = uint16_t(i), order[2 * i + 1] = uint16_t(16 + i);
  return (VecU)__builtin_shuffle(apart, order);
}
#endif

}  // namespace
}  // namespace tilewright::ISA
