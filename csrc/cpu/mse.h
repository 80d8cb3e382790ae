// The squared error over any strides and dtypes, parallel over blocks of elements.
#pragma once
#include "cpu/kernel_table.h"
#include "tilewright/ops.h"

namespace tilewright {

void mse_forward(const MseForward& op, const KernelTable& table);
void mse_backward(const MseBackward& op, const KernelTable& table);

}  // namespace tilewright
