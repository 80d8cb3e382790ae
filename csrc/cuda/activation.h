// The activations of csrc/simd/activation.h for one float: its formulas, constants and error bounds,
// step by step. The bits are those of the CPU's levels that fuse multiply-adds.
#pragma once
#include "cuda/gpu/gpu.h"
#include "tilewright/ops.h"

namespace tilewright::cuda {

constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer

// x * 2^n, |n| <= 252 an integer, in two halves: only the second may leave the normal range.
__device__ inline float times_power_of_two(float x, float n) {
  const int whole = static_cast<int>(n), half = whole >> 1;
  return x * __int_as_float((half + 127) << 23) * __int_as_float((whole - half + 127) << 23);
}

// Between low and high; NaN stays NaN.
__device__ inline float clamped(float x, float low, float high) {
  const float lower = x > high ? high : x;
  return lower < low ? low : lower;
}

// e^x = 2^n e^r, r = x - n ln 2 in two parts (Cody & Waite), e^r by the polynomial of Cephes.
__device__ inline float exp_exact(float x) {
  const float c = clamped(x, -104.0f, 89.0f);
  const float n = fmaf(c, 1.44269504f, kMagic) - kMagic;
  const float r = fmaf(n, 2.12194440e-4f, fmaf(n, -0.693359375f, c));
  float p = 1.9875691500e-4f;
  p = fmaf(p, r, 1.3981999507e-3f);
  p = fmaf(p, r, 8.3334519073e-3f);
  p = fmaf(p, r, 4.1665795894e-2f);
  p = fmaf(p, r, 1.6666665459e-1f);
  p = fmaf(p, r, 5.0000001201e-1f);
  return times_power_of_two(fmaf(p, r * r, r) + 1.0f, n);
}

// y * e^(-a^2 / 2), |a| <= 15.
__device__ inline float times_gaussian(float y, float a) {
  constexpr float kHigh = -7.213475108e-01f, kLow = -9.629815168e-09f;  // -log2(e) / 2
  const float square = a * a, t = square * kHigh;
  const float n = (t + kMagic) - kMagic;
  float f = fmaf(square, kHigh, -t);
  f = fmaf(fmaf(a, a, -square), kHigh, f);
  f = fmaf(square, kLow, f) + (t - n);
  float p = 1.535336196e-04f;
  p = fmaf(p, f, 1.339887502e-03f);
  p = fmaf(p, f, 9.618436918e-03f);
  p = fmaf(p, f, 5.550332367e-02f);
  p = fmaf(p, f, 2.402264774e-01f);
  p = fmaf(p, f, 6.931471825e-01f);
  return times_power_of_two(y * fmaf(p, f, 1.0f), n);
}

// Phi(-a) e^(a^2 / 2) for 0 <= a <= 15.
__device__ inline float mills_ratio(float a) {
  float p = 4.153257236e-03f;
  p = fmaf(p, a, 4.088130966e-02f);
  p = fmaf(p, a, 1.839696616e-01f);
  p = fmaf(p, a, 4.392841160e-01f);
  p = fmaf(p, a, 5.000000000e-01f);
  float q = 1.041056029e-02f;
  q = fmaf(q, a, 1.024803594e-01f);
  q = fmaf(q, a, 4.714100957e-01f);
  q = fmaf(q, a, 1.205550432e+00f);
  q = fmaf(q, a, 1.676453233e+00f);
  return p / fmaf(q, a, 1.0f);
}

__device__ inline float gelu(float x) {
  const float magnitude = fabsf(x), a = magnitude > 15.0f ? 15.0f : magnitude;
  const float tail = times_gaussian((x > 0.0f ? a : x) * mills_ratio(a), a);
  return x > 0.0f ? x - tail : x < -15.0f ? 0.0f * x : tail;
}

__device__ inline float sigmoid(float x) {
  const float e = exp_exact(-fabsf(x)), larger = 1.0f / (1.0f + e);
  return x < 0.0f ? e * larger : larger;
}

__device__ inline float tanh_exact(float x) {
  const float a = fabsf(x), z = a * a;
  float p = -5.70498872745e-3f;
  p = fmaf(p, z, 2.06390887954e-2f);
  p = fmaf(p, z, -5.37397155531e-2f);
  p = fmaf(p, z, 1.33314422036e-1f);
  p = fmaf(p, z, -3.33332819422e-1f);
  const float e = exp_exact(-2.0f * a), larger = 1.0f / (1.0f + e);
  return copysignf(a < 0.625f ? fmaf(p * z, a, a) : 1.0f - 2.0f * (e * larger), x);
}

__device__ inline float gelu_tanh(float x) {
  return x * sigmoid(1.59576912f * (x * fmaf(x * x, 0.044715f, 1.0f)));
}

__device__ inline float activate(Activation kind, float x) {
  switch (kind) {
    case Activation::relu:
      return x > 0.0f || x != x ? x : 0.0f;
    case Activation::gelu:
      return gelu(x);
    case Activation::gelu_tanh:
      return gelu_tanh(x);
    case Activation::silu:
      return x * sigmoid(x);
    case Activation::tanh:
      return tanh_exact(x);
    case Activation::sigmoid:
      return sigmoid(x);
    default:
      return x;
  }
}

}  // namespace tilewright::cuda
