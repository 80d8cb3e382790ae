// What a GEMM level provides. A packed word is one step of a multiply-add: a float32, or a pair of
// integers that one instruction multiplies and sums into an int32. Words of A and accumulators have
// 4 bytes, words of B b_bytes; so one driver (cpu/gemm.cc) serves every type.
#pragma once
#include <stdint.h>

#include "tilewright/ops.h"

namespace tilewright {

// A strided matrix operand as the packers read it: element (i, j) at data + (i * row + j * col)
// elements.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t row, col;
};

// What happens to a finished MR x NR tile of accumulators on its way to memory:
//   y = activation(alpha * acc + bias) + residual, rounded once to `out`'s dtype.
// Quantized: alpha * acc is replaced by acc * (scale_a[i] * scale_b[j]) with the bias fused in; with
// offsets or groups by what kernels_weights.h says.
struct Epilogue {
  float alpha = 1.0f;
  Activation activation = Activation::none;
  const float* bias = nullptr;         // (N,)
  const float* scale_a = nullptr;      // (M,) quantized only
  const float* scale_b = nullptr;      // (N,)
  const float* offset_a = nullptr;     // (M,), with
  const float* column_sums = nullptr;  // (N,): of the b that is represented
  Matrix residual{nullptr, DType::other, 0, 0};
  Matrix out{nullptr, DType::other, 0, 0};
};

struct GemmKernels {
  int MR = 0, NR = 0;  // tile of accumulators held in registers
  int KC = 0;  // words of K summed in registers before the tile is added to C: the longest chain
  int k_per_word = 1;  // elements of K in a packed word
  int b_bytes = 4;     // of a packed word of B: 4, or 2: int8 pairs that are widened when read

  // tile (MR, NR) row-major = sum over kc words of a (kc, MR) * b (kc, NR); rows >= mr are not
  // computed. b's rows are ldb words apart: NR when packed, the matrix's own stride when it is read
  // in place.
  void (*tile)(int mr, int64_t kc, const void* a, const void* b, int64_t ldb, void* tile) = nullptr;
  // sum (mr, nr) += tile, or = tile where first; both with row stride NR words.
  void (*add_tile)(bool first, const void* tile, void* sum) = nullptr;
  // Rows [i, i + mr) of a, words [k, k + kc): panel (kc, MR), rows beyond mr zero, elements of K
  // beyond `K` zero.
  void (*pack_a)(const Matrix& a, int64_t i, int mr, int64_t k, int64_t kc, int64_t K,
                 void* panel) = nullptr;
  // Columns [j, j + nr) of b: panel (kc, NR), the same way.
  void (*pack_b)(const Matrix& b, int64_t j, int nr, int64_t k, int64_t kc, int64_t K,
                 void* panel) = nullptr;
  // The tile's rows < mr and columns < nr through the epilogue to out(i.., j..).
  void (*store)(const void* tile, int64_t i, int mr, int64_t j, int nr,
                const Epilogue& e) = nullptr;
};

}  // namespace tilewright
