// What every matrix product shares: the shape rule, and a batch of matrices as calls of gemm().
#pragma once
#include <initializer_list>
#include <string>

#include "core/check.h"
#include "cpu/gemm.h"
#include "tilewright/ops.h"

namespace tilewright {

// out (..., M, N) = a (..., M, K) @ b (..., K, N). `b` is absent where `packed` stands for it;
// `residual` is optional.
struct ProductViews {
  const View& a;
  const View& b;
  const PackedMatrix* packed;
  const View& residual;
  const View& out;
  const char* b_name = "b";  // in messages
};

// Leading axes broadcast as in NumPy; the last two are the matrix.
struct Product {
  int64_t M, N, K;
  int rank = 0;  // leading axes, and below: strides in elements, 0 where broadcast
  int64_t shape[kMaxRank];
  int64_t a[kMaxRank], b[kMaxRank], residual[kMaxRank], out[kMaxRank];

  int64_t count() const {
    int64_t n = 1;
    for (int d = 0; d < rank; ++d) n *= shape[d];
    return n;
  }
};

// Shapes of all five, dtypes of out and residual, overlaps. a and b: dtypes and ranks are the op's
// own to check before.
Product check_product(const Check& check, const ProductViews& v,
                      std::initializer_list<DType> out_dtypes);
void check_bias(const Check& check, const View& bias, const Product& product, const View& out);
// b was packed for the active ISA level.
void check_packed_level(const Check& check, const PackedMatrix* packed, const char* isa,
                        const char* name = "b");

// "batch x M x N x K", for the trace.
std::string format_product(const Product& product);
// A float vector as float32 in `out`, which is returned.
const float* widen(const View& vector, float* out);

// Every matrix of the product, with this epilogue (whose out and residual are filled in here;
// scale_a and offset_a, where given, have a number for each row of each matrix). weights: as in Gemm.
void run_product(Product product, const ProductViews& v, const Epilogue& epilogue,
                 const GemmKernels& kernels, const WeightKernels* weights = nullptr);

}  // namespace tilewright
