// ISA levels: what was compiled, what this CPU and kernel support, which one is active.
#pragma once
#include "cpu/kernel_table.h"
#include "tilewright/runtime.h"

namespace tilewright {

// The kernels of a level, "" = the best supported one; UnsupportedError where it is unknown or
// unsupported.
const KernelTable& kernels_of(const std::string& name);
// Those of the calling context's level (core/options.h), else of the process's.
const KernelTable& kernels();

}  // namespace tilewright
