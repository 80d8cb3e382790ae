// Compiled once for each level, with ISA naming it; see CMakeLists.txt.
#include "simd_functions.h"

#include "simd/activation.h"
#include "simd/philox.h"

#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)

namespace tilewright::ISA {
namespace {

template <class F>
TW_INLINE void map_all(const float* x, float* y, int64_t n, const F& f) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t count = n - i < kWidth ? n - i : kWidth;
    store_n(y + i, f(load_n(x + i, count)), count);
  }
}

void exp_all(const float* x, float* y, int64_t n) {
  map_all(x, y, n, [](Vec v) { return exp(v); });
}

void activate_all(Activation f, const float* x, float* y, int64_t n) {
  map_all(x, y, n, [f](Vec v) { return activate(f, v); });
}

void slope_all(Activation f, const float* x, float* y, int64_t n) {
  map_all(x, y, n, [f](Vec v) { return slope(f, v); });
}

void philox_block(uint32_t* block, uint64_t seed) {
  VecU words[kPhilox];
  for (VecU& w : words) w = repeat4(block[0], block[1], block[2], block[3]);
  philox(words, seed);
  memcpy(block, &words[0], 16);
}

void all_philox_words(uint64_t seed, uint64_t first, int64_t n, uint32_t* words) {
  philox_words(seed, first, n, words);
}

}  // namespace

SimdFunctions test_functions() {
  return {TEXT(ISA), exp_all, activate_all, slope_all, philox_block, all_philox_words};
}

}  // namespace tilewright::ISA
