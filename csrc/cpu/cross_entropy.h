// Cross entropy over any strides and dtypes: parallel over blocks of rows.
#pragma once
#include "cpu/kernel_table.h"
#include "tilewright/ops.h"

namespace tilewright {

// `targets` (rows,): class ids, or kIgnored; nullptr where op.target holds probabilities.
constexpr int64_t kIgnored = -1;
void cross_entropy_forward(const CrossEntropyForward& op, const int64_t* targets,
                           const KernelTable& table);
void cross_entropy_backward(const CrossEntropyBackward& op, const int64_t* targets,
                            const KernelTable& table);

}  // namespace tilewright
