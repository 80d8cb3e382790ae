// What qmatmul and the packing of its right-hand side share.
#pragma once
#include "core/check.h"
#include "tilewright/ops.h"

namespace tilewright {

// Dtypes, shapes and bits of a quantized matrix (K, N).
void check_view(const Check& check, const char* name, const QuantizedView& b);

}  // namespace tilewright
