// Sums over whole arrays, in double and in one fixed order: no atomics.
//
//     elements  | kRun a block | kRun a block | ..      a block adds up its run, and one block then
//     sums      |      s0      |      s1      | ..      adds the sums of all
//
// kRun   16 elements a thread: a long array is still more blocks than a GPU holds, and the sums are
//        1/4096 of the elements.
#pragma once
#include "cuda/each.h"

namespace tilewright::cuda {

constexpr std::int64_t kRun = 16 * kEachBlock;
constexpr int kSumWarps = kEachBlock / 32;
constexpr int kMostSums = 2;  // of one kernel

struct SumShared {
  double partial[kMostSums][kSumWarps];
};

// The same sum in every thread of a block; once a kernel for each `place`.
__device__ inline double block_sum(double x, int place = 0) {
  for (int d = 16; d; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
  double* const partial = gpu::shared_memory<SumShared>().partial[place];
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < kSumWarps; ++w) sum += partial[w];
  return sum;
}

// f(i) for this thread's elements of a run.
template <class F>
__device__ inline void for_run(std::int64_t run, std::int64_t n, const F& f) {
  const std::int64_t start = run * kRun, end = min(n, start + kRun);
  for (std::int64_t i = start + threadIdx.x; i < end; i += kEachBlock) f(i);
}

// Of this thread, where one block adds the sums of all.
__device__ inline double thread_sum(const double* sums, std::int64_t count) {
  double sum = 0;
  for (std::int64_t i = threadIdx.x; i < count; i += kEachBlock) sum += sums[i];
  return sum;
}

inline std::int64_t runs_of(std::int64_t n) {
  return (n + kRun - 1) / kRun;
}

// Nothing where there is no block.
template <class... P, class... A>
void launch_sum(const char* name, void (*kernel)(P...), std::int64_t blocks, A... args) {
  if (blocks == 0) return;
  gpu::launch(name, kernel, dim3(static_cast<unsigned>(blocks)), dim3(kEachBlock),
              sizeof(SumShared), gpu::current_stream(), args...);
}

}  // namespace tilewright::cuda
