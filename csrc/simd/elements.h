// Elements of a strided matrix of any float dtype as vectors: what a GEMM's epilogue reads and
// writes.
#pragma once
#include "cpu/kernels_gemm.h"
#include "simd/vec.h"

namespace tilewright::ISA {
namespace {

template <class T>
TW_INLINE Vec load_strided(const T* p, int64_t stride, int n) {
  if (stride == 1) return n == kWidth ? load(p) : load_partial(p, n);
  Vec v = {};
  for (int i = 0; i < n; ++i) v[i] = load_one(p + i * stride);
  return v;
}

template <class T>
TW_INLINE void store_strided(T* p, int64_t stride, int n, Vec v) {
  if (stride == 1) return n == kWidth ? store(p, v) : store_partial(p, v, n);
  for (int i = 0; i < n; ++i) store_one(p + i * stride, v[i]);
}

// f(pointer to the first element) for the elements' own type: one body for all float dtypes.
template <class F>
TW_INLINE auto with_type(const Matrix& m, const F& f) {
  void* data = const_cast<void*>(m.data);
  switch (m.dtype) {
    case DType::bf16:
      return f(static_cast<Bf16*>(data));
    case DType::f16:
      return f(static_cast<F16*>(data));
    default:
      return f(static_cast<float*>(data));
  }
}

// Elements (i, j) … (i, j + n), n <= kWidth.
TW_INLINE Vec load_elements(const Matrix& m, int64_t i, int64_t j, int n) {
  const int64_t at = i * m.row + j * m.col;
  return with_type(m, [&](const auto* p) { return load_strided(p + at, m.col, n); });
}

TW_INLINE void store_elements(const Matrix& m, int64_t i, int64_t j, int n, Vec v) {
  const int64_t at = i * m.row + j * m.col;
  with_type(m, [&](auto* p) { store_strided(p + at, m.col, n, v); });
}

}  // namespace
}  // namespace tilewright::ISA
