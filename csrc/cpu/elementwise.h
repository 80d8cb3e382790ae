// Elementwise ops and sums over rows, parallel over fixed blocks.
#pragma once
#include "cpu/rowwise.h"
#include "tilewright/ops.h"

namespace tilewright {

void activation_forward(const ActivationForward& op, const KernelTable& table);
void activation_backward(const ActivationBackward& op, const KernelTable& table);
void sum(const Sum& op, const KernelTable& table);
// out (C,) float32 = the sum of x's rows: blocks of 64 rows, whose sums are summed the same way, so
// that no chain of additions is longer than 64.
void sum_rows(const Rows& x, float* out, const KernelTable& table);

}  // namespace tilewright
