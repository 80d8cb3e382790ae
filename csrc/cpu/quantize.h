// Quantization of arrays of any strides, an integer a byte.
#pragma once
#include "cpu/kernels_quantize.h"
#include "tilewright/view.h"

namespace tilewright::cpu {

// s = range / levels, or 1 where that is 0.
float scale_of(float range, float levels);

// data = x in integers, scale (and offset, which may be absent: symmetric) its one number (axis -1)
// or one for each index of `axis`.
void quantize(const View& x, int axis, int bits, const View& data, const View& scale,
              const View& offset, const QuantizeKernels& kernels);
void dequantize(const View& data, const View& scale, const View& offset, int axis, const View& out,
                const QuantizeKernels& kernels);

// Each row of the leading axes of x (..., K) by itself: data (rows, K) contiguous, scale (rows,).
void quantize_rows(const View& x, int8_t* data, float* scale, const QuantizeKernels& kernels);

}  // namespace tilewright::cpu
