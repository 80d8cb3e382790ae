// Races: two accesses of one byte by different threads, one of them a write, that nothing orders.
#pragma once
#include "emulator/machine.h"

namespace tilewright::emulator {

// Compares an access of the calling thread to what the cells remember, and remembers it.
// `space` is "shared" or "global".
void check_order(Cell* cells, std::size_t bytes, Access kind, Site site, const char* space);

}  // namespace tilewright::emulator
