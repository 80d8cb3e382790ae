// Sixteen lanes, FMA, mask registers for tails.
#pragma once
#include <immintrin.h>

namespace tilewright::ISA {
namespace {

constexpr int kWidth = 16;
constexpr int kRegisters = 32;
constexpr int kTileRows = 14;  // 28 accumulators, 2 vectors of B, 1 of A
// Of these, rows whose word each multiply-add broadcasts itself: an instruction less, a load more, of
// which 14 cycles have 28: 4 + 2 * 10, 2 of B and what is fetched.
constexpr int kWordsInMemory = 10;
constexpr bool kMultipliesByLane = false;
typedef float Vec __attribute__((vector_size(64)));
typedef int32_t VecI __attribute__((vector_size(64)));
typedef uint16_t VecH __attribute__((vector_size(32)));

TW_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#define TW_FMA_WORD 1
// fma(broadcast(*a), b, c) as one instruction, however many read the same word: GCC would load it once.
TW_INLINE Vec fma_word(const float* a, Vec b, Vec c) {
  asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(b), "m"(*a));
  return c;
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
  return (VecI)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
}
// v * 2^n, n an integer; rounded once.
TW_INLINE Vec times_power_of_two(Vec v, Vec n) {
  return (Vec)_mm512_maskz_scalef_ps(0xffff, (__m512)v, (__m512)n);
}
TW_INLINE Vec times_power_down(Vec v, Vec n) {
  return times_power_of_two(v, n);
}
// Of each lane, the element that the lower four or five bits of its index say.
#define TW_LOOK_UP 1
TW_INLINE Vec look_up(const float (&table)[16], VecI index) {
  return (Vec)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)index, _mm512_loadu_ps(table));
}
TW_INLINE Vec look_up(const float (&table)[32], VecI index) {
  return (Vec)_mm512_maskz_permutex2var_ps(0xffff, _mm512_loadu_ps(table), (__m512i)index,
                                           _mm512_loadu_ps(table + 16));
}
// |v|, but at most `high`; NaN gives `high`.
TW_INLINE Vec magnitude_at_most(Vec v, float high) {
  return (Vec)_mm512_maskz_range_ps(0xffff, (__m512)v, _mm512_set1_ps(high), 0b1010);
}
// NaN stays NaN: the instructions return their second operand.
TW_INLINE Vec at_most(Vec v, float high) {
  return (Vec)_mm512_maskz_min_ps(0xffff, _mm512_set1_ps(high), (__m512)v);
}
TW_INLINE Vec at_least(Vec v, float low) {
  return (Vec)_mm512_maskz_max_ps(0xffff, _mm512_set1_ps(low), (__m512)v);
}
// p / q, within 1.1 ulp (p = 1: 0.6): a fraction of the time of a division. 1 / q is to be normal.
TW_INLINE Vec quotient(Vec p, Vec q) {
  const Vec r = (Vec)_mm512_maskz_rcp14_ps(0xffff, (__m512)q);
  return p * fma(r, fma(-q, r, (Vec)_mm512_set1_ps(1.0f)), r);
}
// Masked by ones, here and below: GCC 12 warns of the undefined source in _mm512_sqrt_ps.
TW_INLINE Vec sqrt(Vec v) {
  return (Vec)_mm512_maskz_sqrt_ps(0xffff, (__m512)v);
}
// Whether a lane of a comparison holds.
TW_INLINE bool any(VecI mask) {
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
}
TW_INLINE bool any_below(Vec v, float low) {
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(low), _CMP_LT_OQ) != 0;
}
TW_INLINE __mmask16 first_lanes(int64_t n) {
  return __mmask16((1u << n) - 1);
}
TW_INLINE Vec load_partial(const float* p, int64_t n) {
  return (Vec)_mm512_maskz_loadu_ps(first_lanes(n), p);
}
TW_INLINE void store_partial(float* p, Vec v, int64_t n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v);
}
// Past the caches, p a multiple of the vector's size; other cores see it from end_streaming() on.
TW_INLINE void store_streaming(float* p, Vec v) {
  _mm512_stream_ps(p, (__m512)v);
}
TW_INLINE void end_streaming() {
  _mm_sfence();
}
typedef float Half __attribute__((vector_size(32)));
typedef double HalfD __attribute__((vector_size(64)));
TW_INLINE HalfD to_double(Half v) {
  return __builtin_convertvector(v, HalfD);
}
#define TW_HALF_INSTRUCTIONS 1
TW_INLINE Vec widen_half(VecH h) {
  return (Vec)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h);
}
TW_INLINE VecH narrow_half(Vec v) {
  return (VecH)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
}
#define TW_TERNARY_LOGIC 1
// (v & mask) ^ flip. In v's own register, which is often free by then: GCC would copy a constant first.
TW_INLINE VecI and_xor(VecI v, int32_t mask, int32_t flip) {
  return (VecI)_mm512_ternarylogic_epi32((__m512i)v, _mm512_set1_epi32(mask),
                                         _mm512_set1_epi32(flip), 0x6a);
}
constexpr int kInterleaved = kWidth;
// kWidth bytes or 16-bit integers, widened (GCC 12 takes __builtin_convertvector apart, lane by lane).
TW_INLINE VecI widen(const int8_t* p) {
  return (VecI)_mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128((const __m128i*)p));
}
TW_INLINE VecI widen(const uint8_t* p) {
  return (VecI)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128((const __m128i*)p));
}
TW_INLINE VecI widen(const int16_t* p) {
  return (VecI)_mm512_maskz_cvtepi16_epi32(0xffff, _mm256_loadu_si256((const __m256i*)p));
}
// The low byte of each lane.
TW_INLINE void store_bytes(int8_t* p, VecI v) {
  _mm_storeu_si128((__m128i*)p, _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)v));
}
TW_INLINE Vec interleave_low(Vec a, Vec b) {
  return __builtin_shuffle(a, b, VecI{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
}
TW_INLINE Vec interleave_high(Vec a, Vec b) {
  return __builtin_shuffle(a, b,
                           VecI{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
}
TW_INLINE void gather_halves(Vec (&)[kWidth]) {}

}  // namespace
}  // namespace tilewright::ISA
