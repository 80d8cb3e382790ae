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
// Both to the nearest bfloat16, ties to even; subnormal numbers count as zero.
TW_INLINE VecU round_pairs(Vec first, Vec second) {
  typedef uint16_t Halves __attribute__((vector_size(64)));
  const Halves apart = (Halves)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  Halves order;
  for (int i = 0; i < 16; ++i) order[2 * i] = uint16_t(i), order[2 * i + 1] = uint16_t(16 + i);
  return (VecU)__builtin_shuffle(apart, order);
}
#endif

}  // namespace
}  // namespace tilewright::ISA
