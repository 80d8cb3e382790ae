// Few rows of floats times weights that are narrow in memory, without a panel of floats in between.
#pragma once
#include "core/scratch.h"
#include "cpu/gemm.h"

namespace tilewright::cpu {

inline bool meets_few_rows(const Gemm& p, const GemmKernels& g) {
  return p.weights && g.k_per_word == 1 && !g.prepare && p.M <= p.weights->few;
}

class FewRows {
 public:
  FewRows(const Gemm& p, const GemmKernels& g);
  FewRows(const FewRows&) = delete;
  FewRows& operator=(const FewRows&) = delete;

  // One task of gemm(): rows [i0, i0 + mc), columns [j0, j0 + nt).
  void multiply(int64_t i0, int64_t mc, int64_t j0, int64_t nt) const;

 private:
  const Gemm& p_;
  const GemmKernels& g_;
  const bool in_place_;
  const int64_t lda_;
  const Scratch copy_;
  const float* const rows_;  // A, contiguous floats lda_ apart
};

}  // namespace tilewright::cpu
