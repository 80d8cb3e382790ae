// Panels of B with four neighbours along K in a lane, made of lines of int8 pairs or of the matrix's own
// rows on their way into the first cache:
//
//   pairs, two lines:  | j0 j1 j2 ... |  (k, k + 1)       interleaved   | j0 | j0 | j1 | j1 | ...
//                      | j0 j1 j2 ... |  (k + 2, k + 3)                 four bytes a column
//
// The words in memory stay pairs, whichever kernels read them: everything that makes panels or reads
// them as floats (simd/weights.cc) works on with them.
#pragma once
#include "cpu/kernels_gemm.h"
#include "simd/tile.h"

namespace tilewright::ISA {
namespace {

#if defined(ISA_avx512)
constexpr int64_t kQuadLine = 4 * NR;  // bytes: four of a column, and two lines of pairs

typedef uint16_t Halves __attribute__((vector_size(2 * NR)));

// Lines x and y, column by column: the first and the second half of the columns.
TW_INLINE void put_interleaved(Halves x, Halves y, char* to) {
  Halves low, high;
  for (int i = 0; i < NR / 2; ++i) {
    low[2 * i] = uint16_t(i), low[2 * i + 1] = uint16_t(NR + i);
    high[2 * i] = uint16_t(NR / 2 + i), high[2 * i + 1] = uint16_t(NR + NR / 2 + i);
  }
  const Halves left = __builtin_shuffle(x, y, low), right = __builtin_shuffle(x, y, high);
  memcpy(to, &left, sizeof left);
  memcpy(to + 64, &right, sizeof right);
}
TW_INLINE Halves halves_at(const void* p) {
  Halves h;
  memcpy(&h, p, sizeof h);
  return h;
}

// Row k of bytes and the next one, in pairs.
TW_INLINE Halves byte_pairs(const ColumnPanel& p, int64_t k) {
  typedef uint8_t Bytes __attribute__((vector_size(NR)));
  const auto row = static_cast<const char*>(p.b) + k * p.ldb;
  Bytes x = {}, y = {};
  if (k < p.elements) memcpy(&x, row, sizeof x);
  if (k + 1 < p.elements) memcpy(&y, row + p.ldb, sizeof y);
  return __builtin_convertvector(x, Halves) | __builtin_convertvector(y, Halves) << 8;
}

// Words [from, end) of the panel as lines of quads, zero beyond the matrix.
TW_INLINE void put_quads(const ColumnPanel& p, int64_t from, int64_t end, char* to) {
  const ColumnPanel panel = p;  // as far as the compiler knows, what is written could be p
  const auto pairs = static_cast<const char*>(panel.b);
  int64_t k = from;
  if (!panel.in_place) {
    for (; k < end && k + 1 < panel.kc; k += 2) {
      const char* const lines = pairs + k * 2 * NR;
      put_interleaved(halves_at(lines), halves_at(lines + 2 * NR), to + k / 2 * kQuadLine);
    }
    if (k < end) {
      const Halves last = k < panel.kc ? halves_at(pairs + k * 2 * NR) : Halves{};
      put_interleaved(last, Halves{}, to + k / 2 * kQuadLine);
    }
    return;
  }
  for (; k < end; k += 2) {
    put_interleaved(byte_pairs(panel, 2 * k), byte_pairs(panel, 2 * k + 2), to + k / 2 * kQuadLine);
  }
}
#endif

}  // namespace
}  // namespace tilewright::ISA
