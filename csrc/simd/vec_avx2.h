// Eight lanes, FMA.
#pragma once
#include <immintrin.h>

namespace tilewright::ISA {
namespace {

constexpr int kWidth = 8;
constexpr int kRegisters = 16;
constexpr int kTileRows = 6;  // 12 accumulators, 2 vectors of B, 1 of A
constexpr bool kMultipliesByLane = false;
typedef float Vec __attribute__((vector_size(32)));
typedef int32_t VecI __attribute__((vector_size(32)));
typedef uint16_t VecH __attribute__((vector_size(16)));

TW_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
// a * b - product, exactly.
TW_INLINE Vec product_error(Vec a, Vec b, Vec product) {
  return fma(a, b, -product);
}
// a * b - c, rounded once.
TW_INLINE Vec product_minus(Vec a, Vec b, Vec c) {
  return fma(a, b, -c);
}
// The 64-bit products of the even lanes, unsigned.
TW_INLINE VecI multiply_even(VecI a, VecI b) {
  return (VecI)_mm256_mul_epu32((__m256i)a, (__m256i)b);
}
// v * 2^n, |n| <= 252 an integer: in two halves, so that only the second may leave the normal
// range.
TW_INLINE Vec times_power_of_two(Vec v, Vec n) {
  const VecI whole = __builtin_convertvector(n, VecI), half = whole >> 1;
  return v * (Vec)((half + 127) << 23) * (Vec)((whole - half + 127) << 23);
}
// The same for n of -190..63: the first product is exact.
TW_INLINE Vec times_power_down(Vec v, Vec n) {
  const VecI biased = (VecI)(n + (12582912.0f + 127.0f + 64.0f));  // as in exp_to_zero
  return v * (Vec)(biased << 23) * 0x1p-64f;
}
// NaN stays NaN: the instructions return their second operand.
TW_INLINE Vec at_most(Vec v, float high) {
  return (Vec)_mm256_min_ps(_mm256_set1_ps(high), (__m256)v);
}
TW_INLINE Vec at_least(Vec v, float low) {
  return (Vec)_mm256_max_ps(_mm256_set1_ps(low), (__m256)v);
}
TW_INLINE Vec quotient(Vec p, Vec q) {
  return p / q;
}
TW_INLINE Vec sqrt(Vec v) {
  return (Vec)_mm256_sqrt_ps((__m256)v);
}
// Whether a lane of a comparison holds.
TW_INLINE bool any(VecI mask) {
  return _mm256_movemask_ps((__m256)mask) != 0;
}
TW_INLINE __m256i first_lanes(int64_t n) {
  const VecI lane = {0, 1, 2, 3, 4, 5, 6, 7};
  return (__m256i)(VecI)(lane < int32_t(n));
}
TW_INLINE Vec load_partial(const float* p, int64_t n) {
  return (Vec)_mm256_maskload_ps(p, first_lanes(n));
}
TW_INLINE void store_partial(float* p, Vec v, int64_t n) {
  _mm256_maskstore_ps(p, first_lanes(n), (__m256)v);
}
// Past the caches, p a multiple of the vector's size; other cores see it from end_streaming() on.
TW_INLINE void store_streaming(float* p, Vec v) {
  _mm256_stream_ps(p, (__m256)v);
}
TW_INLINE void end_streaming() {
  _mm_sfence();
}
// GCC 12 takes __builtin_convertvector apart.
typedef float Half __attribute__((vector_size(16)));
typedef double HalfD __attribute__((vector_size(32)));
TW_INLINE HalfD to_double(Half v) {
  return (HalfD)_mm256_cvtps_pd((__m128)v);
}
#define TW_HALF_INSTRUCTIONS 1
TW_INLINE Vec widen_half(VecH h) {
  return (Vec)_mm256_cvtph_ps((__m128i)h);
}
TW_INLINE VecH narrow_half(Vec v) {
  return (VecH)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
}
// Crossing the middle of a register costs a second instruction, so the halves change places first
// and the interleaving stays inside them.
constexpr int kInterleaved = 4;
// kWidth bytes or 16-bit integers, widened.
TW_INLINE VecI widen(const int8_t* p) {
  return (VecI)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
}
TW_INLINE VecI widen(const uint8_t* p) {
  return (VecI)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
}
TW_INLINE VecI widen(const int16_t* p) {
  return (VecI)_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)p));
}
// The low byte of each lane.
TW_INLINE void store_bytes(int8_t* p, VecI v) {
  const __m256i first = _mm256_setr_epi32(0x0c080400, 0, 0, 0, 0x0c080400, 0, 0, 0);
  const __m256i low = _mm256_shuffle_epi8((__m256i)v, first);
  _mm_storel_epi64((__m128i*)p, _mm_unpacklo_epi32(_mm256_castsi256_si128(low),
                                                   _mm256_extracti128_si256(low, 1)));
}
TW_INLINE Vec interleave_low(Vec a, Vec b) {
  return __builtin_shuffle(a, b, VecI{0, 8, 1, 9, 4, 12, 5, 13});
}
TW_INLINE Vec interleave_high(Vec a, Vec b) {
  return __builtin_shuffle(a, b, VecI{2, 10, 3, 11, 6, 14, 7, 15});
}
TW_INLINE void gather_halves(Vec (&r)[kWidth]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vec low = __builtin_shuffle(r[i], r[i + 4], VecI{0, 1, 2, 3, 8, 9, 10, 11});
    r[i + 4] = __builtin_shuffle(r[i], r[i + 4], VecI{4, 5, 6, 7, 12, 13, 14, 15});
    r[i] = low;
  }
}

}  // namespace
}  // namespace tilewright::ISA
