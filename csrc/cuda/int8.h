// What the integer kernels share with their launchers (qgemm.cu).
#pragma once
#include "cuda/gpu/stream.h"
#include "cuda/product.h"
#include "cuda/weights.h"

namespace tilewright::cuda {

// A number for each row of each matrix of a, from () or (M,), or from one for every row.
struct RowNumbers {
  const float* data = nullptr;
  std::int64_t stride = 0, period = 1;

  __device__ float at(std::int64_t row) const { return data[row % period * stride]; }
};

// An integer product, and the scales that make its sums floats; out is int32 where there are none.
struct ScaledProduct {
  Product p;
  bool a_signed = true, b_signed = true;
  bool grouped = false;                // more than one scale a column and nothing else
  std::int64_t group = 1, groups = 0;  // neighbours along K that share a scale, how many there are
  RowNumbers scale_a, offset_a;        // offset_a: without data where there is none
  Scales scale_b, offset_b;
  const float* column_sums = nullptr;  // (N,) of the b that is represented, with offset_a
};

// b as p has it; or nibbles.
void int8_mma(const ScaledProduct& q);
void int8_mma(const ScaledProduct& q, const Weights& nibbles);

// data (rows, K) int8, dense, and a scale for each row: quantize.cu.
void quantize_rows(const View& x, std::int8_t* data, float* scale);

}  // namespace tilewright::cuda
