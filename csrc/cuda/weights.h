// Quantized weights as operand b of a product:  b(k, j) = scale(g, j) * q(k, j) + offset(g, j),
// g = k / group. Integers of 8 bits, or of 4: two along K a byte, the lower nibble first.
#pragma once
#include "cuda/tiles.h"
#include "tilewright/ops.h"

namespace tilewright::cuda {

// (groups, N) numbers, or one for all.
struct Scales {
  const float* data = nullptr;
  std::int64_t group_stride = 0, column_stride = 0;

  __device__ float at(std::int64_t group, std::int64_t column) const {
    return data[group * group_stride + column * column_stride];
  }
};

struct Weights {
  const void* data;
  bool is_signed, async;  // async: always false; elements have to be unpacked
  int bits;
  std::int64_t line_stride, k_stride;  // of bytes
  std::int64_t group;                  // neighbours along K that share a scale
  std::int64_t groups;
  Scales scale, offset;  // offset without data where there is none

  __device__ int integer(std::int64_t line, std::int64_t k) const {
    const std::int64_t byte = line * line_stride + (bits == 4 ? k / 2 : k) * k_stride;
    const int value = static_cast<const std::uint8_t*>(data)[byte];
    if (bits == 8) return is_signed ? static_cast<std::int8_t>(value) : value;
    const int nibble = k % 2 ? value >> 4 : value & 15;
    return is_signed ? (nibble ^ 8) - 8 : nibble;
  }
  // Rounded once, as dequantize does.
  __device__ float number(std::int64_t line, std::int64_t k) const {
    const std::int64_t g = k / group;
    const float q = static_cast<float>(integer(line, k)), s = scale.at(g, line);
    return offset.data ? fmaf(s, q, offset.at(g, line)) : s * q;
  }
  template <class T>
  __device__ T at(std::int64_t line, std::int64_t k) const {
    if constexpr (sizeof(T) == 1) {
      return static_cast<T>(integer(line, k));
    } else {
      return number(line, k);
    }
  }
};

// From a checked view (ops/qgemm.h).
inline Weights weights_of(const QuantizedView& b) {
  const bool grouped = b.group > 0 && b.group < b.K;
  const auto scales = [&](const View& v) -> Scales {
    if (!v) return {};
    return {v.ptr<float>(), v.rank == 2 ? v.stride[0] : 0, v.rank ? v.stride[v.rank - 1] : 0};
  };
  const std::int64_t group = grouped ? b.group : b.K > 0 ? b.K : 1;
  return {
      b.data.data,      b.data.dtype == DType::s8, false, b.bits,
      b.data.stride[1], b.data.stride[0],          group, b.K > 0 ? (b.K + group - 1) / group : 0,
      scales(b.scale),  scales(b.offset)};
}

}  // namespace tilewright::cuda
