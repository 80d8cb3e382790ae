// Layernorm and rmsnorm over any strides and dtypes: parallel over fixed blocks of rows.
#pragma once
#include "cpu/kernel_table.h"
#include "tilewright/ops.h"

namespace tilewright {

void layernorm_forward(const LayernormForward& op, const KernelTable& table);
// dgamma and dbeta: one partial sum for each block of rows (of a size that follows from C alone),
// combined by sum_rows; so they don't depend on the number of threads.
void layernorm_backward(const LayernormBackward& op, const KernelTable& table);

}  // namespace tilewright
