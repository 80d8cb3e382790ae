// Float32 GEMM micro-kernel:  tile (MR, NR) = sum over k of a[k][i] * b[k][j]
//
//            NR = 2 vectors
//          +--------+--------+              The tile stays in registers while k runs. Each step loads
//       a  | acc    | acc    |  MR rows     one line of b (2 vectors) and broadcasts MR words of a:
//   k ->   +--------+--------+              MR * 2 fused multiply-adds for MR + 2 loads.
//
// a is a packed panel, or the matrix's own rows where packing them would cost more than it gains
// (cpu/gemm_block.cc); the sums are the same.
//
// Parameter    bounded by
// MR, NR, KC   simd/tile.h, which also adds the sums to those of the blocks of K before, and fetches the
//              next panel of B
// kAhead       words of b asked for ahead, for few rows: they wait for memory, and the hardware asks for
//              nothing beyond a page of 4 KiB. Below: its latency times its bandwidth; above: L2
//
// Numerics: float32 accumulation, k ascending, one chain of at most KC fused multiply-adds an
// element (generic: multiply, then add); then one addition per further block of K. No other order
// exists: every row count runs this same chain, so a row's bits depend on that row alone. Operands
// of 16 bits are widened exactly while packing.
//
// Method: Goto & van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008); Van Zee
// & van de Geijn, BLIS (2015).
#include "cpu/kernel_table.h"
#include "simd/activation.h"
#include "simd/elements.h"
#include "simd/matrix_rows.h"
#include "simd/pack.h"
#include "simd/tile.h"

namespace tilewright::ISA {
namespace {

constexpr int MR = kFloatRows;
constexpr int kFewRows = 8, kAhead = 2048;

// The words of a for one k after the other, of a packed panel; matrix_rows.h: of the matrix's rows.
template <int Rows>
struct PackedRows {
  static constexpr bool kPacked = true;
  const float* at;
  TW_INLINE Scalars<Rows> words() const { return Scalars<Rows>(at); }
  TW_INLINE void step() { at += MR; }
};

template <int Rows, class Left>
TW_INLINE void tile_rows(int64_t kc, Left a, const float* b, int64_t ldb, const TileOut& out) {
  Vec acc[Rows][kVectors] = {};
  Ahead ahead(out, b);
  for (int64_t k = 0; k < kc; ++k, a.step(), b += ldb) {
    if (Rows == MR) {
      if (Left::kPacked) ahead.fetch();
    } else {
      __builtin_prefetch(b + kAhead);
      __builtin_prefetch(b + kAhead + kWidth);
    }
    Vec line[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) line[v] = load(b + v * kWidth);
    const auto words = a.words();
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const Vec ai = words[i];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[i][v] = fma(ai, line[v], acc[i][v]);
    }
  }
  put_tile(acc, out);
}

template <int Rows>
void packed_rows(int64_t kc, const float* a, const float* b, int64_t ldb, const TileOut& out) {
  tile_rows<Rows>(kc, PackedRows<Rows>{a}, b, ldb, out);
}

// The smallest unrolled kernel that covers mr rows: few rows do few multiply-adds.
void tile(int mr, int64_t kc, const void* a, const void* b, int64_t ldb, const TileOut& out) {
  const auto pa = static_cast<const float*>(a), pb = static_cast<const float*>(b);
  if (mr == 1) return packed_rows<1>(kc, pa, pb, ldb, out);
  if (mr == 2) return packed_rows<2>(kc, pa, pb, ldb, out);
  if (mr <= 4) return packed_rows<4>(kc, pa, pb, ldb, out);
  if constexpr (MR > 8) {
    if (mr <= 8) return packed_rows<8>(kc, pa, pb, ldb, out);
  }
  packed_rows<MR>(kc, pa, pb, ldb, out);
}

// Rows of a, of the tile and of the sums before, or null: one by one, for to copy a TileOut that has
// just been written would wait.
struct InPlace {
  int mr;
  const float* a;
  float* tile;
  const float* sum;
};

// Rows at a time while there are as many, and no row beyond them.
template <int Rows>
TW_INLINE void matrix_rows(InPlace& p, int64_t kc, int64_t lda, const float* b, int64_t ldb,
                           int64_t ldt) {
  for (; p.mr >= Rows; p.mr -= Rows, p.a += Rows * lda, p.tile += Rows * ldt) {
    tile_rows<Rows>(kc, MatrixRows<Rows>(p.a, lda), b, ldb, {p.tile, ldt, p.sum});
    if (p.sum) p.sum += Rows * NR;
  }
}

// The same sums with a's rows where they are, lda words apart.
void tile_in_place(int mr, int64_t kc, const float* a, int64_t lda, const float* b, int64_t ldb,
                   const TileOut& out) {
  InPlace p{mr, a, static_cast<float*>(out.data), static_cast<const float*>(out.sum)};
  matrix_rows<MR>(p, kc, lda, b, ldb, out.row);
  if constexpr (MR > 8) matrix_rows<8>(p, kc, lda, b, ldb, out.row);
  matrix_rows<4>(p, kc, lda, b, ldb, out.row);
  matrix_rows<2>(p, kc, lda, b, ldb, out.row);
  matrix_rows<1>(p, kc, lda, b, ldb, out.row);
}

void pack(const Matrix& m, int64_t offset, int64_t line, int64_t step, int width, int count,
          int64_t kc, void* panel) {
  const auto dst = static_cast<float*>(panel);
  with_type(m, [&](const auto* p) { pack_panel(p + offset, line, step, width, count, kc, dst); });
}

void pack_a(const Matrix& a, int64_t i, int mr, int64_t k, int64_t kc, int64_t, void* panel) {
  pack(a, i * a.row + k * a.col, a.row, a.col, MR, mr, kc, panel);
}

void pack_b(const Matrix& b, int64_t j, int nr, int64_t k, int64_t kc, int64_t, void* panel) {
  pack(b, k * b.row + j * b.col, b.col, b.row, NR, nr, kc, panel);
}

// The common case without a look at each vector's place: whole lines, neighbours in memory.
template <class T>
void store_lines(const float* acc, int mr, T* to, int64_t row, const float* bias) {
  Vec shift[kVectors] = {};
  if (bias) {
    for (int v = 0; v < kVectors; ++v) shift[v] = load(bias + v * kWidth);
  }
  for (int i = 0; i < mr; ++i, acc += NR, to += row) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const Vec y = load(acc + v * kWidth);
      store(to + v * kWidth, bias ? y + shift[v] : y);
    }
  }
}

void store_tile(const void* tile, int64_t i0, int mr, int64_t j0, int nr, const Epilogue& e) {
  const auto acc = static_cast<const float*>(tile);
  if (nr == NR && e.out.col == 1 && e.alpha == 1.0f && e.activation == Activation::none &&
      !e.residual.data) {
    const float* const bias = e.bias ? e.bias + j0 : nullptr;
    return with_type(
        e.out, [&](auto* p) { store_lines(acc, mr, p + i0 * e.out.row + j0, e.out.row, bias); });
  }
  for (int i = 0; i < mr; ++i) {
    for (int j = 0; j < nr; j += kWidth) {
      const int n = nr - j < kWidth ? nr - j : kWidth;
      Vec y = load(acc + i * NR + j);
      if (e.alpha != 1.0f) y = y * e.alpha;
      if (e.bias) y = y + (n == kWidth ? load(e.bias + j0 + j) : load_partial(e.bias + j0 + j, n));
      y = activate(e.activation, y);
      if (e.residual.data) y = y + load_elements(e.residual, i0 + i, j0 + j, n);
      store_elements(e.out, i0 + i, j0 + j, n, y);
    }
  }
}

}  // namespace

void fill_gemm(KernelTable& table) {
  table.gemm_f32 = {
      MR,         NR,
      KC,         1,
      4,          tile,
      pack_a,     pack_b,
      store_tile, {"gemm_f32", "gemm_f32_packed", "gemm_f32_in_place", "gemm_f32_int_weights"}};
  if (!kMultipliesByLane) table.gemm_f32.tile_in_place = tile_in_place;
}

}  // namespace tilewright::ISA
