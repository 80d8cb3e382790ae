// bfloat16 GEMM micro-kernel:  tile (MR, NR) = sum over k of a[k][i] . b[k][j]
//
// The float32 kernel's tile (simd/gemm_kernel.cc) with words of two bfloat16, neighbours along K:
// one instruction multiplies both and adds them, so that a step does twice the work and a panel
// takes half the memory.
//
// MR, NR, KC: simd/tile.h; a block is 2 KC elements deep.
//
// Numerics: products are exact in float32; each instruction adds the second product of a pair, then
// the first, rounding twice; k ascending, one chain of at most KC words, then one addition for each
// further block of K. Subnormal inputs count as zero and subnormal sums become zero, as the
// instruction has it.
//
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, VDPBF16PS.
#include "cpu/kernel_table.h"

// Compiled at every level, empty where there is no such instruction.
#if defined(ISA_avx512_bf16)

#include "simd/dot_bf16.h"
#include "simd/pack_pairs.h"
#include "simd/tile.h"

namespace tilewright::ISA {
namespace {

constexpr int MR = kFloatRows;
constexpr int kFewRows = 8, kAhead = 2048;  // as in simd/gemm_kernel.cc

template <int Rows>
void tile_rows(int64_t kc, const uint32_t* a, const uint32_t* b, const TileOut& out) {
  Vec acc[Rows][kVectors] = {};
  Ahead ahead(out, b);
  for (int64_t k = 0; k < kc; ++k, a += Rows, b += NR) {
    if (Rows == MR) {
      ahead.fetch();
    } else {
      __builtin_prefetch(b + kAhead);
      __builtin_prefetch(b + kAhead + kWidth);
    }
    VecU line[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) memcpy(&line[v], b + v * kWidth, sizeof line[v]);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const VecU ai = a[i] - VecU{};
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[i][v] = add_dot_bf16(acc[i][v], ai, line[v]);
    }
  }
  put_tile(acc, out);
}

// The smallest unrolled kernel that covers mr rows, and the width of their panel.
constexpr int rows_for(int mr) {
  return mr <= 2 ? mr : mr <= 4 ? 4 : mr <= kFewRows ? kFewRows : MR;
}

void tile(int mr, int64_t kc, const void* a, const void* b, int64_t, const TileOut& out) {
  const auto pa = static_cast<const uint32_t*>(a), pb = static_cast<const uint32_t*>(b);
  switch (rows_for(mr)) {
    case 1:
      return tile_rows<1>(kc, pa, pb, out);
    case 2:
      return tile_rows<2>(kc, pa, pb, out);
    case 4:
      return tile_rows<4>(kc, pa, pb, out);
    case kFewRows:
      return tile_rows<kFewRows>(kc, pa, pb, out);
    default:
      return tile_rows<MR>(kc, pa, pb, out);
  }
}

// --- packing: a word is a pair of neighbours along K ---------------------------------------------

void pack_a(const Matrix& a, int64_t i, int mr, int64_t k, int64_t kc, int64_t K, void* panel) {
  const auto src = static_cast<const uint16_t*>(a.data) + i * a.row + 2 * k * a.col;
  pack_words(src, a.row, a.col, rows_for(mr), mr, kc, K - 2 * k, static_cast<uint32_t*>(panel));
}

// Words (kc / 2, NR) as floats (kc, NR).
void widen(const void* words, int64_t kc, float* panel) {
  const auto pairs = static_cast<const uint32_t*>(words);
  for (int64_t k = 0; k < kc; ++k) {
    for (int j = 0; j < NR; j += kWidth) {
      VecU w;
      memcpy(&w, pairs + k / 2 * NR + j, sizeof w);
      store(panel + k * NR + j, (Vec)(k % 2 ? w & 0xffff0000u : w << 16));
    }
  }
}

}  // namespace

void fill_gemm_bf16(KernelTable& table) {
  GemmKernels& g = table.gemm_bf16;
  g = table.gemm_f32;
  g.names = {"gemm_bf16", "gemm_bf16_packed", nullptr, nullptr};
  g.k_per_word = 2;
  g.tile = tile, g.pack_a = pack_a, g.pack_b = table.weights.pack, g.widen = widen;
}

}  // namespace tilewright::ISA

#endif
