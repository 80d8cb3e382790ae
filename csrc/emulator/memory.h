// Device memory as kernels see it: which bytes exist. (What hosts call is in emulator.h.)
#pragma once
#include "emulator/machine.h"

namespace tilewright::emulator {

// access() for the emulator's own operations. `count`: it is traffic of its own, not part of an
// instruction that is counted elsewhere.
void touch(const void* address, std::size_t bytes, Access kind, Site site, bool count = true);

// Where these bytes lie in the block's shared memory. Ends the kernel with a finding of this kind
// if they don't lie there whole, or not at a multiple of `bytes`.
std::size_t shared_offset(const void* address, std::size_t bytes, const std::string& kind,
                          Site site);

// Before a launch and before each block: nobody has touched anything yet.
void forget_global_marks();
void clear_shared();

}  // namespace tilewright::emulator
