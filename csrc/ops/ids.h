// Integer arguments that must name a row or a class: checked while they are read.
#pragma once
#include "core/check.h"
#include "core/parallel.h"
#include "tilewright/view.h"

namespace tilewright {

// to (v.size(),) = v in row-major order. An id that is neither in [0, count) nor `ignored` throws
// ShapeError naming it; `ignored` is stored as -1. `range` completes "must be in [0, count), ...".
inline void read_ids(const Check& check, const char* arg, const View& v, int64_t count,
                     const char* range, const int64_t* ignored, int64_t* to) {
  const int64_t n = v.size();
  int64_t index[kMaxRank] = {};
  int64_t at = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (i % 65536 == 65535) poll_after(1e5);
    const int64_t id = v.dtype == DType::s32 ? v.ptr<int32_t>()[at] : v.ptr<int64_t>()[at];
    to[i] = id;
    if (ignored && id == *ignored) {
      to[i] = -1;
    } else if (id < 0 || id >= count) {
      check.shape_error(std::string(arg) + " must be in [0, " + std::to_string(count) + "), " +
                        range + ", got " + std::to_string(id) + " at " +
                        format_shape(index, v.rank));
    }
    for (int d = v.rank - 1; d >= 0; --d) {
      at += v.stride[d];
      if (++index[d] < v.shape[d]) break;
      at -= index[d] * v.stride[d];
      index[d] = 0;
    }
  }
}

}  // namespace tilewright
