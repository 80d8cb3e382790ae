// One tile of mma, its operands coming in two ways: straight from global memory by a table of
// places, and through shared memory and ldmatrix. nvcc compiles them too.
#pragma once
#include "cuda/gpu/gpu.h"

namespace tensor_kernels {

namespace gpu = tilewright::gpu;

enum class Kind { bf16, f16, tf32, s8 };

template <Kind kind, class D>
__device__ void multiply(D (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  if constexpr (kind == Kind::bf16) {
    gpu::mma_bf16(d, a, b);
  } else if constexpr (kind == Kind::f16) {
    gpu::mma_f16(d, a, b);
  } else if constexpr (kind == Kind::tf32) {
    gpu::mma_tf32(d, a, b);
  } else {
    gpu::mma_int8<std::int8_t, std::int8_t>(d, a, b);
  }
}

// Register r of lane l is a[l * 4 + r], b[l * 2 + r], c[l * 4 + r]; c += a b, `times` times.
template <Kind kind, class D>
__global__ void product(const std::uint32_t* a, const std::uint32_t* b, D* c, int times) {
  const int lane = static_cast<int>(threadIdx.x);
  std::uint32_t ra[4], rb[2];
  D d[4];
  for (int r = 0; r < 4; ++r) ra[r] = a[lane * 4 + r];
  for (int r = 0; r < 2; ++r) rb[r] = b[lane * 2 + r];
  for (int r = 0; r < 4; ++r) d[r] = c[lane * 4 + r];
  for (int i = 0; i < times; ++i) multiply<kind>(d, ra, rb);
  for (int r = 0; r < 4; ++r) c[lane * 4 + r] = d[r];
}

// Every byte of a is x, every byte of b is y.
template <class A, class B>
__global__ void product_of_bytes(std::uint32_t x, std::uint32_t y, std::int32_t* c) {
  const std::uint32_t ra[4] = {x * 0x01010101, x * 0x01010101, x * 0x01010101, x * 0x01010101};
  const std::uint32_t rb[2] = {y * 0x01010101, y * 0x01010101};
  std::int32_t d[4] = {};
  gpu::mma_int8<A, B>(d, ra, rb);
  for (int r = 0; r < 4; ++r) c[threadIdx.x * 4 + r] = d[r];
}

// c[16][8] = a b, with a[16][K] by rows and b[8][K] by columns, K such that rows have T's 32 bytes.
template <Kind kind, class T, class D>
__global__ void product_through_ldmatrix(const T* a, const T* b, D* c) {
  constexpr int kDepth = 32 / sizeof(T);
  struct Shared {
    T a[16][kDepth], b[8][kDepth];
  };
  Shared& s = gpu::shared_memory<Shared>();
  const int lane = static_cast<int>(threadIdx.x), half = kDepth / 2;
  gpu::cp_async16(&s.a[lane / 2][lane % 2 * half], a + lane * half);
  if (lane < 16) gpu::cp_async16(&s.b[lane / 2][lane % 2 * half], b + lane * half);
  gpu::cp_async_commit();
  gpu::cp_async_wait<0>();
  __syncwarp();
  std::uint32_t ra[4], rb[2];
  gpu::ldmatrix(ra, &s.a[lane % 16][lane / 16 * half]);
  gpu::ldmatrix(rb, &s.b[lane % 8][lane / 8 % 2 * half]);
  D d[4] = {};
  multiply<kind>(d, ra, rb);
  for (int e = 0; e < 4; ++e) c[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = d[e];
}

// The same with b[K][8] by rows: its fragment comes from a transposing ldmatrix. 16-bit only.
template <Kind kind, class T>
__global__ void product_transposed(const T* a, const T* b, float* c) {
  struct Shared {
    T a[16][16], b[16][8];
  };
  Shared& s = gpu::shared_memory<Shared>();
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += 32) s.a[i / 16][i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) s.b[i / 8][i % 8] = b[i];
  __syncwarp();
  std::uint32_t ra[4], rb[2];
  gpu::ldmatrix(ra, &s.a[lane % 16][lane / 16 * 8]);
  gpu::ldmatrix_transposed(rb, &s.b[lane % 16][0]);
  float d[4] = {};
  multiply<kind>(d, ra, rb);
  for (int e = 0; e < 4; ++e) c[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = d[e];
}

// out[lane][4]: n matrices of 8 x 8, 16-bit elements, whose rows lie `stride` elements apart.
template <int n, bool transposed>
__global__ void matrices(const std::uint16_t* x, std::uint32_t* out, int stride) {
  struct Shared {
    std::uint16_t x[32 * 64];
  };
  Shared& s = gpu::shared_memory<Shared>();
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 32 * 64; i += 32) s.x[i] = x[i];
  __syncwarp();
  std::uint32_t r[n];
  const std::uint16_t* row = s.x + lane % (8 * n) * stride;
  if constexpr (transposed) {
    gpu::ldmatrix_transposed(r, row);
  } else {
    gpu::ldmatrix(r, row);
  }
  for (int i = 0; i < n; ++i) out[lane * 4 + i] = r[i];
}

// ldmatrix by half a warp, on an address between rows, and beyond shared memory.
__global__ void half_a_warp(std::uint32_t* out) {
  struct Shared {
    std::uint16_t x[8 * 8];
  };
  Shared& s = gpu::shared_memory<Shared>();
  s.x[threadIdx.x] = 0;
  s.x[threadIdx.x + 32] = 0;
  __syncwarp();
  std::uint32_t r[1] = {};
  if (threadIdx.x < 16) gpu::ldmatrix(r, s.x + threadIdx.x % 8 * 8);
  out[threadIdx.x] = r[0];
}
__global__ void matrix_at(std::uint32_t* out, int offset) {
  struct Shared {
    std::uint16_t x[8 * 8];
  };
  Shared& s = gpu::shared_memory<Shared>();
  s.x[threadIdx.x] = 0;
  s.x[threadIdx.x + 32] = 0;
  __syncwarp();
  std::uint32_t r[1];
  gpu::ldmatrix(r, s.x + static_cast<int>(threadIdx.x) % 8 * 8 + offset);
  out[threadIdx.x] = r[0];
}

__global__ void exp2_of(const float* x, float* y) {
  y[threadIdx.x] = gpu::exp2_fast(x[threadIdx.x]);
}

}  // namespace tensor_kernels
