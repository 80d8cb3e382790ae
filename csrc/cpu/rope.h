// Rotary position embedding over any strides and dtypes, parallel over blocks of rows.
#pragma once
#include "cpu/kernel_table.h"
#include "tilewright/ops.h"

namespace tilewright {

void rope(const Rope& op, const KernelTable& table);

}  // namespace tilewright
