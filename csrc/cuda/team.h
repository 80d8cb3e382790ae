// The threads that share a row: one warp while a row is short, a block of them beyond. Which of the two
// follows from the row's length alone, and sums have one order, so a row's bits depend on it alone.
//
//     C <= 1024     a warp a row, 4 rows a block of 128 threads; sums by shuffles alone
//     else          8 warps a row; their sums meet in shared memory
//
// 1024: a lane of one warp then takes up to 32 elements, about what hides the latency of its loads;
// a block of 8 warps for a shorter row would leave lanes without work.
#pragma once
#include "cuda/gpu/stream.h"

namespace tilewright::cuda {

constexpr std::int64_t kLongestOfWarp = 1024;

__device__ inline float warp_sum(float x) {
  for (int d = 16; d; d /= 2) x += __shfl_xor_sync(kAllLanes, x, d);
  return x;
}
__device__ inline float warp_max(float x) {
  for (int d = 16; d; d /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, d));
  return x;
}

template <int warps>
struct Team {
  static constexpr int kThreads = 32 * warps;       // of a row
  static constexpr int kRows = warps == 1 ? 4 : 1;  // of a block
  static constexpr unsigned kBlock = kThreads * kRows;

  struct Shared {
    float partial[2][warps];
  };

  // The row of this thread, and which of its threads it is.
  __device__ static std::int64_t row() {
    return std::int64_t(blockIdx.x) * kRows + threadIdx.x / kThreads;
  }
  __device__ static int thread() { return static_cast<int>(threadIdx.x % kThreads); }

  // The same number in every thread of the team.
  __device__ float sum(float x) {
    return meet(warp_sum(x), [](float a, float b) { return a + b; });
  }
  __device__ float max(float x) {
    return meet(warp_max(x), [](float a, float b) { return fmaxf(a, b); });
  }

 private:
  template <class Join>
  __device__ float meet(float x, Join join) {
    if constexpr (warps > 1) {
      // Two places in turns: who is late in reading one has not left the barrier of the next.
      float* const partial = gpu::shared_memory<Shared>().partial[turn_ ^= 1];
      if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
      __syncthreads();
      x = partial[0];
      for (int w = 1; w < warps; ++w) x = join(x, partial[w]);
    }
    return x;
  }

  int turn_ = 0;
};

// f(Team()) for rows of C elements.
template <class F>
void with_team(std::int64_t C, const F& f) {
  if (C <= kLongestOfWarp) return f(Team<1>());
  f(Team<8>());
}

// A thread team for each row; blocks have whole warps, and a warp without a row leaves together.
template <class T, class... P, class... A>
void launch_rows(const char* name, void (*kernel)(P...), std::int64_t rows, A... args) {
  const auto blocks = static_cast<unsigned>((rows + T::kRows - 1) / T::kRows);
  gpu::launch(name, kernel, dim3(blocks), dim3(T::kBlock), sizeof(typename T::Shared),
              gpu::current_stream(), args...);
}

}  // namespace tilewright::cuda
