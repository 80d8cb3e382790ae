// The limits of a level, as loops that do nothing else: what a kernel's share of the roofline is
// measured against.
#pragma once
#include <stdint.h>

namespace tilewright {

struct RooflineKernels {
  // `steps` rounds of independent fused multiply-adds on registers alone; one number of the result,
  // so that none is dropped.
  float (*multiply_add)(int64_t steps) = nullptr;
  int64_t flops_per_step = 0;
  // The same for products of int8 pairs summed into int32.
  float (*multiply_add_int8)(int64_t steps) = nullptr;
  int64_t int8_ops_per_step = 0;
  // Products of bfloat16 summed into float32; absent without instructions for them.
  float (*multiply_add_bf16)(int64_t steps) = nullptr;
  int64_t bf16_flops_per_step = 0;
  // Read `count` floats once, front to back, and copy them; by stores past the caches.
  float (*read)(const float* p, int64_t count) = nullptr;
  void (*copy)(const float* from, float* to, int64_t count) = nullptr;
  void (*copy_streaming)(const float* from, float* to, int64_t count) = nullptr;
};

}  // namespace tilewright
