// Memory for blocks that kernels read many times: 64-byte aligned, given back by std::free.
//
// From 4 MiB on it asks for huge pages. Panels are read in an order that touches a new page every
// few lines: with pages of 4 KB a matrix of 16 MB misses the TLB at each of them.
#pragma once
#include <stddef.h>

namespace tilewright {

void* allocate_pages(size_t bytes);  // nullptr where there is no memory

}  // namespace tilewright
