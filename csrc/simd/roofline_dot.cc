// The limits of products of narrow numbers in registers: neighbours along K multiplied and summed.
//
//   multiply_add_int8   chain[c] = one + products of (chain[c], b), summed in a lane
//   multiply_add_bf16   chain[c] = chain[c] + both products of (a, b)
//
//   products a lane   int8: 4 where one instruction takes bytes, else 2    bfloat16: 2
//
// Parameter  bounded by
// kChains    below: latency x issue rate (6 x 2 on the CPUs of today); above: the register file
//            less the operands
//
// Numerics: an int8 chain enters its own product, so that none is loop-invariant; bfloat16 chains
// add 2^-31 to themselves, and so stay near their start.
//
// Method: as simd/roofline.cc.
#include "cpu/kernel_table.h"
#include "simd/dot_bf16.h"
#include "simd/dot_s8.h"

namespace tilewright::ISA {
namespace {

constexpr int kChains = kRegisters * 3 / 4;

#if defined(ISA_avx512_bf16)

float multiply_add_bf16(int64_t steps) {
  const VecU tiny = 0x2f802f80u - VecU{}, one = 0x3f803f80u - VecU{};  // 2^-32 and 1, in pairs
  Vec chain[kChains];
  for (int c = 0; c < kChains; ++c) chain[c] = broadcast(1.0f + float(c));
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 24
    for (int c = 0; c < kChains; ++c) chain[c] = add_dot_bf16(chain[c], tiny, one);
  }
  Vec sum = {};
  for (int c = 0; c < kChains; ++c) sum = sum + chain[c];
  return reduce_add(sum);
}

#else

#if defined(ISA_avx512_vnni)
constexpr int kProducts = 4;
TW_INLINE VecU add_products(VecU acc, VecU a, VecU b) {
  return add_bytes(acc, a, b);
}
#else
constexpr int kProducts = 2;
TW_INLINE VecU add_products(VecU acc, VecU a, VecU b) {
  return add_dot(acc, (VecP)a, (VecP)b);
}
#endif

float multiply_add_int8(int64_t steps) {
  const VecU one = (VecU)broadcast_int(1), b = 0x00030005u - VecU{};
  VecU chain[kChains];
  for (int c = 0; c < kChains; ++c) chain[c] = (VecU)broadcast_int(c);
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 24
    for (int c = 0; c < kChains; ++c) chain[c] = add_products(one, chain[c], b);
  }
  VecU sum = {};
  for (int c = 0; c < kChains; ++c) sum = sum + chain[c];
  return reduce_add(to_float((VecI)sum));
}

#endif

}  // namespace

void fill_roofline_dot(KernelTable& table) {
  RooflineKernels& k = table.roofline;
#if defined(ISA_avx512_bf16)
  k.multiply_add_bf16 = multiply_add_bf16, k.bf16_flops_per_step = kChains * kWidth * 4;
#else
  k.multiply_add_int8 = multiply_add_int8, k.int8_ops_per_step = kChains * kWidth * kProducts * 2;
#endif
}

}  // namespace tilewright::ISA
