// Small kernels, right and wrong ones, written as those of csrc/cuda are: nvcc compiles them too.
#pragma once
#include "cuda/gpu/gpu.h"

namespace check_kernels {

namespace gpu = tilewright::gpu;
constexpr unsigned kAll = 0xffffffffu;

// --- shared memory and barriers

// 32 x 32 tiles; without padding, the columns of a tile all lie in one bank.
template <int padding>
__global__ void transpose(const float* from, float* to, int n) {
  struct Shared {
    float tile[32][32 + padding];
  };
  Shared& s = gpu::shared_memory<Shared>();
  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
  const int column = static_cast<int>(blockIdx.x) * 32, row = static_cast<int>(blockIdx.y) * 32;
  s.tile[y][x] = from[(row + y) * n + column + x];
  __syncthreads();
  to[(column + y) * n + row + x] = s.tile[x][y];
}

template <bool synchronised>
__global__ void layernorm(const float* x, float* y, int width) {
  struct Shared {
    float sum[8], squares[8];
  };
  Shared& s = gpu::shared_memory<Shared>();
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const float* row = x + static_cast<int>(blockIdx.x) * width;
  float sum = 0, squares = 0;
  for (int i = thread; i < width; i += threads) {
    sum += row[i];
    squares += row[i] * row[i];
  }
  for (unsigned d = 16; d; d /= 2) {
    sum += __shfl_down_sync(kAll, sum, d);
    squares += __shfl_down_sync(kAll, squares, d);
  }
  if (thread % 32 == 0) {
    s.sum[thread / 32] = sum;
    s.squares[thread / 32] = squares;
  }
  if (synchronised) __syncthreads();
  sum = squares = 0;
  for (int w = 0; w < threads / 32; ++w) {
    sum += s.sum[w];
    squares += s.squares[w];
  }
  const float mean = sum / static_cast<float>(width);
  const float scale = rsqrtf(squares / static_cast<float>(width) - mean * mean + 1e-5f);
  for (int i = thread; i < width; i += threads) {
    y[static_cast<int>(blockIdx.x) * width + i] = (row[i] - mean) * scale;
  }
}

__global__ void early_exit(float* y) {
  if (threadIdx.x == 40) return;
  __syncthreads();
  y[threadIdx.x] = 0;
}

__global__ void late_exit(float* y) {
  if (threadIdx.x != 0) {
    __syncthreads();
    y[threadIdx.x] = 0;
  }
}

__global__ void two_barriers(float* y) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = 0;
}

__global__ void unwritten(float* y) {
  struct Shared {
    float x[64];
  };
  Shared& s = gpu::shared_memory<Shared>();
  if (threadIdx.x) s.x[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = s.x[threadIdx.x];
}

__global__ void beyond_shared(float* y, int offset) {
  struct Shared {
    float x[32];
  };
  Shared& s = gpu::shared_memory<Shared>();
  float* x = s.x;
  x[static_cast<int>(threadIdx.x) + offset] = 1;
  y[threadIdx.x] = x[static_cast<int>(threadIdx.x) + offset];
}

__global__ void predicates(int* count) {
  const int odd = threadIdx.x % 2, big = threadIdx.x >= 48;
  count[threadIdx.x * 3] = __syncthreads_count(odd);
  count[threadIdx.x * 3 + 1] = __syncthreads_or(big);
  count[threadIdx.x * 3 + 2] = __syncthreads_and(big);
}

// --- within a warp

template <bool synchronised>
__global__ void warp_exchange(float* y) {
  struct Shared {
    float x[32];
  };
  Shared& s = gpu::shared_memory<Shared>();
  s.x[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (synchronised) __syncwarp();
  y[threadIdx.x] = s.x[threadIdx.x ^ 1];
}

// Each lane reads a neighbour's value, and after a __syncwarp adds to its own: ordered, all of it.
__global__ void warp_exchange_in_place(float* y) {
  struct Shared {
    float x[32];
  };
  Shared& s = gpu::shared_memory<Shared>();
  s.x[threadIdx.x] = static_cast<float>(threadIdx.x);
  for (unsigned step = 1; step < 32; step *= 2) {
    __syncwarp();
    const float other = s.x[threadIdx.x ^ step];
    __syncwarp();
    s.x[threadIdx.x] += other;
  }
  __syncwarp();
  y[threadIdx.x] = s.x[31 - threadIdx.x];
}

__global__ void lost_lane(float* y) {
  if (threadIdx.x == 7) return;
  y[threadIdx.x] = __shfl_xor_sync(kAll, static_cast<float>(threadIdx.x), 1);
}

__global__ void own_lane_missing(float* y) {
  y[threadIdx.x] = __shfl_sync(0xffffu, static_cast<float>(threadIdx.x), 0);
}

__global__ void outside_the_mask(float* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_sync(0xffffu, static_cast<float>(threadIdx.x), 20);
}

__global__ void diverging_shuffles(float* y) {
  float x = static_cast<float>(threadIdx.x);
  if (threadIdx.x < 16) {
    x = __shfl_xor_sync(kAll, x, 1);
  } else {
    x = __shfl_xor_sync(kAll, x, 2);
  }
  y[threadIdx.x] = x;
}

// Halves of a warp on their own, and 64-bit values.
__global__ void half_warps(double* y) {
  const unsigned mask = threadIdx.x < 16 ? 0xffffu : 0xffff0000u;
  double x = static_cast<double>(threadIdx.x);
  if (threadIdx.x < 16) {
    for (int d = 8; d; d /= 2) x += __shfl_xor_sync(mask, x, d);
  } else {
    for (unsigned d = 8; d; d /= 2) x += __shfl_down_sync(mask, x, d, 16);
  }
  y[threadIdx.x] = x;
}

// By whatever lanes the block has.
__global__ void votes(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  out[lane * 3] = static_cast<int>(__ballot_sync(kAll, lane % 3 == 0));
  out[lane * 3 + 1] = __any_sync(kAll, lane == 4);
  out[lane * 3 + 2] = __all_sync(kAll, lane < 40);
}

// 5 results a thread.
__global__ void warp_operations(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  int* mine = out + lane * 5;
  mine[0] = __shfl_sync(kAll, lane, 5);
  mine[1] = __shfl_sync(kAll, lane, lane + 1, 8);
  mine[2] = __shfl_up_sync(kAll, lane, 3, 16);
  mine[3] = __shfl_down_sync(kAll, lane, 3);
  mine[4] = __shfl_xor_sync(kAll, lane, 12, 8);
}

// --- global memory

template <bool atomic>
__global__ void column_sum(const float* x, float* sum, int n) {
  const int row = static_cast<int>(blockIdx.x), column = static_cast<int>(threadIdx.x);
  if (atomic) {
    atomicAdd(&sum[column], x[row * n + column]);
  } else {
    sum[column] += x[row * n + column];
  }
}

// The last thread reads plainly what others may still be adding to.
__global__ void peek(int* count, int* seen) {
  atomicAdd(count, 1);
  if (threadIdx.x + 1 == blockDim.x) *seen = *count;
}

__global__ void atomics(int* x, unsigned* bits, int* old) {
  const int i = static_cast<int>(threadIdx.x);
  atomicAdd(&x[0], i);
  atomicSub(&x[1], i);
  atomicMax(&x[2], i);
  atomicMin(&x[3], -i);
  atomicOr(&bits[0], 1u << i);
  atomicAnd(&bits[1], ~(1u << i));
  atomicCAS(&x[4], i, i + 1);
  old[i] = atomicExch(&x[5], i);
}

// Who comes when: blocks, and the threads in them.
__global__ void arrivals(unsigned* next, unsigned* order) {
  const unsigned turn = atomicAdd(next, 1u);
  order[turn] = blockIdx.x * blockDim.x + threadIdx.x;
}

__global__ void strided(const float* x, float* y, int stride) {
  y[threadIdx.x] = x[static_cast<int>(threadIdx.x) * stride];
}

__global__ void store_one(float* y, int n) {
  if (static_cast<int>(threadIdx.x) < n) y[threadIdx.x] = 1;
}

__global__ void store_vectors(float* y) {
  gpu::store(y + threadIdx.x * 4, make_float4(1, 2, 3, 4));
}

__global__ void load_vectors(const float* x, int offset, float4* y) {
  y[threadIdx.x] = gpu::load<float4>(x + offset + threadIdx.x * 4);
}

__device__ constexpr float kTable[4] = {1, 2, 4, 8};
__global__ void constants(float* y, int shift) {
  y[threadIdx.x] = kTable[(static_cast<int>(threadIdx.x) + shift) % 4];
}

// --- asynchronous copies: 32 threads, 16 bytes each, read by a neighbour

enum class Wait { right, none, uncommitted, too_few, no_barrier };

template <Wait wait>
__global__ void copy_across(const float4* x, float4* y, int source_bytes) {
  struct Shared {
    float4 x[32];
  };
  Shared& s = gpu::shared_memory<Shared>();
  gpu::cp_async16(&s.x[threadIdx.x], x + threadIdx.x, source_bytes);
  if (wait != Wait::uncommitted) gpu::cp_async_commit();
  if (wait == Wait::too_few) {
    gpu::cp_async_wait<1>();
  } else if (wait != Wait::none) {
    gpu::cp_async_wait<0>();
  }
  if (wait != Wait::no_barrier) __syncthreads();
  y[threadIdx.x] = gpu::load<float4>(&s.x[31 - threadIdx.x]);
}

// Two stages; without the barrier at the end of a turn, a buffer is refilled while others read it.
template <bool synchronised>
__global__ void pipeline(const float4* x, float* y, int steps) {
  struct Shared {
    float4 x[2][64];
  };
  Shared& s = gpu::shared_memory<Shared>();
  const int i = static_cast<int>(threadIdx.x);
  gpu::cp_async16(&s.x[0][i], x + i);
  gpu::cp_async_commit();
  float sum = 0;
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) gpu::cp_async16(&s.x[(step + 1) % 2][i], x + (step + 1) * 64 + i);
    gpu::cp_async_commit();
    gpu::cp_async_wait<1>();
    __syncthreads();
    sum += s.x[step % 2][63 - i].x;
    if (synchronised) __syncthreads();
  }
  y[i] = sum;
}

}  // namespace check_kernels
