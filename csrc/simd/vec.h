// Vec: kWidth floats of this ISA level, in GCC/Clang vector extensions.
//
// + - * / < ?: come from the language. Added here: fused multiply-add, min/max with NumPy's NaN
// rules, partial loads and stores, the 16-bit floats, reductions in one defined order,
// exp. Raw intrinsics only in vec_<isa>.h, which also say how many vector registers there are and
// how many rows of a GEMM's tile (kTileRows x 2 vectors of accumulators) fit into them.
//
// Everything lives in an anonymous namespace: no weak symbol may leave an object that was compiled
// for a newer CPU.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "tilewright/view.h"

#define TW_INLINE inline __attribute__((always_inline))

#if defined(ISA_avx512)
#include "simd/vec_avx512.h"
#elif defined(ISA_avx2)
#include "simd/vec_avx2.h"
#elif defined(ISA_neon)
#include "simd/vec_neon.h"
#else
#include "simd/vec_generic.h"
#endif

namespace tilewright::ISA {
namespace {

TW_INLINE Vec broadcast(float x) {
  return x - Vec{};
}
TW_INLINE VecI broadcast_int(int32_t x) {
  return x - VecI{};
}

// A vector anywhere in memory. Not memcpy: of 16 bytes GCC makes an integer on aarch64, which costs
// a way through the general registers.
typedef float VecInMemory __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));

TW_INLINE Vec load(const float* p) {
  return *reinterpret_cast<const VecInMemory*>(p);
}
TW_INLINE void store(float* p, Vec v) {
  *reinterpret_cast<VecInMemory*>(p) = v;
}

// n floats, each to be multiplied into whole vectors. x86 broadcasts from memory for nothing; NEON
// multiplies by a lane, so that the floats take n / kWidth registers and loads.
template <int n, bool kByLane = kMultipliesByLane>
struct Scalars {
  const float* data;
  TW_INLINE explicit Scalars(const float* p) : data(p) {}
  TW_INLINE Vec operator[](int i) const { return broadcast(data[i]); }
};
template <int n>
struct Scalars<n, true> {
  Vec lanes[(n + kWidth - 1) / kWidth];  // reads whole vectors
  TW_INLINE explicit Scalars(const float* p) {
    for (Vec& v : lanes) v = load(p), p += kWidth;
  }
  TW_INLINE Vec operator[](int i) const { return broadcast(lanes[i / kWidth][i % kWidth]); }
};

#ifndef TW_FMA_WORD
constexpr int kWordsInMemory = 0;
TW_INLINE Vec fma_word(const float* a, Vec b, Vec c) {
  return fma(broadcast(*a), b, c);
}
#endif

#ifndef TW_TERNARY_LOGIC
TW_INLINE VecI and_xor(VecI v, int32_t mask, int32_t flip) {
  return (v & mask) ^ flip;
}
#endif

TW_INLINE VecI as_int(Vec v) {
  return (VecI)v;
}
TW_INLINE Vec as_float(VecI v) {
  return (Vec)v;
}
TW_INLINE Vec to_float(VecI v) {
  return __builtin_convertvector(v, Vec);
}
TW_INLINE Vec select(VecI mask, Vec a, Vec b) {
  return mask ? a : b;
}
TW_INLINE Vec abs(Vec v) {
  return as_float(as_int(v) & 0x7fffffff);
}
TW_INLINE Vec copy_sign(Vec magnitude, Vec sign) {
  return as_float((as_int(magnitude) & 0x7fffffff) | (as_int(sign) & int32_t(0x80000000)));
}
// NaN in either operand gives NaN, as np.maximum does.
TW_INLINE Vec max(Vec a, Vec b) {
  return select((a > b) | (a != a), a, b);
}
TW_INLINE Vec min(Vec a, Vec b) {
  return select((a < b) | (a != a), a, b);
}

TW_INLINE Vec clamp(Vec v, float low, float high) {
  return at_least(at_most(v, high), low);
}

// The larger one; where either is NaN, b: one instruction.
TW_INLINE Vec larger(Vec a, Vec b) {
  return a > b ? a : b;
}

// a * b + c, rounded once on every level. Plain x86-64 has no instruction for it and calls the C
// library: a few ns an element.
TW_INLINE Vec fma_once(Vec a, Vec b, Vec c) {
#if defined(ISA_generic)
  Vec y;
  for (int i = 0; i < kWidth; ++i) y[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return y;
#else
  return fma(a, b, c);
#endif
}

// --- the 16-bit floats ---------------------------------------------------------------------------

typedef uint32_t VecU __attribute__((vector_size(kWidth * 4)));

// bfloat16 is the upper half of a float32.
TW_INLINE Vec widen_bf16(VecH h) {
  return (Vec)(__builtin_convertvector(h, VecU) << 16);
}
// Round to nearest even; NaN stays a quiet NaN.
TW_INLINE VecH narrow_bf16(Vec v) {
  const VecU bits = (VecU)v;
  const VecU rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const VecU nan = (bits >> 16) | 0x40;
  return __builtin_convertvector((VecU)(v != v ? (VecI)nan : (VecI)rounded), VecH);
}

// float16 where the level has no instructions for it; the same bits, NaN payloads included.
#ifndef TW_HALF_INSTRUCTIONS
TW_INLINE Vec widen_half(VecH h) {
  const VecI bits = (VecI) __builtin_convertvector(h, VecU), magnitude = bits & 0x7fff;
  const VecI normal = (magnitude << 13) + 0x38000000;
  const VecI subnormal = as_int(to_float(magnitude) * 0x1p-24f);
  const VecI special = magnitude << 13 | 0x7f800000 | ((magnitude > 0x7c00) & 0x00400000);
  const VecI found = magnitude < 0x0400 ? subnormal : (magnitude < 0x7c00 ? normal : special);
  return as_float(found | (bits & 0x8000) << 16);
}
TW_INLINE VecH narrow_half(Vec v) {
  const VecI bits = as_int(v), magnitude = bits & 0x7fffffff;
  const VecI even = (magnitude >> 13) & 1;
  const VecI normal = (magnitude - 0x38000000 + 0xfff + even) >> 13;
  // The unit of the last place of 0.5 is 2^-24, a half's smallest number: the sum is rounded there.
  const VecI subnormal = as_int(as_float(magnitude) + 0.5f) - 0x3f000000;
  const VecI nan = ((magnitude >> 13) & 0x3ff) | 0x7e00;
  const VecI finite = magnitude < 0x38800000 ? subnormal : normal;
  const VecI found = magnitude > 0x7f800000    ? nan
                     : magnitude >= 0x477ff000 ? 0x7c00 - VecI{}
                                               : finite;
  return __builtin_convertvector((VecU)(found | ((bits >> 16) & 0x8000)), VecH);
}
#endif

TW_INLINE Vec widen(VecH h, const Bf16*) {
  return widen_bf16(h);
}
TW_INLINE Vec widen(VecH h, const F16*) {
  return widen_half(h);
}
TW_INLINE VecH narrow(Vec v, const Bf16*) {
  return narrow_bf16(v);
}
TW_INLINE VecH narrow(Vec v, const F16*) {
  return narrow_half(v);
}

// v as it is after it was stored in this dtype.
TW_INLINE Vec rounded_to(DType t, Vec v) {
  return t == DType::bf16  ? widen_bf16(narrow_bf16(v))
         : t == DType::f16 ? widen_half(narrow_half(v))
                           : v;
}

// T: Bf16 or F16.
template <class T>
TW_INLINE Vec load(const T* p) {
  VecH h;
  memcpy(&h, p, sizeof h);
  return widen(h, p);
}
template <class T>
TW_INLINE void store(T* p, Vec v) {
  const VecH h = narrow(v, p);
  memcpy(p, &h, sizeof h);
}
template <class T>
TW_INLINE Vec load_partial(const T* p, int64_t n) {
  VecH h = {};
  memcpy(&h, p, size_t(n) * 2);
  return widen(h, p);
}
template <class T>
TW_INLINE void store_partial(T* p, Vec v, int64_t n) {
  const VecH h = narrow(v, p);
  memcpy(p, &h, size_t(n) * 2);
}

TW_INLINE float load_one(const float* p) {
  return *p;
}
template <class T>
TW_INLINE float load_one(const T* p) {
  return load_partial(p, 1)[0];
}
TW_INLINE void store_one(float* p, float x) {
  *p = x;
}
template <class T>
TW_INLINE void store_one(T* p, float x) {
  store_partial(p, broadcast(x), 1);
}

TW_INLINE VecI lane_numbers() {
  VecI lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  return lane;
}

// The first n lanes of v, `otherwise` in the rest.
TW_INLINE Vec keep_first(Vec v, int64_t n, float otherwise) {
  if (n == kWidth) return v;
  return select(lane_numbers() < int32_t(n), v, broadcast(otherwise));
}

TW_INLINE Vec load_n(const float* p, int64_t n) {
  return n == kWidth ? load(p) : load_partial(p, n);
}
TW_INLINE void store_n(float* p, Vec v, int64_t n) {
  n == kWidth ? store(p, v) : store_partial(p, v, n);
}

// --- reductions: halves are folded onto each other, always in this order -------------------------

TW_INLINE float reduce_add(Vec v) {
#pragma GCC unroll 4
  for (int half = kWidth / 2; half > 0; half /= 2) {
    v = v + __builtin_shuffle(v, lane_numbers() ^ half);
  }
  return v[0];
}
TW_INLINE float reduce_max(Vec v) {
#pragma GCC unroll 4
  for (int half = kWidth / 2; half > 0; half /= 2) {
    v = max(v, __builtin_shuffle(v, lane_numbers() ^ half));
  }
  return v[0];
}

// --- elementary functions ----------------------------------------------------------------------

// e^r on [-ln2/2, ln2/2]: 1 + r + r^2 P(r), a minimax fit (relative error 3e-9, Lawson's iteration on
// Chebyshev nodes).
TW_INLINE Vec exp_reduced(Vec r) {
  Vec p = broadcast(1.381454058e-03f);
  p = fma(p, r, broadcast(8.368745446e-03f));
  p = fma(p, r, broadcast(4.166838899e-02f));
  p = fma(p, r, broadcast(1.666652113e-01f));
  p = fma(p, r, broadcast(4.999999404e-01f));
  p = fma(p, r, broadcast(1.0f));
  return fma(p, r, broadcast(1.0f));
}

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2High = 0.693359375f;  // 9 bits: times an integer of 15 bits it is exact
constexpr float kLn2Low = -2.12194440e-4f;

// The integer nearest to a * b, |a * b| < 2^22.
TW_INLINE Vec round_product(Vec a, float b) {
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: the sum has no bits below 1
  return fma(a, broadcast(b), magic) - magic;
}

// x - n ln2, the product in two parts.
TW_INLINE Vec minus_ln2(Vec x, Vec n) {
  return fma(n, broadcast(-kLn2Low), fma(n, broadcast(-kLn2High), x));
}

// e^x = 2^n e^r, r = x - n ln2 in two parts (Cody & Waite). Within 0.9 ulp over the whole line (1.2
// without fused multiply-add), subnormal results included; e^-inf = 0, e^inf = inf, NaN stays NaN.
TW_INLINE Vec exp(Vec x) {
  const Vec clamped = clamp(x, -104.0f, 89.0f);
  const Vec n = round_product(clamped, kLog2E);
  return times_power_of_two(exp_reduced(minus_ln2(clamped, n)), n);
}

// The same for x <= 0, in fewer steps.
TW_INLINE Vec exp_down(Vec x) {
  const Vec bounded = at_least(x, -104.0f), n = round_product(bounded, kLog2E);
  return times_power_down(exp_reduced(minus_ln2(bounded, n)), n);
}

// e^x for x up to about 0, as of a difference with a maximum; exactly 0 below -87, before the result
// would be subnormal: 2^n is then one shift, and no lane takes the hundred cycles of a subnormal.
TW_INLINE Vec exp_to_zero(Vec x) {
  const Vec magic = broadcast(12582912.0f + 127.0f);  // below 2^24: the sum rounds to an integer
  const Vec biased = fma(x, broadcast(kLog2E), magic);
  const Vec power = as_float(as_int(biased) << 23);  // of n, and nothing else of it
  return select(x < -87.0f, Vec{}, exp_reduced(minus_ln2(x, biased - magic)) * power);
}

}  // namespace
}  // namespace tilewright::ISA
