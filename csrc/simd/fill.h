// fill(y, n, f): an array from a function of the place, in place too where f reads at most what it
// is asked for.
//
// Parameter   bounded by
// kTogether   below: the queues of waiting instructions, which hold two or three long chains of f;
//             above: registers
#pragma once
#include "simd/vec.h"

namespace tilewright::ISA {
namespace {

constexpr int kTogether = 4;

// y[i, i + n) = f(i, n) for vectors of n = kWidth elements and a last one of fewer. kTogether of them
// come before the first is stored: the compiler mixes their instructions, where it is told to
// (-fschedule-insns in CMakeLists.txt), or each would wait for the one before it. past_caches: to
// memory, where y is aligned to vectors.
template <class F>
TW_INLINE void fill(float* y, int64_t n, const F& f, bool past_caches = false) {
  int64_t i = 0;
  const auto fill_groups = [&](const auto& put) {
    for (; i + kTogether * kWidth <= n; i += kTogether * kWidth) {
      Vec v[kTogether];
#pragma GCC unroll 4
      for (int u = 0; u < kTogether; ++u) v[u] = f(i + u * kWidth, kWidth);
#pragma GCC unroll 4
      for (int u = 0; u < kTogether; ++u) put(y + i + u * kWidth, v[u]);
    }
  };
  if (past_caches && uintptr_t(y) % sizeof(Vec) == 0) {
    fill_groups([](float* to, Vec v) { store_streaming(to, v); });
    end_streaming();
  } else {
    fill_groups([](float* to, Vec v) { store(to, v); });
  }
  for (; i + kWidth <= n; i += kWidth) store(y + i, f(i, kWidth));
  if (i < n) store_partial(y + i, f(i, n - i), n - i);
}

}  // namespace
}  // namespace tilewright::ISA
