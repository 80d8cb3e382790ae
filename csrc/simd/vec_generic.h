// Four lanes, no intrinsics: SSE2 on x86-64, NEON's vectors on aarch64. The level neon shares what
// is here and replaces what it has instructions for.
#pragma once

namespace tilewright::ISA {
namespace {

constexpr int kWidth = 4;
typedef float Vec __attribute__((vector_size(16)));
typedef int32_t VecI __attribute__((vector_size(16)));
typedef uint16_t VecH __attribute__((vector_size(8)));
typedef float Half __attribute__((vector_size(8)));
typedef double HalfD __attribute__((vector_size(16)));

TW_INLINE HalfD to_double(Half v) {
  return __builtin_convertvector(v, HalfD);
}

#if !defined(ISA_neon)
constexpr int kRegisters = 16;  // of SSE2
constexpr int kTileRows = 4;    // 8 accumulators: products need registers of their own here
constexpr bool kMultipliesByLane = false;

// Plain x86-64 has no fused multiply-add: two roundings here, one on every other level.
TW_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return a * b + c;
}
// a * b - product but for a rounding of the last term: each factor as its upper 12 bits and the
// rest (Dekker).
TW_INLINE Vec product_error(Vec a, Vec b, Vec product) {
  const Vec ah = (Vec)((VecI)a & int32_t(0xfffff000)), al = a - ah;
  const Vec bh = (Vec)((VecI)b & int32_t(0xfffff000)), bl = b - bh;
  return (ah * bh - product) + (ah * bl + al * bh) + al * bl;
}
// a * b - c, rounded about once.
TW_INLINE Vec product_minus(Vec a, Vec b, Vec c) {
  const Vec product = a * b;
  return (product - c) + product_error(a, b, product);
}
// The 64-bit products of the even lanes, unsigned.
TW_INLINE VecI multiply_even(VecI a, VecI b) {
  typedef uint64_t VecL __attribute__((vector_size(16)));
  return (VecI)(((VecL)a & 0xffffffff) * ((VecL)b & 0xffffffff));
}
// NaN stays NaN.
TW_INLINE Vec at_most(Vec v, float high) {
  return v > high ? high - Vec{} : v;
}
TW_INLINE Vec at_least(Vec v, float low) {
  return v < low ? low - Vec{} : v;
}
TW_INLINE Vec sqrt(Vec v) {
  for (int i = 0; i < kWidth; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}
#endif

TW_INLINE Vec quotient(Vec p, Vec q) {
  return p / q;
}
// Whether a lane of a comparison holds.
TW_INLINE bool any(VecI mask) {
  return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
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
TW_INLINE Vec load_partial(const float* p, int64_t n) {
  Vec v = {};
  memcpy(&v, p, size_t(n) * 4);
  return v;
}
TW_INLINE void store_partial(float* p, Vec v, int64_t n) {
  memcpy(p, &v, size_t(n) * 4);
}
// A level without an instruction for it writes through the caches.
TW_INLINE void store_streaming(float* p, Vec v) {
  memcpy(p, &v, sizeof v);
}
TW_INLINE void end_streaming() {}
constexpr int kInterleaved = kWidth;
// kWidth bytes or 16-bit integers, widened.
template <class T>
TW_INLINE VecI widen(const T* p) {
  typedef T VecT __attribute__((vector_size(kWidth * sizeof(T))));
  VecT v;
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, VecI);
}
// The low byte of each lane.
TW_INLINE void store_bytes(int8_t* p, VecI v) {
  typedef int8_t VecS8 __attribute__((vector_size(kWidth)));
  const VecS8 q = __builtin_convertvector(v, VecS8);
  memcpy(p, &q, sizeof q);
}
// Lanes of a and b alternating: (a0 b0 a1 b1 …), from the lower and the upper halves.
TW_INLINE Vec interleave_low(Vec a, Vec b) {
  return __builtin_shuffle(a, b, VecI{0, 4, 1, 5});
}
TW_INLINE Vec interleave_high(Vec a, Vec b) {
  return __builtin_shuffle(a, b, VecI{2, 6, 3, 7});
}
TW_INLINE void gather_halves(Vec (&)[kWidth]) {}

}  // namespace
}  // namespace tilewright::ISA
