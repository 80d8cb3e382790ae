// Dot products of int8 pairs: the part of the int8 GEMM that differs from level to level.
//
// A multiply-add works on kWidth lanes; a lane holds two neighbours along K as int16, and
//
//     acc[l] += a[l].first * b[l].first + a[l].second * b[l].second         (vpmaddwd, vpaddd)
//
// is exact: |product| <= 255 * 128, so the pair's sum needs 17 bits of the 32, and nothing
// saturates (as vpmaddubsw would). Sums are taken modulo 2^32.
#pragma once
#include "simd/vec.h"

namespace tilewright::ISA {
namespace {

typedef int16_t VecP __attribute__((vector_size(kWidth * 4)));  // kWidth pairs
typedef int8_t VecB __attribute__((vector_size(kWidth * 2)));   // kWidth pairs of int8
typedef uint8_t VecUB __attribute__((vector_size(kWidth * 2)));

TW_INLINE VecU load_words(const uint32_t* p) {
  return (VecU)load(reinterpret_cast<const float*>(p));
}
TW_INLINE void store_words(uint32_t* p, VecU v) {
  store(reinterpret_cast<float*>(p), (Vec)v);
}

// 2 kWidth bytes that are contiguous along K, widened.
#if defined(ISA_neon)  // GCC 12 converts byte by byte here
TW_INLINE VecP load_pairs(const int8_t* p) {
  return (VecP)vmovl_s8(vld1_s8(p));
}
TW_INLINE VecP load_pairs(const uint8_t* p) {
  return (VecP)vmovl_u8(vld1_u8(p));
}
#else
TW_INLINE VecP load_pairs(const int8_t* p) {
  VecB b;
  memcpy(&b, p, sizeof b);
  return __builtin_convertvector(b, VecP);
}
TW_INLINE VecP load_pairs(const uint8_t* p) {
  VecUB b;
  memcpy(&b, p, sizeof b);
  return __builtin_convertvector(b, VecP);
}
#endif
TW_INLINE VecP broadcast_pair(uint32_t word) {
  return (VecP)(VecU)(word - VecU{});
}

#if defined(ISA_avx512_vnni)  // both in one instruction
// acc[l] += four bytes of a, unsigned, times four of b, signed.
TW_INLINE VecU add_bytes(VecU acc, VecU a, VecU b) {
  return (VecU)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
}
// The first n bytes of a vector, or all of them; then zeros.
TW_INLINE VecU load_bytes(const void* p, int64_t n) {
  const __mmask64 first = n < 64 ? (uint64_t(1) << n) - 1 : ~uint64_t(0);
  return (VecU)_mm512_maskz_loadu_epi8(first, p);
}
// n bytes, a lane each, then zeros.
TW_INLINE VecU first_bytes(const void* p, int n) {
  return (VecU)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_maskz_loadu_epi8(first_lanes(n), p));
}
TW_INLINE VecU add_dot(VecU acc, VecP a, VecP b) {
  return (VecU)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
}
#elif defined(ISA_avx512)
TW_INLINE VecU add_dot(VecU acc, VecP a, VecP b) {
  return acc + (VecU)_mm512_madd_epi16((__m512i)a, (__m512i)b);
}
#elif defined(ISA_avx2)
TW_INLINE VecU add_dot(VecU acc, VecP a, VecP b) {
  return acc + (VecU)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}
#elif defined(ISA_neon)
TW_INLINE VecU add_dot(VecU acc, VecP a, VecP b) {
  const int32x4_t low = vmull_s16(vget_low_s16((int16x8_t)a), vget_low_s16((int16x8_t)b));
  return acc + (VecU)vpaddq_s32(low, vmull_high_s16((int16x8_t)a, (int16x8_t)b));
}
#elif defined(__SSE2__)
TW_INLINE VecU add_dot(VecU acc, VecP a, VecP b) {
  return acc + (VecU)__builtin_ia32_pmaddwd128(a, b);
}
#else
TW_INLINE VecU add_dot(VecU acc, VecP a, VecP b) {
  const VecI first_a = (VecI)a << 16 >> 16, first_b = (VecI)b << 16 >> 16;
  return acc + (VecU)(first_a * first_b) + (VecU)(((VecI)a >> 16) * ((VecI)b >> 16));
}
#endif

#if defined(ISA_neon_dot)
// --- four neighbours along K in a lane -----------------------------------------------------------

typedef int8_t VecQ __attribute__((vector_size(16)));

TW_INLINE VecQ load_bytes(const void* p) {
  return (VecQ)load(static_cast<const float*>(p));
}
// Two lines of int8 pairs, (k, k + 1) and (k + 2, k + 3), as one: their first and second columns.
TW_INLINE VecQ low_quads(VecQ first, VecQ second) {
  return (VecQ)vzip1q_s16((int16x8_t)first, (int16x8_t)second);
}
TW_INLINE VecQ high_quads(VecQ first, VecQ second) {
  return (VecQ)vzip2q_s16((int16x8_t)first, (int16x8_t)second);
}
// Two lines of kWidth int16 pairs, each a number of int8.
TW_INLINE VecQ narrow_quads(VecQ first, VecQ second) {
  constexpr VecQ kLowBytes = {0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30};
  return (VecQ)vqtbl2q_s8({{(int8x16_t)first, (int8x16_t)second}}, (uint8x16_t)kLowBytes);
}
// acc[l] += b's four numbers of lane l times a's of `lane`; a constant once loops are unrolled.
TW_INLINE VecU add_quads(VecU acc, VecQ b, VecQ a, int lane) {
  const int32x4_t sum = (int32x4_t)acc;
  const int8x16_t x = (int8x16_t)b, y = (int8x16_t)a;
  return (VecU)(lane == 0   ? vdotq_laneq_s32(sum, x, y, 0)
                : lane == 1 ? vdotq_laneq_s32(sum, x, y, 1)
                : lane == 2 ? vdotq_laneq_s32(sum, x, y, 2)
                            : vdotq_laneq_s32(sum, x, y, 3));
}
#endif

}  // namespace
}  // namespace tilewright::ISA
