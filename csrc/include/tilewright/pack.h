// Right-hand sides packed once, for products that use them many times:
//
//     const Packed weights = pack(view_of(w.data(), {K, N}));
//     Matmul op;
//     op.a = a, op.packed = weights.get(), op.out = out;  // without b
//     run(op);
//
// A packed matrix never changes: many threads may use one at the same time. It is in the layout of
// the ISA level that was active when it was made; at another level a product refuses it with
// UnsupportedError.
#pragma once
#include <memory>

#include "tilewright/ops.h"

namespace tilewright {

using Packed = std::shared_ptr<const PackedMatrix>;

// b (K, N), any strides: float32, bfloat16 or float16 for Matmul, int8 for Int8Matmul. 16 bits stay
// 16 bits. Levels with matrix units multiply float32 by bfloat16 terms, no less exactly and faster,
// but for few rows, where they take about twice the time; Prefer::latency keeps such a matrix to the
// float32 kernel, for any number of rows. ShapeError unless b has two axes, DtypeError.
enum class Prefer { throughput, latency };
Packed pack(const View& b, Prefer prefer = Prefer::throughput);
// Weights for QuantizedMatmul, both ways to compute; 4 bits stay 4 bits. ShapeError, DtypeError, and
// UnsupportedError for other bits than 4 and 8: what QuantizedView says doesn't hold.
Packed pack(const QuantizedView& b);

struct PackedInfo {
  int64_t K, N;
  DType dtype;      // of the matrix it was made from; of a quantized one that of its data
  int bits;         // of a quantized matrix: 8 or 4; of others 0
  const char* isa;  // the level whose layout this is
  int64_t nbytes;
};
PackedInfo info(const PackedMatrix& b);

// out (K, N) float32 = the floats that a packed quantized matrix stands for. ShapeError, DtypeError
// (also where b is not of a QuantizedView), UnsupportedError at another ISA level.
void unpack(const PackedMatrix& b, const View& out);

}  // namespace tilewright
