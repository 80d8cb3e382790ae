// Functions of csrc/simd that no kernel exposes as they are, compiled for each level like the
// kernels themselves. Nothing with inline functions may be included here.
#pragma once
#include <stdint.h>

#include "tilewright/ops.h"

struct SimdFunctions {
  const char* isa;
  // y (n,) = e^x, f(x), f'(x): the vector functions of simd/vec.h and simd/activation.h
  void (*exp)(const float* x, float* y, int64_t n);
  void (*activate)(tilewright::Activation f, const float* x, float* y, int64_t n);
  void (*slope)(tilewright::Activation f, const float* x, float* y, int64_t n);
  // block (4,) -> words (4,), in place: Philox4x32-10 of any counter
  void (*philox_block)(uint32_t* block, uint64_t seed);
  // words (n,) of elements first, first + 1, …
  void (*philox_words)(uint64_t seed, uint64_t first, int64_t n, uint32_t* words);
};

#define DECLARE_LEVEL(level)      \
  namespace tilewright::level {   \
  SimdFunctions test_functions(); \
  }
DECLARE_LEVEL(generic)
DECLARE_LEVEL(avx2)
DECLARE_LEVEL(avx512)
DECLARE_LEVEL(neon)
#undef DECLARE_LEVEL
