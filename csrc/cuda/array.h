// A view as kernels get it: any strides, any float dtype, its axes merged as far as memory allows, so
// that the usual, contiguous array costs one multiplication an index.
//
// A kernel is a template on Element: the dtype that all of its arrays share, which costs nothing, or
// Mixed, where each load and store asks the array's own dtype (the same branch for a whole warp).
#pragma once
#include "cuda/gpu/gpu.h"
#include "tilewright/view.h"

namespace tilewright::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;  // of a warp, in shuffles

// --- elements: 16-bit floats are storage, arithmetic is float32, stores round to the nearest even

struct Mixed {};  // Element of a kernel whose arrays differ in dtype

__device__ inline float to_float(float x) {
  return x;
}
__device__ inline float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ inline float to_float(__half x) {
  return __half2float(x);
}
__device__ inline void round_to(float& y, float x) {
  y = x;
}
// By gpu::store: -fsanitize=thread does not see what a call returns straight into memory.
__device__ inline void round_to(__nv_bfloat16& y, float x) {
  gpu::store(&y, __float2bfloat16_rn(x));
}
__device__ inline void round_to(__half& y, float x) {
  gpu::store(&y, __float2half_rn(x));
}

// --- arrays

struct Array {
  void* data = nullptr;  // of an absent view: nothing to read or write
  DType dtype = DType::other;
  int axes = 0;
  std::int64_t shape[kMaxRank], stride[kMaxRank];

  __host__ __device__ explicit operator bool() const { return data != nullptr; }

  // Of element i in row-major order.
  __device__ std::int64_t offset(std::int64_t i) const {
    std::int64_t at = 0;
    for (int d = axes - 1; d > 0; --d) {
      at += i % shape[d] * stride[d];
      i /= shape[d];
    }
    return axes > 0 ? at + i * stride[0] : 0;
  }

  template <class Element>
  __device__ float load(std::int64_t at) const {
    if constexpr (std::is_same_v<Element, Mixed>) {
      if (dtype == DType::bf16) return to_float(static_cast<const __nv_bfloat16*>(data)[at]);
      if (dtype == DType::f16) return to_float(static_cast<const __half*>(data)[at]);
      return static_cast<const float*>(data)[at];
    } else {
      return to_float(static_cast<const Element*>(data)[at]);
    }
  }

  template <class Element>
  __device__ void store(std::int64_t at, float value) const {
    if constexpr (std::is_same_v<Element, Mixed>) {
      if (dtype == DType::bf16) {
        round_to(static_cast<__nv_bfloat16*>(data)[at], value);
      } else if (dtype == DType::f16) {
        round_to(static_cast<__half*>(data)[at], value);
      } else {
        static_cast<float*>(data)[at] = value;
      }
    } else {
      round_to(static_cast<Element*>(data)[at], value);
    }
  }
};

// The first `axes` axes of a view.
inline Array array_of(const View& v, int axes) {
  Array a;
  if (!v) return a;
  a.data = v.data;
  a.dtype = v.dtype;
  for (int d = 0; d < axes; ++d) {
    if (v.shape[d] == 1 && axes > 1) continue;
    if (a.axes > 0 && a.stride[a.axes - 1] == v.shape[d] * v.stride[d]) {
      a.shape[a.axes - 1] *= v.shape[d];
      a.stride[a.axes - 1] = v.stride[d];
    } else {
      a.shape[a.axes] = v.shape[d];
      a.stride[a.axes++] = v.stride[d];
    }
  }
  return a;
}
inline Array array_of(const View& v) {
  return array_of(v, v.rank);
}

// (..., C) as rows: element c of row r is at row(r) + c * step.
struct Rows : Array {
  std::int64_t step = 1;

  __device__ std::int64_t row(std::int64_t r) const { return offset(r); }
};

inline Rows rows_of(const View& v) {
  if (!v) return {};
  return {array_of(v, v.rank - 1), v.stride[v.rank - 1]};
}

inline std::int64_t row_count(const View& v) {
  return v.last() > 0 ? v.size() / v.last() : 0;
}

// --- launching

// f(Element()) with the dtype that all present arrays share, or Mixed.
template <class F>
void with_element(std::initializer_list<const View*> views, const F& f) {
  DType shared = DType::other;
  bool same = true;
  for (const View* v : views) {
    if (!*v) continue;
    if (shared == DType::other) shared = v->dtype;
    same = same && v->dtype == shared;
  }
  if (!same) return f(Mixed());
  if (shared == DType::bf16) return f(__nv_bfloat16());
  if (shared == DType::f16) return f(__half());
  return f(float());
}

inline unsigned blocks_for(std::int64_t work, std::int64_t each) {
  return static_cast<unsigned>((work + each - 1) / each);
}

}  // namespace tilewright::cuda
