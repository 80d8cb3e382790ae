// Int8 GEMM micro-kernel of four products an instruction, on panels as qgemm_kernel.cc packs them:
//
//   tile (MR, NR) = sum over k of a[k][i] . b[k][j], exact in int32, a and b int8
//
//   b, two lines:  | j0 j1 j2 ... |  pairs (k, k + 1)       interleaved   | j0 | j0 | j1 | j1 | ...
//                  | j0 j1 j2 ... |  pairs (k + 2, k + 3)   in registers  four bytes a column
//   a, two lines:  int16 pairs, cut to int8 and interleaved the same way: four bytes a row, whose
//                  lane the instruction multiplies with every column
//
// The words in memory are those of the pair products, so that everything that reads or makes panels
// (weights of 4 bits, groups, sums of rows) works on with them. What the interleaving adds: 1
// instruction for each 4 rows and each 4 columns, beside 2 MR products.
//
// MR, NR, KC: simd/tile.h (8 x 8: 16 accumulators, 2 of b, 2 of a, of 32).
// Numerics: integers, exact modulo 2^32 in any order: the bits of qgemm_kernel.cc.
// Not handled: uint8 a, whose upper half no int8 holds; gemm_u8 stays with the pairs.
//
// Source: Arm, "Exploring the Arm dot product instructions" (2017).
#include "cpu/kernel_table.h"
#include "simd/dot_s8.h"
#include "simd/tile.h"

// Compiled at every level, empty where there is no such instruction.
#if defined(ISA_neon_dot)

namespace tilewright::ISA {
namespace {

constexpr int MR = kPairRows;

// Lines k and k + 1 of words, or k and zeros.
template <int Rows>
TW_INLINE void add_lines(const uint32_t* a, const int8_t* b, bool both,
                         VecU (&acc)[Rows][kVectors]) {
  const VecQ first = load_bytes(b), second = both ? load_bytes(b + 2 * NR) : VecQ{};
  const VecQ columns[kVectors] = {low_quads(first, second), high_quads(first, second)};
#pragma GCC unroll 2
  for (int i = 0; i < Rows; i += kWidth) {
    const VecQ rows = narrow_quads(load_bytes(a + i), both ? load_bytes(a + MR + i) : VecQ{});
#pragma GCC unroll 4
    for (int lane = 0; lane < kWidth; ++lane) {
      if (i + lane == Rows) break;
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        acc[i + lane][v] = add_quads(acc[i + lane][v], columns[v], rows, lane);
      }
    }
  }
}

template <int Rows>
void tile_rows(int64_t kc, const uint32_t* a, const int8_t* b, const TileOut& out) {
  VecU acc[Rows][kVectors] = {};
  for (int64_t k = 0; k < kc; k += 2, a += 2 * MR, b += 4 * NR) {
    add_lines(a, b, k + 1 < kc, acc);  // one place: with two, the sums wander between registers
  }
  put_tile(acc, out);
}

void tile(int mr, int64_t kc, const void* a, const void* b, int64_t, const TileOut& out) {
  const auto pa = static_cast<const uint32_t*>(a);
  const auto pb = static_cast<const int8_t*>(b);
  if (mr == 1) return tile_rows<1>(kc, pa, pb, out);
  if (mr == 2) return tile_rows<2>(kc, pa, pb, out);
  if (mr <= 4) return tile_rows<4>(kc, pa, pb, out);
  tile_rows<MR>(kc, pa, pb, out);
}

}  // namespace

void fill_qgemm_dot(KernelTable& table) {
  table.gemm_s8.tile = table.gemm_s8_once.tile = tile;
}

}  // namespace tilewright::ISA

#endif
