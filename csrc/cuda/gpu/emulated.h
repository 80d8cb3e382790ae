// The gpu layer for g++: the functions of ptx.h, performed by the emulator.
#pragma once
#include <array>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>

#include "cuda/gpu/emulated_builtins.h"
#include "cuda/gpu/launch.h"
#include "emulator/emulator.h"

namespace tilewright::gpu {

using Stream = void*;  // launches run at once, in the order they are made

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared_bytes,
            Stream, A... args) {
  static_assert(sizeof...(P) == sizeof...(A), "an argument for each of the kernel's parameters");
  static_assert((sizeof(P) + ... + 0) <= kMaxParameterBytes, "a kernel's parameters are 4 KiB");
  static_assert((std::is_trivially_copyable_v<P> && ...), "parameters travel as bytes");
  const Geometry geometry{name, grid, block, shared_bytes};
  check_limits(geometry);
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> parameters;
  };
  const Call call{kernel, {static_cast<P>(args)...}};
  const auto each = std::apply(
      [](const P&... p) {
        return std::array<emulator::Parameter, sizeof...(P)>{emulator::Parameter{&p, sizeof p}...};
      },
      call.parameters);
  emulator::run({describe(geometry), grid, block, shared_bytes, &call, sizeof call,
                 [](const void* parameters) {
                   const Call& c = *static_cast<const Call*>(parameters);
                   std::apply(c.kernel, c.parameters);
                 },
                 reinterpret_cast<const void*>(kernel), each});
}

template <class T>
T& shared_memory(TILEWRIGHT_HERE) {
  return *static_cast<T*>(emulator::shared_memory(sizeof(T), TILEWRIGHT_SITE));
}

template <int n>
void ldmatrix(std::uint32_t (&r)[n], const void* row, TILEWRIGHT_HERE) {
  static_assert(n == 1 || n == 2 || n == 4);
  emulator::ldmatrix(r, n, false, row, TILEWRIGHT_SITE);
}
template <int n>
void ldmatrix_transposed(std::uint32_t (&r)[n], const void* row, TILEWRIGHT_HERE) {
  static_assert(n == 1 || n == 2 || n == 4);
  emulator::ldmatrix(r, n, true, row, TILEWRIGHT_SITE);
}

inline void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                     TILEWRIGHT_HERE) {
  emulator::mma(emulator::Mma::bf16_m16n8k16, d, a, b, TILEWRIGHT_SITE);
}
inline void mma_f16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                    TILEWRIGHT_HERE) {
  emulator::mma(emulator::Mma::f16_m16n8k16, d, a, b, TILEWRIGHT_SITE);
}
inline void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                     TILEWRIGHT_HERE) {
  emulator::mma(emulator::Mma::tf32_m16n8k8, d, a, b, TILEWRIGHT_SITE);
}
template <class A, class B>
void mma_int8(std::int32_t (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
              TILEWRIGHT_HERE) {
  static_assert(sizeof(A) == 1 && sizeof(B) == 1);
  constexpr bool a_signed = std::is_same_v<A, std::int8_t>;
  constexpr bool b_signed = std::is_same_v<B, std::int8_t>;
  constexpr auto kind =
      a_signed ? (b_signed ? emulator::Mma::s8_s8_m16n8k32 : emulator::Mma::s8_u8_m16n8k32)
               : (b_signed ? emulator::Mma::u8_s8_m16n8k32 : emulator::Mma::u8_u8_m16n8k32);
  emulator::mma(kind, d, a, b, TILEWRIGHT_SITE);
}

inline void cp_async16(void* shared, const void* global, int source_bytes = 16, TILEWRIGHT_HERE) {
  emulator::cp_async(shared, global, 16, source_bytes, TILEWRIGHT_SITE);
}
inline void cp_async_commit() {
  emulator::cp_async_commit();
}
template <int groups_left>
void cp_async_wait() {
  static_assert(groups_left >= 0);
  emulator::cp_async_wait(groups_left);
}

template <class V>
V load(const void* from, TILEWRIGHT_HERE) {
  static_assert(std::is_trivially_copyable_v<V> && sizeof(V) <= 16);
  V value;
  emulator::load_vector(&value, from, sizeof value, TILEWRIGHT_SITE);
  return value;
}
template <class V>
void store(void* to, V value, TILEWRIGHT_HERE) {
  static_assert(std::is_trivially_copyable_v<V> && sizeof(V) <= 16);
  emulator::store_vector(to, &value, sizeof value, TILEWRIGHT_SITE);
}

inline float exp2_fast(float x) {
  const float y = std::exp2(std::fabs(x) < FLT_MIN ? 0.0f : x);
  return y < FLT_MIN ? 0.0f : y;
}

}  // namespace tilewright::gpu
