// Quantization of arrays of any strides.
#pragma once
#include "cpu/kernels_quantize.h"
#include "tilewright/view.h"

namespace tilewright::cpu {

// s = range / levels, or 1 where that is 0.
float scale_of(float range, float levels);

// The integers of an array that shares its scales as `axis` says.
struct Integers {
  View data;  // like the array; of 4 bits half as long along `along`, rounded up
  View scale,
      offset;  // one number (axis -1), or one for each index of `axis`; offset may be absent
  int axis, bits;
  int along;        // of 4 bits: the axis of the two integers that share a byte
  bool high_first;  // of 4 bits: the first one along it is the high nibble of the first byte
};

void quantize(const View& x, const Integers& q, const QuantizeKernels& kernels);
void dequantize(const Integers& q, const View& out, const QuantizeKernels& kernels);

// Each row of the leading axes of x (..., K) by itself: data (rows, K) contiguous, scale (rows,).
void quantize_rows(const View& x, int8_t* data, float* scale, const QuantizeKernels& kernels);

}  // namespace tilewright::cpu
