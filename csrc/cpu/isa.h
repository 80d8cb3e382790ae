// ISA levels: what was compiled, what this CPU and kernel support, which one is active.
#pragma once
#include "cpu/kernel_table.h"
#include "tilewright/runtime.h"

namespace tilewright {

// The kernels of a level, "" = the best supported one; UnsupportedError where it is unknown or
// unsupported.
const KernelTable& kernels_of(const std::string& name);
// Why a level that the CPU has is not among the supported ones; nullptr if there is none.
const char* refusal();
// Those of the calling context's level (core/options.h), else of the process's.
const KernelTable& kernels();

}  // namespace tilewright
