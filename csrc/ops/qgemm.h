// What qmatmul and the packing of its right-hand side share.
#pragma once
#include "core/check.h"
#include "cpu/gemm.h"
#include "tilewright/ops.h"
#include "tilewright/pack.h"

namespace tilewright {

// Dtypes, shapes and bits of a quantized matrix (K, N).
void check_view(const Check& check, const char* name, const QuantizedView& b);

// What pack() returns a pointer to (ops/pack.cc).
PackedMatrix packed_matrix(const View& b, Prefer prefer = Prefer::throughput);
PackedMatrix packed_matrix(const QuantizedView& b);

}  // namespace tilewright
