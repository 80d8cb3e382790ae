// The machine's limits at this level: multiply-adds a second from registers, bytes a second.
//
//   multiply_add        chain[c] = fma(chain[c], a, b)          c = 0 ... kChains - 1
//   multiply_add_int8   chain[c] = one + pair products of (chain[c], b), as the int8 GEMM's
//   read                sum[c] += p[i + c * kWidth]             one load a vector
//   copy                q[i] = p[i]                             stores that read the line first
//
// Parameter  bounded by
// kChains    below: latency x issue rate of a multiply-add (4 x 2 on the CPUs of today; 6 x 2 for
//            the pair product and its addition); above: the register file less the operands
// kSums      latency x issue rate of the addition, and the line fill buffers
//
// Numerics: a and b keep every float chain near 1, away from subnormals and infinities, whose
// speed is another. A chain enters its own product, so that no product is loop-invariant.
//
// Not handled: what the clock does meanwhile; the caller takes the best of many short runs.
//
// Method: Williams, Waterman & Patterson, "Roofline" (2009).
#include "cpu/kernel_table.h"
#include "simd/dot_s8.h"
#include "simd/vec.h"

namespace tilewright::ISA {
namespace {

constexpr int kChains = kRegisters * 3 / 4;
constexpr int kSums = 8;

float multiply_add(int64_t steps) {
  const Vec a = broadcast(0.999f), b = broadcast(0.001f);
  Vec chain[kChains];
  for (int c = 0; c < kChains; ++c) chain[c] = broadcast(1.0f + float(c));
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 24
    for (int c = 0; c < kChains; ++c) chain[c] = fma(chain[c], a, b);
  }
  Vec sum = {};
  for (int c = 0; c < kChains; ++c) sum = sum + chain[c];
  return reduce_add(sum);
}

float multiply_add_int8(int64_t steps) {
  const VecU one = (VecU)broadcast_int(1);
  const VecP b = broadcast_pair(0x00030005);
  VecU chain[kChains];
  for (int c = 0; c < kChains; ++c) chain[c] = (VecU)broadcast_int(c);
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 24
    for (int c = 0; c < kChains; ++c) chain[c] = add_dot(one, (VecP)chain[c], b);
  }
  VecU sum = {};
  for (int c = 0; c < kChains; ++c) sum = sum + chain[c];
  return reduce_add(to_float((VecI)sum));
}

float read(const float* p, int64_t count) {
  Vec sum[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kWidth <= count; i += kSums * kWidth) {
#pragma GCC unroll 8
    for (int c = 0; c < kSums; ++c) sum[c] = sum[c] + load(p + i + c * kWidth);
  }
  for (; i < count; ++i) sum[0] = sum[0] + p[i];
  for (int c = 1; c < kSums; ++c) sum[0] = sum[0] + sum[c];
  return reduce_add(sum[0]);
}

void copy(const float* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + kSums * kWidth <= count; i += kSums * kWidth) {
#pragma GCC unroll 8
    for (int c = 0; c < kSums; ++c) store(to + i + c * kWidth, load(from + i + c * kWidth));
  }
  for (; i < count; ++i) to[i] = from[i];
}

}  // namespace

void fill_roofline(KernelTable& table) {
  constexpr int64_t lanes = kChains * kWidth;
  RooflineKernels& k = table.roofline;
  k.multiply_add = multiply_add, k.flops_per_step = lanes * 2;
  k.multiply_add_int8 = multiply_add_int8, k.int8_ops_per_step = lanes * 4;
  k.read = read, k.copy = copy;
}

}  // namespace tilewright::ISA
