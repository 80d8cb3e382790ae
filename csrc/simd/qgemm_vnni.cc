// Int8 GEMM micro-kernel of four products an instruction:
//
//   tile (MR, NR) = sum over k of a[k][i] . b[k][j], exact in int32
//
// vpdpbusd multiplies unsigned bytes by signed ones. A's are made unsigned by adding 128 where they
// are packed, and what that adds is taken away before anything is added:
//
//   sum a b = sum (a + 128) b - 128 sum b         the accumulators start at -128 times the sums of
//                                                 B's columns, modulo 2^32; at 0 where a is uint8
//
//   A's panel (kc / 2, MR)       four neighbours along K a word, broadcast
//   B's panel: a line of starts, then (kc / 2, NR): four of a column a lane (simd/quads.h), made once
//              for each block of rows and block of K, in L1
//
// Each step loads one line of b and broadcasts MR words of a: MR * 2 instructions of four products,
// twice the products of the pairs in simd/qgemm_kernel.cc, and in half the bytes of A.
//
// Parameter  bounded by
// MR x NR    registers: 28 accumulators, 2 of b, 2 of a (14 x 32)
// KC         words of two elements: B's panel, KC x NR x 2 bytes (32 KB), in L1; deeper blocks mean
//            fewer tiles to begin and end, each about 60 cycles of 3600
// MC         what it costs to make B's panel is shared by MC / MR tiles (336: 24 of them); A's block
//            (MC x KC x 2 bytes = 344 KB) in L2
//
// Numerics: integers, exact modulo 2^32: the bits of qgemm_kernel.cc. vpmaddubsw, which AVX2 has
// besides, saturates and is not used.
// Not handled: groups and offsets along K, which read the pairs (gemm_s8, gemm_u8).
//
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, VPDPBUSD; the compensation of
// signed bytes is oneDNN's.
#include "cpu/kernel_table.h"

// Compiled at every level, empty where there is no such instruction.
#if defined(ISA_avx512_vnni)

#include "simd/dot_s8.h"
#include "simd/pack.h"
#include "simd/quads.h"

namespace tilewright::ISA {
namespace {

constexpr int MR = kPairRows;

template <int Rows>
void tile_rows(int64_t lines, const uint32_t* a, const uint32_t* b, const TileOut& out) {
  VecU acc[Rows][kVectors];
  Ahead ahead(out, b);
  ahead.step *= 2;  // words of two elements
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) acc[i][v] = load_words(b + v * kWidth);
  }
  b += NR;
  for (; lines > 0; --lines, a += MR, b += NR) {
    if (Rows == MR) ahead.fetch();
    VecU line[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) line[v] = load_words(b + v * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const VecU ai = a[i] - VecU{};
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[i][v] = add_bytes(acc[i][v], ai, line[v]);
    }
  }
  put_tile(acc, out);
}

// The smallest unrolled kernel that covers mr rows.
void tile(int mr, int64_t kc, const void* a, const void* b, int64_t, const TileOut& out) {
  const auto pa = static_cast<const uint32_t*>(a), pb = static_cast<const uint32_t*>(b);
  const int64_t lines = (kc + 1) / 2;
  if (mr == 1) return tile_rows<1>(lines, pa, pb, out);
  if (mr == 2) return tile_rows<2>(lines, pa, pb, out);
  if (mr <= 4) return tile_rows<4>(lines, pa, pb, out);
  if (mr <= 8) return tile_rows<8>(lines, pa, pb, out);
  tile_rows<MR>(lines, pa, pb, out);
}

// --- packing -------------------------------------------------------------------------------------

// What makes bytes unsigned: 128 is added to each of a word's, or nothing.
template <class T>
constexpr uint32_t kFlip = T(-1) < T(0) ? 0x80808080u : 0u;

// K is contiguous: up to kWidth words of every row, of which the last may lack bytes.
template <class T>
void pack_along_k(const T* src, int64_t row, int mr, int64_t bytes, uint32_t* words) {
  Vec r[kWidth] = {};
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    if (i < mr) r[i] = (Vec)((VecU)load_bytes(src + i * row, bytes) ^ kFlip<T>);
  }
  transpose(r);
#pragma GCC unroll 16
  for (int k = 0; k < kWidth; ++k) {
    if (4 * k < bytes) store_words(words + k * MR, (VecU)r[k]);
  }
}

// Any strides, word by word; rows that are neighbours in memory as vectors.
template <class T>
void pack_across(const T* src, int64_t row, int64_t col, int mr, int64_t count, uint32_t* words) {
  for (int64_t k = 0; k < count; k += 4, words += MR) {
    const int n = count - k < 4 ? int(count - k) : 4;
    VecU word = {};
    for (int e = 0; e < n; ++e) {
      const T* const p = src + (k + e) * col;
      VecU bytes = {};
      if (row == 1) {
        bytes = first_bytes(p, mr);
      } else {
        for (int i = 0; i < mr; ++i) bytes[i] = uint8_t(p[i * row]);
      }
      word |= bytes << (8 * e);
    }
    store_words(words, word ^ kFlip<T>);
  }
}

template <class T>
void pack_a(const Matrix& a, int64_t i, int mr, int64_t k, int64_t kc, int64_t K, void* panel) {
  static_assert(MR <= kWidth, "a line is one vector, whose surplus falls into the next line");
  const int64_t left = K - 2 * k, count = 2 * kc < left ? 2 * kc : left;
  const T* const src = static_cast<const T*>(a.data) + i * a.row + 2 * k * a.col;
  const auto words = static_cast<uint32_t*>(panel);
  if (a.col != 1) return pack_across(src, a.row, a.col, mr, count, words);
  for (int64_t at = 0; at < count; at += 4 * kWidth) {
    pack_along_k(src + at, a.row, mr, count - at, words + at / 4 * MR);
  }
}

// starts -= 128 times the sums of the columns, where A's bytes have 128 added.
TW_INLINE void take_sums(const char* quads, int64_t lines, uint32_t* starts) {
  constexpr int kChains = 4;  // of each vector: one alone would wait for itself
  VecU sum[kChains][kVectors] = {};
  for (int64_t k = 0; k < lines; k += kChains) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      if (k + c >= lines) break;
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        VecU line;
        memcpy(&line, quads + (k + c) * kQuadLine + v * sizeof line, sizeof line);
        sum[c][v] = add_bytes(sum[c][v], kFlip<int8_t> - VecU{}, line);
      }
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    uint32_t* const to = starts + v * kWidth;
    store_words(to, load_words(to) - (sum[0][v] + sum[1][v]) - (sum[2][v] + sum[3][v]));
  }
}

// Quads after the line of starts, which take in the columns' sums as they are made.
template <class T>
void prepare(const ColumnPanel& p, int64_t from, int64_t end) {
  const auto starts = static_cast<uint32_t*>(p.panel);
  char* const quads = static_cast<char*>(p.panel) + kQuadLine;
  put_quads(p, from, end, quads);
  if (from == 0) memset(starts, 0, kQuadLine);
  if (kFlip<T> != 0) take_sums(quads + from / 2 * kQuadLine, (end - from) / 2, starts);
}

template <class T>
GemmKernels quad_kernels(const GemmKernels& pairs) {
  GemmKernels g = pairs;
  g.names.in_place = "gemm_s8_in_place";
  g.KC = 512, g.MC = 336, g.a_bytes = 2, g.k_step = 2;
  g.tile = tile, g.pack_a = pack_a<T>;
  g.prepare = prepare<T>, g.prepared_bytes = 2, g.starts = true;
  return g;
}

}  // namespace

void fill_qgemm_vnni(KernelTable& table) {
  table.gemm_s8_once = quad_kernels<int8_t>(table.gemm_s8);
  table.gemm_u8_once = quad_kernels<uint8_t>(table.gemm_u8);
}

}  // namespace tilewright::ISA

#endif
