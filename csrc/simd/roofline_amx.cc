// The limits of matrix units: products of tiles that are there, two sums in turn.
//
//   multiply_add_bf16   each step 2 x 16 x 16 x 32 multiply-adds
//   multiply_add_int8   each step 2 x 16 x 16 x 64
//
// Parameter  bounded by
// 2 sums     tiles in use: the fewer, the better on a core that is shared (simd/amx.h). One sum would do,
//            since products are passed on from one to the next in their 16 cycles
//
// Numerics: numbers of both signs, the bfloat16 in [0.5, 1).
#include "cpu/kernel_table.h"

// Compiled at every level, empty where there are no tiles.
#if defined(ISA_amx)

#include "simd/amx.h"

namespace tilewright::ISA {
namespace {

template <Words w>
void fill(char* to, int64_t bytes) {
  uint32_t random = 1;
  for (int64_t at = 0; at < bytes; at += 4) {
    random = random * 1664525u + 1013904223u;
    const uint32_t word = w == Words::bf16 ? (random & 0x807f807fu) | 0x3f003f00u : random;
    memcpy(to + at, &word, sizeof word);
  }
}

template <Words w>
float multiply(int64_t steps) {
  alignas(64) char numbers[3 * kTileBytes];
  fill<w>(numbers, sizeof numbers);
  begin_tiles();
  clear_sums();
  load_tile<4>(numbers, 64);
  load_tile<6>(numbers + kTileBytes, 64);
  load_tile<7>(numbers + 2 * kTileBytes, 64);
  for (int64_t i = 0; i < steps; ++i) {
    multiply_tiles<w, 0, 4, 6>();
    multiply_tiles<w, 1, 4, 7>();
  }
  alignas(64) float sums[16 * 32];
  store_sums(reinterpret_cast<char*>(sums), 128);
  end_tiles();
  return sums[0];
}

}  // namespace

void fill_roofline_amx(KernelTable& table) {
  constexpr int64_t products = 2 * 16 * 16;
  RooflineKernels& k = table.roofline;
  k.multiply_add_bf16 = multiply<Words::bf16>, k.bf16_flops_per_step = products * 32 * 2;
  k.multiply_add_int8 = multiply<Words::s8>, k.int8_ops_per_step = products * 64 * 2;
}

}  // namespace tilewright::ISA

#endif
