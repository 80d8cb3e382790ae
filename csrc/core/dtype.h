// The float dtypes: which there are, what two of them make together, and conversions for scalar code
// (csrc/simd has its own vector forms).
#pragma once
#include <stdint.h>
#include <string.h>

#include <initializer_list>

#include "tilewright/view.h"

namespace tilewright {

// What "T" in ops.h stands for. 16 bits are storage: arithmetic and sums are float32.
constexpr std::initializer_list<DType> kFloats = {DType::f32, DType::bf16, DType::f16};

constexpr bool is_float(DType t) {
  return t == DType::f32 || t == DType::bf16 || t == DType::f16;
}

// The dtype of a result whose operands have these: their own if they share one, else float32.
constexpr DType promote(DType a, DType b) {
  return a == b ? a : DType::f32;
}

inline float float_of_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t bits_of_float(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

inline float to_float(float f) {
  return f;
}
inline float to_float(Bf16 h) {
  return float_of_bits(uint32_t(h.bits) << 16);
}
// Exact; a NaN becomes quiet and keeps its payload, as F16C has it.
inline float to_float(F16 h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000) << 16, magnitude = h.bits & 0x7fff;
  uint32_t bits;
  if (magnitude < 0x0400) {  // subnormal: magnitude * 2^-24
    bits = bits_of_float(float(magnitude) * 0x1p-24f);
  } else if (magnitude <= 0x7c00) {
    bits = (magnitude << 13) + (magnitude == 0x7c00 ? 0x70000000 : 0x38000000);
  } else {
    bits = magnitude << 13 | 0x7fc00000;
  }
  return float_of_bits(sign | bits);
}

// f rounded to nearest, ties to even; NaN stays NaN (quiet, never rounded up to infinity).
template <class T>
T from_float(float f);
template <>
inline float from_float<float>(float f) {
  return f;
}
template <>
inline Bf16 from_float<Bf16>(float f) {
  const uint32_t bits = bits_of_float(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}
template <>
inline F16 from_float<F16>(float f) {
  const uint32_t bits = bits_of_float(f), magnitude = bits & 0x7fffffffu;
  const uint32_t sign = bits >> 16 & 0x8000u;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = (magnitude >> 13 & 0x3ffu) | 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // 2^-14: a normal half
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  } else {  // the unit of the last place of 0.5 is 2^-24, a half's smallest number
    half = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
  }
  return {uint16_t(sign | half)};
}

// f(pointer to elements) for the elements' own type.
template <class F>
inline auto with_type(DType t, void* data, const F& f) {
  switch (t) {
    case DType::bf16:
      return f(static_cast<Bf16*>(data));
    case DType::f16:
      return f(static_cast<F16*>(data));
    default:
      return f(static_cast<float*>(data));
  }
}

inline float load_float(const void* p, int64_t i, DType t) {
  return with_type(t, const_cast<void*>(p), [&](const auto* x) { return to_float(x[i]); });
}

inline void store_float(void* p, int64_t i, DType t, float value) {
  with_type(t, p, [&]<class T>(T* x) { x[i] = from_float<T>(value); });
}

}  // namespace tilewright
