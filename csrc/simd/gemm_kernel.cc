// Float32 GEMM micro-kernel:  tile (MR, NR) = sum over k of a[k][i] * b[k][j]
//
//            NR = 2 vectors
//          +--------+--------+              The tile stays in registers while k runs. Each step loads
//       a  | acc    | acc    |  MR rows     one line of b (2 vectors) and broadcasts MR words of a:
//   k ->   +--------+--------+              MR * 2 fused multiply-adds for MR + 2 loads.
//
// a is a packed panel, or the matrix's own rows where packing them would cost more than it gains
// (cpu/gemm_block.cc); the sums are the same. In place a tile may be wide: 6 rows of 4 vectors, fewer
// loads for a multiply-add, and longer pieces of the output at a time.
//
// Instructions count, not multiply-adds alone: of 49 for 28 multiply-adds a tile reaches 95 % of their
// roof on a quiet core, but 78 % where a neighbour shares it; of 38 it reaches 96 and 87 %. So words are
// multiplied from memory (kWordsInMemory), and kSteps of K share a loop's own instructions.
//
// Parameter    bounded by
// MR, NR, KC   simd/tile.h, which also adds the sums to those of the blocks of K before, and fetches the
//              next panel of B; here also those sums, and in place the rows below and the output
// kWide...     registers: 24 accumulators + 4 of b + a's
// kSteps       above: the store of decoded instructions; 2 gain as much
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

constexpr int MR = kFloatRows, kSteps = 4;
constexpr int kWideRows = 6, kWideVectors = 4;
constexpr bool kWide = kWideVectors * (kWideRows + 1) < kRegisters;
constexpr int kFewRows = 8, kAhead = 2048;

// The words of a for one k after the other, of a packed panel; matrix_rows.h: of the matrix's rows.
template <int Rows>
struct PackedRows {
  static constexpr bool kPacked = true;
  const float* at;
  TW_INLINE Scalars<Rows> words() const { return Scalars<Rows>(at); }
  TW_INLINE void step() { at += MR; }
};

// The sums before, `bytes` of them, asked for while the tile is computed: they come from beyond the first
// cache, and at the end there is nothing to do but wait.
struct SumsAhead {
  const char* at;
  int64_t step;

  TW_INLINE SumsAhead(const TileOut& out, const void* b, int64_t kc, int64_t bytes)
      : at(static_cast<const char*>(out.sum ? out.sum : b)),
        step(out.sum ? bytes * kSteps / kc : 0) {}
  TW_INLINE void fetch() {
    __builtin_prefetch(at);
    at += step;
  }
};

// One step of K.
template <int Rows, int Vectors, class Left>
TW_INLINE void multiply(const Left& a, const float* b, Vec (&acc)[Rows][Vectors]) {
  Vec line[Vectors];
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) line[v] = load(b + v * kWidth);
  const auto words = a.words();
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    if constexpr (Left::kPacked && Rows == MR) {
      if (i < kWordsInMemory) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) acc[i][v] = fma_word(a.at + i, line[v], acc[i][v]);
        continue;
      }
    }
    const Vec ai = words[i];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) acc[i][v] = fma(ai, line[v], acc[i][v]);
  }
}

template <int Rows, int Vectors, class Left>
TW_INLINE void tile_rows(int64_t kc, Left a, const float* b, int64_t ldb, const TileOut& out) {
  constexpr bool kWhole = Rows == MR || Vectors == kWideVectors;
  Vec acc[Rows][Vectors] = {};
  Ahead ahead(out, b);
  const auto step = [&]() __attribute__((always_inline)) {
    if (kWhole) {
      ahead.fetch();
    } else {
      __builtin_prefetch(b + kAhead);
      __builtin_prefetch(b + kAhead + kWidth);
    }
    multiply(a, b, acc);
    a.step();
    b += ldb;
  };
  int64_t k = 0;
  if constexpr (kWhole) {
    SumsAhead sums(out, b, kc, sizeof acc);
    for (; k + kSteps <= kc; k += kSteps) {
      sums.fetch();
#pragma GCC unroll 4
      for (int s = 0; s < kSteps; ++s) step();
    }
  }
  for (; k < kc; ++k) step();
  put_tile(acc, out);
}

template <int Rows>
void packed_rows(int64_t kc, const float* a, const float* b, int64_t ldb, const TileOut& out) {
  tile_rows<Rows, kVectors>(kc, PackedRows<Rows>{a}, b, ldb, out);
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

// Where a tile will be stored.
template <int Rows, int Vectors>
TW_INLINE void fetch_out(const float* to, int64_t ldt) {
  constexpr int kLine = 16;
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i, to += ldt) {
#pragma GCC unroll 4
    for (int j = 0; j < Vectors * kWidth; j += kLine) __builtin_prefetch(to + j, 1);
  }
}

// Rows at a time while there are as many, and no row beyond them. Where rows follow each other the next
// ones are fetched, which may be another product's.
template <int Rows, int Vectors = kVectors>
TW_INLINE void matrix_rows(InPlace& p, int nr, int64_t kc, int64_t lda, const float* b, int64_t ldb,
                           int64_t ldt) {
  for (; p.mr >= Rows; p.mr -= Rows, p.a += Rows * lda, p.tile += Rows * ldt) {
    const auto next = reinterpret_cast<const char*>(lda == kc ? p.a + Rows * lda : nullptr);
    for (int j = 0; j < nr; j += Vectors * kWidth) {
      fetch_out<Rows, Vectors>(p.tile + j, ldt);
      tile_rows<Rows, Vectors>(kc, MatrixRows<Rows>(p.a, lda), b + j, ldb,
                               {p.tile + j, ldt, p.sum, next, Rows * 4});
    }
    if (p.sum) p.sum += Rows * NR;
  }
}

// The same sums with a's rows where they are, lda words apart.
void tile_in_place(int mr, int nr, int64_t kc, const float* a, int64_t lda, const float* b,
                   int64_t ldb, const TileOut& out) {
  InPlace p{mr, a, static_cast<float*>(out.data), static_cast<const float*>(out.sum)};
  if constexpr (kWide) {
    if (nr % (kWideVectors * kWidth) == 0) {
      matrix_rows<kWideRows, kWideVectors>(p, nr, kc, lda, b, ldb, out.row);
      matrix_rows<4, kWideVectors>(p, nr, kc, lda, b, ldb, out.row);
      matrix_rows<2, kWideVectors>(p, nr, kc, lda, b, ldb, out.row);
      return matrix_rows<1, kWideVectors>(p, nr, kc, lda, b, ldb, out.row);
    }
  }
  matrix_rows<MR>(p, nr, kc, lda, b, ldb, out.row);
  if constexpr (MR > 8) matrix_rows<8>(p, nr, kc, lda, b, ldb, out.row);
  matrix_rows<4>(p, nr, kc, lda, b, ldb, out.row);
  matrix_rows<2>(p, nr, kc, lda, b, ldb, out.row);
  matrix_rows<1>(p, nr, kc, lda, b, ldb, out.row);
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
