// What a level provides for dropout, and the rule that says which elements are kept.
#pragma once
#include <stdint.h>

namespace tilewright {

// Element n is kept where its word of Philox4x32-10 (simd/philox.h) is at least `threshold`.
struct DropoutRule {
  uint64_t seed = 0;       // the generator's key
  uint32_t threshold = 0;  // round(p * 2^32)
  float scale = 1.0f;      // of what is kept: 1 / (1 - p); 0 where nothing is (p = 1)
};

struct DropoutKernels {
  // y = x * scale where element first + i is kept, else 0. In place where the pointers are equal.
  void (*apply)(const DropoutRule& rule, uint64_t first, const float* x, float* y,
                int64_t n) = nullptr;
};

}  // namespace tilewright
