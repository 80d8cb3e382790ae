// The gpu layer for nvcc: the only inline PTX, and the only <<<>>>. For sm_80 and later.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

#include "core/env.h"
#include "cuda/gpu/current.h"
#include "cuda/gpu/launch.h"

namespace tilewright::gpu {

using Stream = cudaStream_t;

// Launches are asynchronous: an error may be that of any kernel before, unless each is waited for.
inline bool synchronous() {
  static const bool on = env::get_int("TILEWRIGHT_SYNC", 0) != 0;
  return on;
}

inline void check(cudaError_t code, const Geometry& g) {
  if (code == cudaSuccess) return;
  const char* hint =
      synchronous() ? "" : " (of this kernel or an earlier one: set TILEWRIGHT_SYNC=1 to locate)";
  throw DeviceError(describe(g) + ": " + cudaGetErrorString(code) + hint);
}

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared_bytes,
            Stream stream, A... args) {
  static_assert(sizeof...(P) == sizeof...(A), "an argument for each of the kernel's parameters");
  static_assert((sizeof(P) + ... + 0) <= kMaxParameterBytes, "a kernel's parameters are 4 KiB");
  const Geometry geometry{name, grid, block, shared_bytes};
  check_limits(geometry);
  if (shared_bytes > 48 * 1024) {  // more must be asked for, kernel by kernel
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          geometry);
  }
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<P>(args)...);
  check(cudaGetLastError(), geometry);
  if (synchronous() && !t_capturing) check(cudaStreamSynchronize(stream), geometry);
}

// sizeof(T) is the launch's shared_bytes.
template <class T>
__device__ __forceinline__ T& shared_memory() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared[];
  return *reinterpret_cast<T*>(dynamic_shared);
}

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// Lane 8 i + r gives the address of row r of matrix i; each row is 16 bytes, 16-byte aligned.
__device__ __forceinline__ void ldmatrix(std::uint32_t (&r)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix(std::uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(std::uint32_t (&r)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(std::uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b, where a is 16 x K by rows, b is K x 8 by columns, d is 16 x 8.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4],
                                         const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_f16(float (&d)[4], const std::uint32_t (&a)[4],
                                        const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4],
                                         const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// A, B: std::int8_t or std::uint8_t, each operand its own.
template <class A, class B>
__device__ __forceinline__ void mma_int8(std::int32_t (&d)[4], const std::uint32_t (&a)[4],
                                         const std::uint32_t (&b)[2]) {
#define TILEWRIGHT_MMA_INT8(types)                                                    \
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32." types                         \
               ".s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  constexpr bool a_signed = std::is_same_v<A, std::int8_t>;
  constexpr bool b_signed = std::is_same_v<B, std::int8_t>;
  static_assert(sizeof(A) == 1 && sizeof(B) == 1);
  if constexpr (a_signed && b_signed) {
    TILEWRIGHT_MMA_INT8("s8.s8");
  } else if constexpr (a_signed) {
    TILEWRIGHT_MMA_INT8("s8.u8");
  } else if constexpr (b_signed) {
    TILEWRIGHT_MMA_INT8("u8.s8");
  } else {
    TILEWRIGHT_MMA_INT8("u8.u8");
  }
#undef TILEWRIGHT_MMA_INT8
}

// Copies 16 bytes, of which those past source_bytes become zero.
__device__ __forceinline__ void cp_async16(void* shared, const void* global,
                                           int source_bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(source_bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int groups_left>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
}

template <class V>
__device__ __forceinline__ V load(const void* from) {
  return *static_cast<const V*>(from);
}
template <class V>
__device__ __forceinline__ void store(void* to, V value) {
  *static_cast<V*>(to) = value;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace tilewright::gpu
