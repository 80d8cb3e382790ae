// The integers of symmetric and offset quantization, with the bits of the CPU (csrc/simd/quantize.cc):
// IEEE division, rounding to the nearest even, NaN stays NaN in a scale.
#pragma once
#include "cuda/elements.h"

namespace tilewright::cuda {

__device__ inline float scale_of(float range, float levels) {
  const float scale = range / levels;
  return scale == 0.0f ? 1.0f : scale;
}

// x / scale may be infinite where the scale is subnormal, and is clamped; a scale that is not finite
// gives 0.
__device__ inline int round_to_level(float x, float scale, float low, float high) {
  if (scale - scale != 0.0f) return 0;
  return __float2int_rn(smaller(larger(x / scale, low), high));
}

}  // namespace tilewright::cuda
