// Integer products whose scales change along K, and quantized right-hand sides packed.
#pragma once
#include "cpu/gemm.h"

namespace tilewright::cpu {

// One task of gemm(): rows [i0, i0 + mc), columns [j0, j0 + nt), group by group.
void multiply_groups(const Gemm& p, const GemmKernels& g, int64_t i0, int64_t mc, int64_t j0,
                     int64_t nt);

}  // namespace tilewright::cpu
