// The activations and their derivatives: used by the GEMM epilogue and by the elementwise kernels.
//
// tanh and the normal distribution are here by long polynomials; levels that look up have them from
// activation_tables.h, but for gelu's far tail.
//
// Errors in ulp of the exact result, over every float32 (tests/cpp/test_accuracy.cc): tanh 1.5; sigmoid 3; gelu 6.5 (9 without fused multiply-add) and silu 4, the negative tails
// included, but that a subnormal e^-|x| has an absolute error; gelu_tanh 4.5 (5) for x > -1 and
// 4.5 + 3.5 |2u| (5 + 4.5 |2u|) below, as e^2u takes up the roundings of 2u. The slopes of tanh and
// sigmoid 5.5; the other derivatives 4 * 2^-24, absolute.
#pragma once
#include "simd/vec.h"
#include "tilewright/ops.h"
#if defined(TW_LOOK_UP)
#include "simd/activation_tables.h"
#endif

namespace tilewright::ISA {
namespace {

// --- the normal distribution ---------------------------------------------------------------------

// 2^f on [-1/2, 1/2]: a minimax fit (relative error 2e-9, Lawson's iteration as below).
TW_INLINE Vec exp2_reduced(Vec f) {
  Vec p = broadcast(1.535336196e-04f);
  p = fma(p, f, broadcast(1.339887502e-03f));
  p = fma(p, f, broadcast(9.618436918e-03f));
  p = fma(p, f, broadcast(5.550332367e-02f));
  p = fma(p, f, broadcast(2.402264774e-01f));
  p = fma(p, f, broadcast(6.931471825e-01f));
  return fma(p, f, broadcast(1.0f));
}

// y * e^(-a^2 / 2), |a| <= 15: 2^t with t = -a^2 log2(e) / 2. An error of t is one of the result, so
// its first factor is a sum of two, and what is left of their product beside an integer is rounded once.
TW_INLINE Vec times_gaussian(Vec y, Vec a) {
  constexpr float kHigh = -7.213475108e-01f, kLow = -9.629815168e-09f;  // -log2(e) / 2
  const Vec high = a * kHigh;
  const Vec low = fma(a, broadcast(kLow), product_error(a, broadcast(kHigh), high));
  const Vec n = fma(a, high, broadcast(12582912.0f)) - 12582912.0f;  // 1.5 * 2^23: an integer
  return times_power_down(y * exp2_reduced(fma(a, low, product_minus(a, high, n))), n);
}

// Phi(-a) e^(a^2 / 2) for 0 <= a <= 15: P(a) / Q(a), degrees 4 and 5, a minimax fit (relative error
// 6e-9; Lawson's iteration on Chebyshev nodes of (a - 2.5) / (a + 2.5)). All coefficients are
// positive: nothing cancels.
TW_INLINE Vec mills_ratio(Vec a) {
  Vec p = broadcast(4.153257236e-03f);
  p = fma(p, a, broadcast(4.088130966e-02f));
  p = fma(p, a, broadcast(1.839696616e-01f));
  p = fma(p, a, broadcast(4.392841160e-01f));
  p = fma(p, a, broadcast(5.000000000e-01f));
  Vec q = broadcast(1.041056029e-02f);
  q = fma(q, a, broadcast(1.024803594e-01f));
  q = fma(q, a, broadcast(4.714100957e-01f));
  q = fma(q, a, broadcast(1.205550432e+00f));
  q = fma(q, a, broadcast(1.676453233e+00f));
  return p / fma(q, a, broadcast(1.0f));
}

constexpr float kGaussianEnd = 14.9f;  // Phi(-a) and its products are 0 in float32

// --- forward -------------------------------------------------------------------------------------

TW_INLINE Vec relu(Vec x) {
  return at_least(x, 0.0f);
}

// x * Phi(x), Phi the normal distribution function (Hendrycks & Gimpel 2016). Phi(-|x|) is what is
// computed, so that nothing cancels in the negative tail.
TW_INLINE Vec gelu_anywhere(Vec x) {
  const Vec a = at_most(abs(x), kGaussianEnd), tail = times_gaussian(a * mills_ratio(a), a);
  const Vec step = as_float(~(as_int(x) >> 31) & 0x3f800000);  // 1, or 0 where the sign is set
  return fma(x, step, -tail);                                  // NaN of -inf * 0, as the formula is
}
TW_INLINE Vec gelu(Vec x) {
#if defined(TW_LOOK_UP)
  const Vec near = relu(x) - gelu_tail(x);
  if (__builtin_expect(any_below(x, -kFar), false))
    return select(x < -kFar, gelu_anywhere(x), near);
  return near;
#else
  return gelu_anywhere(x);
#endif
}

// e^-|x| and 1 / (1 + e^-|x|): both of sigmoid(x) and 1 - sigmoid(x), without overflow or
// cancellation.
struct Logistic {
  Vec e, larger;
};
TW_INLINE Logistic logistic(Vec x) {
  const Vec e = exp_down(-abs(x));
  return {e, quotient(broadcast(1.0f), 1.0f + e)};
}
TW_INLINE Vec sigmoid(Vec x) {
  const Logistic l = logistic(x);
  return x < 0.0f ? l.e * l.larger : l.larger;
}

#if !defined(TW_LOOK_UP)
// Near 0 the odd polynomial of Cephes, beyond it 1 - 2 e / (1 + e), e = e^-2|x|: nothing cancels.
TW_INLINE Vec tanh(Vec x) {
  const Vec a = abs(x), z = a * a;
  Vec p = broadcast(-5.70498872745e-3f);
  p = fma(p, z, broadcast(2.06390887954e-2f));
  p = fma(p, z, broadcast(-5.37397155531e-2f));
  p = fma(p, z, broadcast(1.33314422036e-1f));
  p = fma(p, z, broadcast(-3.33332819422e-1f));
  const Logistic l = logistic(2.0f * a);
  return copy_sign(a < 0.625f ? fma(p * z, a, a) : 1.0f - 2.0f * (l.e * l.larger), x);
}
#endif

// The tanh form of the same paper, section 2: 0.5 x (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x
// + 0.044715 x^3).
constexpr float kTwoRootTwoByPi = 1.59576912f;
constexpr float kCubic = 0.044715f;
TW_INLINE Vec twice_u(Vec x) {
  return kTwoRootTwoByPi * (x * fma(x * x, broadcast(kCubic), broadcast(1.0f)));
}
TW_INLINE Vec gelu_tanh(Vec x) {
  return x * sigmoid(twice_u(x));
}

TW_INLINE Vec silu(Vec x) {
  return x * sigmoid(x);
}

TW_INLINE Vec activate(Activation kind, Vec x) {
  switch (kind) {
    case Activation::relu:
      return relu(x);
    case Activation::gelu:
      return gelu(x);
    case Activation::gelu_tanh:
      return gelu_tanh(x);
    case Activation::silu:
      return silu(x);
    case Activation::tanh:
      return tanh(x);
    case Activation::sigmoid:
      return sigmoid(x);
    default:
      return x;
  }
}

// --- backward: the derivative at x ---------------------------------------------------------------

TW_INLINE Vec relu_slope(Vec x) {
  return x > 0.0f ? broadcast(1.0f) : Vec{};
}

#if !defined(TW_LOOK_UP)
// At -a: Phi(-a) - a phi(a), one Gaussian for both.
TW_INLINE Vec gelu_slope_tail(Vec a) {
  const Vec bounded = at_most(a, kGaussianEnd), gaussian = times_gaussian(broadcast(1.0f), bounded);
  return gaussian * fma(bounded, broadcast(-0.39894228f), mills_ratio(bounded));
}
#endif
TW_INLINE Vec gelu_slope(Vec x) {
  const Vec tail = gelu_slope_tail(abs(x));
  return x > 0.0f ? 1.0f - tail : tail;
}

// s + x s (1 - s) (2u)', where (2u)' = 2 sqrt(2/pi) (1 + 3 * 0.044715 x^2).
TW_INLINE Vec gelu_tanh_slope(Vec x) {
  const Vec z = twice_u(x);
  const Logistic l = logistic(z);
  const Vec small = l.e * l.larger;
  const Vec s = z < 0.0f ? small : l.larger;
  const Vec steep = kTwoRootTwoByPi * x * fma(x * x, broadcast(3.0f * kCubic), broadcast(1.0f));
  return fma(steep * small, l.larger, s);
}

// s (1 - s)
TW_INLINE Vec sigmoid_slope(Vec x) {
  const Logistic l = logistic(x);
  return l.e * l.larger * l.larger;
}

// 1 - tanh(x)^2 = 4 s (1 - s), s = sigmoid(2x).
TW_INLINE Vec tanh_slope(Vec x) {
  return 4.0f * sigmoid_slope(2.0f * x);
}

// s + x s (1 - s)
TW_INLINE Vec silu_slope(Vec x) {
  const Logistic l = logistic(x);
  const Vec small = l.e * l.larger;
  const Vec s = x < 0.0f ? small : l.larger;
  return fma(x * small, l.larger, s);
}

TW_INLINE Vec slope(Activation kind, Vec x) {
  switch (kind) {
    case Activation::relu:
      return relu_slope(x);
    case Activation::gelu:
      return gelu_slope(x);
    case Activation::gelu_tanh:
      return gelu_tanh_slope(x);
    case Activation::silu:
      return silu_slope(x);
    case Activation::tanh:
      return tanh_slope(x);
    case Activation::sigmoid:
      return sigmoid_slope(x);
    default:
      return broadcast(1.0f);
  }
}

}  // namespace
}  // namespace tilewright::ISA
