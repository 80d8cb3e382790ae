// Optimizer steps and norms over lists of tensors: one parallel region over blocks of all of them.
#pragma once
#include "cpu/kernel_table.h"
#include "tilewright/ops.h"

namespace tilewright {

void adam_step(const Adam& op, const KernelTable& table);
void sgd_step(const Sgd& op, const KernelTable& table);
void rmsprop_step(const Rmsprop& op, const KernelTable& table);
void scale_tensors(const ScaleTensors& op, const KernelTable& table);
double sum_squares(const SumSquares& op, const KernelTable& table);

}  // namespace tilewright
