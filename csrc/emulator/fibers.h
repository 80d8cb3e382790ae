// Stacks to switch between: a CUDA thread is a fiber, and so can stop in the middle of a kernel.
#pragma once

namespace tilewright::emulator {

// A stack in [low, top) on which `entry`, which must never return, will begin; the value is what
// switch_stack() takes.
void* fresh_stack(char* low, char* top, void (*entry)());

// Leaves the running stack, whose place goes to *save, and goes on where `load` was left.
void switch_stack(void** save, void* load);

}  // namespace tilewright::emulator
