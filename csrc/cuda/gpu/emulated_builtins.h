// CUDA's own names for g++: threadIdx, barriers, shuffles, votes, atomics, arithmetic. Operations
// take the place they are written at as default arguments, so that findings name the kernel's line.
//
// CUDA's headers come first: what follows are macros of names that they use themselves.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <bit>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator/operations.h"

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __forceinline__
#define __forceinline__ inline
#undef __shared__
#define __shared__ static_assert(false, "shared memory is gpu::shared_memory<T>()");
#undef __grid_constant__
#define __grid_constant__

#define threadIdx (::tilewright::emulator::thread_index())
#define blockIdx (::tilewright::emulator::block_index())
#define blockDim (::tilewright::emulator::block_extent())
#define gridDim (::tilewright::emulator::grid_extent())

#define TILEWRIGHT_HERE const char *here_file = __builtin_FILE(), int here_line = __builtin_LINE()
#define TILEWRIGHT_SITE          \
  ::tilewright::emulator::Site { \
    here_file, here_line         \
  }

// --- barriers and votes

inline void __syncthreads(TILEWRIGHT_HERE) {
  tilewright::emulator::barrier(0, TILEWRIGHT_SITE);
}
inline int __syncthreads_count(int predicate, TILEWRIGHT_HERE) {
  return tilewright::emulator::barrier(predicate, TILEWRIGHT_SITE);
}
inline int __syncthreads_or(int predicate, TILEWRIGHT_HERE) {
  return tilewright::emulator::barrier(predicate, TILEWRIGHT_SITE) != 0;
}
inline int __syncthreads_and(int predicate, TILEWRIGHT_HERE) {
  return tilewright::emulator::barrier(!predicate, TILEWRIGHT_SITE) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, TILEWRIGHT_HERE) {
  tilewright::emulator::warp_barrier(mask, TILEWRIGHT_SITE);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, TILEWRIGHT_HERE) {
  return tilewright::emulator::ballot(mask, predicate, TILEWRIGHT_SITE);
}
inline int __any_sync(unsigned mask, int predicate, TILEWRIGHT_HERE) {
  return tilewright::emulator::ballot(mask, predicate, TILEWRIGHT_SITE) != 0;
}
inline int __all_sync(unsigned mask, int predicate, TILEWRIGHT_HERE) {
  return tilewright::emulator::ballot(mask, !predicate, TILEWRIGHT_SITE) == 0;
}

// --- shuffles

namespace tilewright::emulator {
template <class T>
T shuffled(unsigned mask, T value, Shuffle kind, int operand, int width, Site site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(mask, bits, kind, operand, width, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
}  // namespace tilewright::emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, TILEWRIGHT_HERE) {
  return tilewright::emulator::shuffled(mask, value, tilewright::emulator::Shuffle::index, lane,
                                        width, TILEWRIGHT_SITE);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, TILEWRIGHT_HERE) {
  return tilewright::emulator::shuffled(mask, value, tilewright::emulator::Shuffle::exclusive_or,
                                        lanes, width, TILEWRIGHT_SITE);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, TILEWRIGHT_HERE) {
  return tilewright::emulator::shuffled(mask, value, tilewright::emulator::Shuffle::up,
                                        static_cast<int>(delta), width, TILEWRIGHT_SITE);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, TILEWRIGHT_HERE) {
  return tilewright::emulator::shuffled(mask, value, tilewright::emulator::Shuffle::down,
                                        static_cast<int>(delta), width, TILEWRIGHT_SITE);
}

// --- atomics: fibers take turns, so reading and writing need only be one access for the checks

namespace tilewright::emulator {
template <class T, class Change>
[[gnu::no_sanitize("thread")]] T atomically(T* p, Change change, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  access(p, sizeof(T), Access::atomic, site);
  const T old = *p;
  *p = change(old);
  return old;
}
}  // namespace tilewright::emulator

#define TILEWRIGHT_ATOMIC(name, result)                                                        \
  template <class T>                                                                           \
  T name(T* p, std::type_identity_t<T> value, TILEWRIGHT_HERE) {                               \
    const auto change = [value](T old) [[gnu::no_sanitize("thread")]] -> T { return result; }; \
    return tilewright::emulator::atomically(p, change, TILEWRIGHT_SITE);                       \
  }
TILEWRIGHT_ATOMIC(atomicAdd, old + value)
TILEWRIGHT_ATOMIC(atomicSub, old - value)
TILEWRIGHT_ATOMIC(atomicMax, old < value ? value : old)
TILEWRIGHT_ATOMIC(atomicMin, value < old ? value : old)
TILEWRIGHT_ATOMIC(atomicAnd, old& value)
TILEWRIGHT_ATOMIC(atomicOr, old | value)
TILEWRIGHT_ATOMIC(atomicExch, (void(old), value))
#undef TILEWRIGHT_ATOMIC
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value,
            TILEWRIGHT_HERE) {
  const auto change = [=](T old) [[gnu::no_sanitize("thread")]] -> T {
    return old == expected ? value : old;
  };
  return tilewright::emulator::atomically(p, change, TILEWRIGHT_SITE);
}

// --- arithmetic that CUDA has without a header

template <class A, class B>
  requires std::is_arithmetic_v<A> && std::is_arithmetic_v<B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
  requires std::is_arithmetic_v<A> && std::is_arithmetic_v<B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

inline float rsqrtf(float x) {
  return 1.0f / std::sqrt(x);
}
inline float __expf(float x) {
  return std::exp(x);
}
inline float __logf(float x) {
  return std::log(x);
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline float __frcp_rn(float x) {
  return 1.0f / x;
}
inline float __fsqrt_rn(float x) {
  return std::sqrt(x);
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fsub_rn(float a, float b) {
  return a - b;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline int __float2int_rn(float x) {
  return static_cast<int>(std::nearbyint(x));
}
inline float __int2float_rn(int x) {
  return static_cast<float>(x);
}
inline float __uint2float_rn(unsigned x) {
  return static_cast<float>(x);
}
inline float __int_as_float(int x) {
  return std::bit_cast<float>(x);
}
inline float __uint_as_float(unsigned x) {
  return std::bit_cast<float>(x);
}
inline int __float_as_int(float x) {
  return std::bit_cast<int>(x);
}
inline unsigned __float_as_uint(float x) {
  return std::bit_cast<unsigned>(x);
}
inline int __popc(unsigned x) {
  return std::popcount(x);
}
inline int __clz(int x) {
  return std::countl_zero(static_cast<unsigned>(x));
}
inline int __ffs(int x) {
  return x ? std::countr_zero(static_cast<unsigned>(x)) + 1 : 0;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((std::uint64_t{a} * b) >> 32);
}
