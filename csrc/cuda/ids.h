// Integer arguments that name a row or a class, as kernels read them. The host never does: an id that
// names none is not an error here, but leaves NaN in its own results.
#pragma once
#include "cuda/array.h"

namespace tilewright::cuda {

__device__ inline std::int64_t load_id(const Array& ids, std::int64_t at) {
  if (ids.dtype == DType::s32) return static_cast<const std::int32_t*>(ids.data)[at];
  return static_cast<const std::int64_t*>(ids.data)[at];
}

__device__ inline bool names(std::int64_t id, std::int64_t count) {
  return id >= 0 && id < count;
}

}  // namespace tilewright::cuda
