// Which thread runs: one at a time, until it waits for others or ends.
#pragma once
#include "emulator/machine.h"

namespace tilewright::emulator {

// Draws the order of warps, and in shuffled schedules where each begins, for what comes until the
// next barrier of the block.
void draw_order();

// The thread to run now: of the running warp if it has one. nullptr: none can go on.
Thread* next_runnable();

// Leaves the running fiber, or the launching code, for `next`; nullptr is the launching code.
void resume(Thread* next);

// The calling thread can't go on until somebody sets its bit in its warp's `runnable`.
void wait();

}  // namespace tilewright::emulator
