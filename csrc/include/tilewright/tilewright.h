// Everything that a program needs, in one include:
//
//     std::vector<float> x(4 * 768), y(4 * 768);
//     tilewright::LayernormForward op;
//     op.x = tilewright::view_of(x.data(), {4, 768});
//     op.y = tilewright::view_of(y.data(), {4, 768});
//     tilewright::run(op);
//
// The caller owns all memory; an op reads its views and writes the outputs it was given. Ops may be
// called from any thread, several at once.
#pragma once
#include <initializer_list>
#include <type_traits>

#include "tilewright/errors.h"
#include "tilewright/kvcache.h"
#include "tilewright/ops.h"
#include "tilewright/options.h"
#include "tilewright/pack.h"
#include "tilewright/runtime.h"
#include "tilewright/stats.h"
#include "tilewright/view.h"

namespace tilewright {

// The dtype of a C++ type; bfloat16 and float16 have none here: name it, and pass uint16_t.
template <class T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, float>) return DType::f32;
  if constexpr (std::is_same_v<T, int8_t>) return DType::s8;
  if constexpr (std::is_same_v<T, uint8_t>) return DType::u8;
  if constexpr (std::is_same_v<T, int32_t>) return DType::s32;
  if constexpr (std::is_same_v<T, int64_t>) return DType::s64;
  if constexpr (std::is_same_v<T, bool>) return DType::boolean;
  return DType::other;
}

// A C-contiguous array of at most kMaxRank axes; read-only from a pointer to const. Strides, for
// another layout, are the fields View::stride.
template <class T>
View view_of(T* data, std::initializer_list<int64_t> shape,
             DType dtype = dtype_of<std::remove_const_t<T>>()) {
  View v;
  v.data = const_cast<std::remove_const_t<T>*>(data);
  v.dtype = dtype;
  v.present = true;
  v.writable = !std::is_const_v<T>;
  for (const int64_t extent : shape) {
    if (v.rank == kMaxRank) throw ShapeError("view_of: shape must have at most 8 axes");
    v.shape[v.rank++] = extent;
  }
  int64_t stride = 1;
  for (int d = v.rank - 1; d >= 0; --d) {
    v.stride[d] = stride;
    stride *= v.shape[d];
  }
  return v;
}

}  // namespace tilewright
