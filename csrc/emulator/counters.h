// What the memory system would do: bank conflicts of shared memory, sectors of global memory.
#pragma once
#include "emulator/machine.h"

namespace tilewright::emulator {

// Turns the accesses that the warp's lanes logged into instructions of the warp, and counts them.
// The n-th execution of a line by each lane since the last call makes one instruction.
void flush(Warp& warp);

// Wavefronts that rows of 16 bytes, at these offsets of shared memory, take together.
unsigned row_wavefronts(const std::uintptr_t* offsets, int rows);

void count_ldmatrix(Site site, unsigned wavefronts, unsigned ideal);

}  // namespace tilewright::emulator
