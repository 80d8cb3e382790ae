// A thread for each element (or pair, or row): launches without a shape of their own.
#pragma once
#include "cuda/array.h"
#include "cuda/gpu/stream.h"

namespace tilewright::cuda {

constexpr unsigned kEachBlock = 256;  // eight warps: a full multiprocessor at any register count

__device__ inline std::int64_t each_index() {
  return std::int64_t(blockIdx.x) * kEachBlock + threadIdx.x;
}

// The kernel's threads beyond n must leave by themselves.
template <class... P, class... A>
void launch_each(const char* name, void (*kernel)(P...), std::int64_t n, A... args) {
  gpu::launch(name, kernel, dim3(blocks_for(n, kEachBlock)), dim3(kEachBlock), 0,
              gpu::current_stream(), args...);
}

}  // namespace tilewright::cuda
