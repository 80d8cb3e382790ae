// Intermediate results of an op, and how many rows of them a sum over rows has (sum_rows.cu).
#pragma once
#include "cuda/gpu/stream.h"
#include "tilewright/view.h"

namespace tilewright::cuda {

constexpr std::int64_t kSumHeight = 64;  // rows that are added by one thread

inline std::int64_t sum_blocks_of(std::int64_t rows) {
  return (rows + kSumHeight - 1) / kSumHeight;
}

// (rows, C) float32, contiguous, for one call.
class Matrix {
 public:
  Matrix(std::int64_t rows, std::int64_t C)
      : room_(static_cast<std::size_t>(rows * C) * sizeof(float)) {
    view_.data = room_.as<void>();
    view_.dtype = DType::f32;
    view_.present = view_.writable = true;
    view_.device = Device::gpu;
    view_.rank = 2;
    view_.shape[0] = rows, view_.shape[1] = C;
    view_.stride[0] = C, view_.stride[1] = 1;
  }

  const View& view() const { return view_; }
  float* data() const { return room_.as<float>(); }

 private:
  gpu::Workspace room_;
  View view_;
};

}  // namespace tilewright::cuda
