// Softmax and its logarithm over any strides and dtypes: parallel over blocks of rows.
#pragma once
#include "cpu/kernel_table.h"
#include "tilewright/ops.h"

namespace tilewright {

void softmax_forward(const SoftmaxForward& op, const KernelTable& table);
void softmax_backward(const SoftmaxBackward& op, const KernelTable& table);

}  // namespace tilewright
