// The machine's limits at this level: multiply-adds a second from registers, bytes a second.
//
//   multiply_add        chain[c] = fma(chain[c], a, b)          c = 0 ... kChains - 1
//   read                sum[c] += p[i + c * kWidth]             one load a vector
//   copy                q[i] = p[i]                             stores that read the line first
//   copy_streaming      q[i] = p[i]                             stores past the caches
//
// Products of narrower numbers: simd/roofline_dot.cc, simd/roofline_amx.cc.
//
// Parameter  bounded by
// kChains    below: latency x issue rate of a multiply-add (4 x 2 on the CPUs of today); above: the
//            register file less the operands
// kSums      latency x issue rate of the addition, and the line fill buffers
//
// Numerics: a and b keep every float chain near 1, away from subnormals and infinities, whose
// speed is another.
//
// Not handled: what the clock does meanwhile; the caller takes the best of many short runs.
//
// Method: Williams, Waterman & Patterson, "Roofline" (2009).
#include "cpu/kernel_table.h"
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

void copy_streaming(const float* from, float* to, int64_t count) {
  constexpr uintptr_t vector_bytes = sizeof(Vec);
  int64_t i = 0;
  for (; i < count && uintptr_t(to + i) % vector_bytes != 0; ++i) to[i] = from[i];
  for (; i + kSums * kWidth <= count; i += kSums * kWidth) {
#pragma GCC unroll 8
    for (int c = 0; c < kSums; ++c) {
      store_streaming(to + i + c * kWidth, load(from + i + c * kWidth));
    }
  }
  end_streaming();
  for (; i < count; ++i) to[i] = from[i];
}

}  // namespace

void fill_roofline(KernelTable& table) {
  constexpr int64_t lanes = kChains * kWidth;
  RooflineKernels& k = table.roofline;
  k.multiply_add = multiply_add, k.flops_per_step = lanes * 2;
  k.read = read, k.copy = copy, k.copy_streaming = copy_streaming;
}

}  // namespace tilewright::ISA
