// Int8 GEMM micro-kernel:  tile (MR, NR) = sum over k of a[k][i] . b[k][j], exact in int32
//
//            NR = 2 vectors               A word of k is a pair of neighbours along K. Each step
//          +--------+--------+            loads one line of b (int8 pairs, widened to int16) and
//       a  | acc    | acc    |  MR rows   broadcasts MR words of a (int16 pairs): MR * 2 pair
//   k ->   +--------+--------+            products, twice the multiply-adds of the float32 kernel.
//
// MR, NR, KC: simd/tile.h; a block is 2 KC elements deep, in half the bytes of a float panel.
//
// a is int8 or uint8 and is widened while it is packed (4 bytes a word); b stays int8 in memory (2
// bytes a word, a quarter of the float32 panel), which is what few rows are bound by.
//
// Numerics: integers, exact modulo 2^32 in any order; elements beyond K are zero. The quantized
// epilogue is y = fma(float(acc), scale_a[i] * scale_b[j], bias[j]), then activation, residual, one
// rounding to the output's dtype: the same bits on every level, up to the activation.
// Four products an instruction, where there is one for bytes: simd/qgemm_vnni.cc, qgemm_dot.cc.
// Offsets and scales along K: simd/weights.cc, which multiplies with this tile too.
//
// Method: the float32 kernel's (gemm_kernel.cc); pair products as in gemmlowp and oneDNN.
#include "cpu/kernel_table.h"
#include "simd/activation.h"
#include "simd/dot_s8.h"
#include "simd/elements.h"
#include "simd/pack_pairs.h"
#include "simd/tile.h"

namespace tilewright::ISA {
namespace {

constexpr int MR = kPairRows;

template <int Rows>
void tile_rows(int64_t kc, const uint32_t* a, const int8_t* b, const TileOut& out) {
  VecU acc[Rows][kVectors] = {};
  Ahead ahead(out, b);
  for (int64_t k = 0; k < kc; ++k, a += MR, b += 2 * NR) {
    if (Rows == MR) ahead.fetch();
    VecP line[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) line[v] = load_pairs(b + 2 * v * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const VecP ai = broadcast_pair(a[i]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[i][v] = add_dot(acc[i][v], ai, line[v]);
    }
  }
  put_tile(acc, out);
}

// The smallest unrolled kernel that covers mr rows. b is always packed: its lines are NR apart.
void tile(int mr, int64_t kc, const void* a, const void* b, int64_t, const TileOut& out) {
  const auto pa = static_cast<const uint32_t*>(a);
  const auto pb = static_cast<const int8_t*>(b);
  if (mr == 1) return tile_rows<1>(kc, pa, pb, out);
  if (mr == 2) return tile_rows<2>(kc, pa, pb, out);
  if (mr <= 4) return tile_rows<4>(kc, pa, pb, out);
  if constexpr (MR > 8) {
    if (mr <= 8) return tile_rows<8>(kc, pa, pb, out);
  }
  tile_rows<MR>(kc, pa, pb, out);
}

// --- packing: a word of A is a pair of int16, a word of B a pair of int8 -------------------------

void pack_a(const Matrix& a, int64_t i, int mr, int64_t k, int64_t kc, int64_t K, void* panel) {
  const int64_t at = i * a.row + 2 * k * a.col, left = K - 2 * k;
  const auto words = static_cast<uint32_t*>(panel);
  if (a.dtype == DType::s8) {
    pack_words(static_cast<const int8_t*>(a.data) + at, a.row, a.col, MR, mr, kc, left, words);
  } else {
    pack_words(static_cast<const uint8_t*>(a.data) + at, a.row, a.col, MR, mr, kc, left, words);
  }
}

void pack_b(const Matrix& b, int64_t j, int nr, int64_t k, int64_t kc, int64_t K, void* panel) {
  const auto src = static_cast<const int8_t*>(b.data) + 2 * k * b.row + j * b.col;
  pack_words(src, b.col, b.row, NR, nr, kc, K - 2 * k, static_cast<uint16_t*>(panel));
}

// --- epilogues -----------------------------------------------------------------------------------

void store_integers(const uint32_t* acc, int64_t i0, int mr, int64_t j0, int nr,
                    const Matrix& out) {
  const auto base = static_cast<uint32_t*>(const_cast<void*>(out.data));
  for (int i = 0; i < mr; ++i) {
    uint32_t* p = base + (i0 + i) * out.row + j0 * out.col;
    if (out.col == 1 && nr == NR) {
#pragma GCC unroll 2
      for (int j = 0; j < NR; j += kWidth) store_words(p + j, load_words(acc + i * NR + j));
    } else if (out.col == 1) {
      memcpy(p, acc + i * NR, size_t(nr) * 4);
    } else {
      for (int j = 0; j < nr; ++j) p[j * out.col] = acc[i * NR + j];
    }
  }
}

TW_INLINE Vec load_first(const float* p, int n) {
  return n == kWidth ? load(p) : load_partial(p, n);
}

// The common case without a look at each vector's place: whole lines, neighbours in memory.
template <class T>
void store_lines(const uint32_t* acc, int64_t i0, int mr, int64_t j0, const Epilogue& e, T* to) {
  Vec scale_b[kVectors], bias[kVectors] = {};
  for (int v = 0; v < kVectors; ++v) {
    scale_b[v] = load(e.scale_b + j0 + v * kWidth);
    if (e.bias) bias[v] = load(e.bias + j0 + v * kWidth);
  }
  for (int i = 0; i < mr; ++i, acc += NR, to += e.out.row) {
    const Vec scale_a = broadcast(e.scale_a[i0 + i]);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const Vec scale = scale_a * scale_b[v], sum = to_float((VecI)load_words(acc + v * kWidth));
      const Vec y = e.bias ? fma_once(sum, scale, bias[v]) : sum * scale;
      store(to + v * kWidth, activate(e.activation, y));
    }
  }
}

void store_tile(const void* tile, int64_t i0, int mr, int64_t j0, int nr, const Epilogue& e) {
  const auto acc = static_cast<const uint32_t*>(tile);
  if (e.out.dtype == DType::s32) return store_integers(acc, i0, mr, j0, nr, e.out);
  if (nr == NR && e.out.col == 1 && !e.residual.data) {
    return with_type(e.out,
                     [&](auto* p) { store_lines(acc, i0, mr, j0, e, p + i0 * e.out.row + j0); });
  }
  for (int i = 0; i < mr; ++i) {
    const Vec scale_a = broadcast(e.scale_a[i0 + i]);
    for (int j = 0; j < nr; j += kWidth) {
      const int n = nr - j < kWidth ? nr - j : kWidth;
      const Vec scale = scale_a * load_first(e.scale_b + j0 + j, n);
      Vec y = to_float((VecI)load_words(acc + i * NR + j));
      y = e.bias ? fma_once(y, scale, load_first(e.bias + j0 + j, n)) : y * scale;
      y = activate(e.activation, y);
      if (e.residual.data) y = y + load_elements(e.residual, i0 + i, j0 + j, n);
      store_elements(e.out, i0 + i, j0 + j, n, y);
    }
  }
}

}  // namespace

void fill_qgemm(KernelTable& table) {
  GemmKernels& g = table.gemm_s8;
  g = {MR,   NR,     KC,     2,          2,
       tile, pack_a, pack_b, store_tile, {"gemm_s8", "gemm_s8_packed", nullptr, "gemm_s8_groups"}};
  table.gemm_u8 = table.gemm_s8_once = table.gemm_u8_once = g;
}

}  // namespace tilewright::ISA
