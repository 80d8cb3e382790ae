// Dropout over any strides and dtypes, parallel over blocks of elements.
#pragma once
#include "cpu/kernel_table.h"
#include "tilewright/ops.h"

namespace tilewright {

// Which elements are kept with probability 1 - p, 0 <= p <= 1, and what they are multiplied by.
DropoutRule dropout_rule(double p, uint64_t seed);
void dropout(const Dropout& op, const KernelTable& table);

}  // namespace tilewright
