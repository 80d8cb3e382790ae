// Four lanes, FMA, 32 registers: every aarch64 CPU. What is not here is as in vec_generic.h.
#pragma once
#include <arm_neon.h>

#include "simd/vec_generic.h"

namespace tilewright::ISA {
namespace {

constexpr int kRegisters = 32;
constexpr int kTileRows = 12;  // 24 accumulators, 2 vectors of B, 3 of A
constexpr bool kMultipliesByLane = true;

TW_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
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
  return (VecI)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
}
// NaN stays NaN: that is how FMIN and FMAX are defined.
TW_INLINE Vec at_most(Vec v, float high) {
  return (Vec)vminq_f32((float32x4_t)v, vdupq_n_f32(high));
}
TW_INLINE Vec at_least(Vec v, float low) {
  return (Vec)vmaxq_f32((float32x4_t)v, vdupq_n_f32(low));
}
TW_INLINE Vec sqrt(Vec v) {
  return (Vec)vsqrtq_f32((float32x4_t)v);
}
#define TW_HALF_INSTRUCTIONS 1
TW_INLINE Vec widen_half(VecH h) {
  return (Vec)vcvt_f32_f16((float16x4_t)h);
}
TW_INLINE VecH narrow_half(Vec v) {
  return (VecH)vcvt_f16_f32((float32x4_t)v);
}

}  // namespace
}  // namespace tilewright::ISA
