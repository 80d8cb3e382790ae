// Memory of large outputs, kept for the next one: fresh pages from the system cost a large output
// two to five times what the kernel that fills it does.
//
// Blocks of kSmallest bytes and more. A block is never handed out twice while it is in use; what is
// kept and in use together stays below twice the most that ever was in use; trim() gives the rest
// back. Uninitialised, 64-byte aligned. With TILEWRIGHT_POISON=1 blocks of every size come from here,
// and every byte of one that is handed out is 0xff: NaN in each float format, -1 in each integer.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace tilewright::recycle {

constexpr size_t kSmallest = 1 << 20;

bool takes(size_t bytes);  // whether blocks of this size come from here

void* allocate(size_t bytes);            // nullptr when there is no memory
void* resize(void* data, size_t bytes);  // the contents move along
void release(void* data);
void trim();

struct Stats {
  int64_t in_use, peak, kept;  // bytes
  int64_t reused;              // blocks, since the start
};
Stats stats();

}  // namespace tilewright::recycle
