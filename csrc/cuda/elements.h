// One element, or four neighbours, of any float dtype that is known at run time.
#pragma once
#include "cuda/array.h"
#include "cuda/gpu/gpu.h"
#include "tilewright/view.h"

namespace tilewright::cuda {

// f(pointer to elements) for the elements' own type; every thread of a launch takes the same one.
template <class F>
__device__ inline auto with_elements(DType t, const void* data, const F& f) {
  switch (t) {
    case DType::bf16:
      return f(static_cast<const __nv_bfloat16*>(data));
    case DType::f16:
      return f(static_cast<const __half*>(data));
    default:
      return f(static_cast<const float*>(data));
  }
}

__device__ inline float get_float(const void* data, std::int64_t i, DType t) {
  return with_elements(t, data, [i](const auto* p) { return to_float(p[i]); });
}

// Four neighbours as one access, aligned to its size.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T x[4];
};

__device__ inline void get_four(const void* data, std::int64_t i, DType t, float (&x)[4]) {
  with_elements(t, data, [&]<class T>(const T* p) {
    const auto four = gpu::load<Four<T>>(p + i);
    for (int e = 0; e < 4; ++e) x[e] = to_float(four.x[e]);
  });
}

__device__ inline void put_float(void* data, std::int64_t i, DType t, float x) {
  with_elements(t, data, [&]<class T>(const T* p) { round_to(const_cast<T*>(p)[i], x); });
}

__device__ inline void put_four(void* data, std::int64_t i, DType t, const float (&x)[4]) {
  with_elements(t, data, [&]<class T>(const T* p) {
    Four<T> four;
    for (int e = 0; e < 4; ++e) round_to(four.x[e], x[e]);
    gpu::store(const_cast<T*>(p) + i, four);
  });
}

// NaN in either operand gives NaN, which fmaxf and fminf would pass over.
__device__ inline float larger(float a, float b) {
  return a > b || a != a ? a : b;
}
__device__ inline float smaller(float a, float b) {
  return a < b || a != a ? a : b;
}

}  // namespace tilewright::cuda
