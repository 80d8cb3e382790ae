// Quantized weights:  b(k, j) = scale(g, j) * q(k, j) + offset(g, j),  g = k / group
// and floats of 16 bits, which stay so in memory: half of what float32 would take is read.
//
//   columns: NR = 2 vectors
//   +-----+-----+-----+-----+        A line of words holds two rows of B and is one vector: a lane
//   | 0 1 | 2 3 | 4 5 | ... | k, k+1 has two neighbouring columns, of each the rows k and k + 1. So an
//   +-----+-----+-----+-----+        integer is brought to where all lanes need it by one shift or
//   | 0 1 | 2 3 | 4 5 | ... |        mask for a whole vector: of the even columns or the odd ones, one
//   +-----+-----+-----+-----+        row. Then it is made a float and scaled; sums find their way back
//                                    to the columns' order when they are stored.
//
// (The floats: simd/weight_rows.h.) Few rows: each row of B goes from memory (half a byte to two bytes an
// element) through registers into the rows' accumulators, and is never stored; of one row, several panels
// side by side. More rows: a block (KC, NR) becomes a panel of floats in L1, which gemm_f32's kernel
// multiplies with every tile of rows; of 16 bits the first tile makes it beside its own multiply-adds.
//
// MR, NR, KC: simd/tile.h.
// kFew       multiply-adds: of more rows, making floats a second time costs more than a way through L1
// kRows      registers: 2 kRows accumulators, 2 scales, a line of words, 2 floats, what makes floats of
//            integers: 8 of 32, 5 of 16. More rows meet the panels again, from L1 or L2
// kWide      panels side by side: 2 accumulators each, so that one row's sums need not wait for each other
//            (an addition takes 4 cycles, two begin in each), and 2 scales: 4 of 32 registers, 2 of 16
// kBusy      registers for accumulators and scales; the rest is as above, without offsets
//
// Bound for M rows by multiply-adds, M + 1 for each vector of weights: b is rounded, so its scale can't
// wait for the sum. Everything else that a vector takes, 2 to 3 instructions, runs beside them.
//
// Numerics: floats are widened exactly, a quantized b is rounded once to float32 (as tw.dequantize does);
// the sums are those of gemm_kernel.cc in its order: few rows or many, packed or not, the bits are those of
// matmul(a, float32(b)). By integers: exact within a group (qgemm_kernel.cc); the groups are
// added in ascending order by fused multiply-adds, the same bits on every level.
// Not handled: groups of odd size by integers (a pair would straddle two).
//
// Source: the data formats are those of GPTQ (Frantar et al. 2022) and AWQ (Lin et al. 2023):
// groups along K, a scale and an offset for each.
#include "cpu/kernel_table.h"
#include "simd/activation.h"
#include "simd/dot_s8.h"
#include "simd/elements.h"
#include "simd/matrix_rows.h"
#include "simd/pack_pairs.h"
#include "simd/tile.h"
#include "simd/weight_rows.h"

namespace tilewright::ISA {
namespace {

typedef int8_t VecS8 __attribute__((vector_size(kWidth)));
typedef int16_t VecS16 __attribute__((vector_size(kWidth * 2)));

// --- by floats -----------------------------------------------------------------------------------

constexpr int kFew = 16, kRows = kRegisters == 32 ? 8 : 5;
constexpr int kWide = kRegisters / 8;
constexpr int kBusy = kRegisters == 32 ? 20 : 12;

template <class Words>
void panel_of_floats(const WeightPanel& w, int64_t k, int64_t kc, float* panel) {
  const WeightAhead neighbour{w.lines * w.line_bytes(NR), NR};
  const auto store_row = [&](int, int, const Vec(&row)[kVectors]) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(panel + v * kWidth, Words::in_order(row, v));
    panel += NR;
  };
  Words::template for_rows<1>(w, k, k + kc, neighbour, store_row);
}

// gemm_f32's tile of whole rows, which makes the panel on its way. Beside the multiply-adds that costs
// nothing; before them, in stores that miss the first cache, as much as a tile: 7 % of 168 rows.
template <class Words>
void widening_tile(const WeightPanel& w, int64_t k, int64_t kc, const float* a, float* panel,
                   const TileOut& out) {
  constexpr int MR = kFloatRows;
  Vec acc[MR][kVectors] = {};
  const WeightAhead neighbour{w.lines * w.line_bytes(NR), NR};
  const auto multiply = [&](int, int, const Vec(&row)[kVectors]) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(panel + v * kWidth, row[v]);
    const Scalars<MR> words(a);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const Vec ai = words[i];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[i][v] = fma(ai, row[v], acc[i][v]);
    }
    panel += NR, a += MR;
  };
  Words::template for_rows<1>(w, k, k + kc, neighbour, multiply);
  put_tile(acc, out);
}

template <int Rows, int Panels, class Words>
void sum_rows(const WeightTiles& t) {
  Vec acc[Panels][Rows][kVectors] = {};
  MatrixRows<Rows> a(t.a, t.lda);
  const auto add = [&](int p, int odd, const Vec(&row)[kVectors]) __attribute__((always_inline)) {
    const auto words = a.words(odd);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const Vec ai = words[i];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[p][i][v] = fma(ai, row[v], acc[p][i][v]);
    }
    if (odd && p == Panels - 1) a.step(2);
  };
  Words::template for_rows<Panels>(t.panel, t.k, t.k + t.kc, t.ahead, add);
#pragma GCC unroll 4
  for (int p = 0; p < Panels; ++p) {
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        float* const to = t.sums + (p * kFew + i) * NR + v * kWidth;
        const Vec sum = Words::in_order(acc[p][i], v);
        store(to, t.k == 0 ? sum : load(to) + sum);
      }
    }
  }
}

// Panels whose accumulators and scales fit.
constexpr int together(int rows) {
  int panels = kWide;
  while (panels > 1 && panels * kVectors * (rows + 1) > kBusy) panels /= 2;
  return panels;
}

template <int Rows, class Words, int Together = together(Rows)>
void sum_panels(WeightTiles t) {
  WeightPanel& w = t.panel;
  for (; t.panels >= Together; t.panels -= Together) {
    sum_rows<Rows, Together, Words>(t);
    w.words += Together * w.lines * w.line_bytes(NR);
    if (w.scale) w.scale += Together * NR;
    if (w.offset) w.offset += Together * NR;
    t.sums += Together * kFew * NR;
  }
  if constexpr (Together > 1) sum_panels<Rows, Words, Together / 2>(t);
}

template <class Words, int Rows = 1>
void sum_tiles(WeightTiles t) {
  if constexpr (Rows < kRows) {
    if (t.rows > Rows) return sum_tiles<Words, Rows + 1>(t);
  }
  sum_panels<Rows, Words>(t);
}

void tiles(const WeightTiles& t) {
  WeightTiles part = t;
  const int parts = (t.rows + kRows - 1) / kRows;
  for (int i = 0, n = 0; i < t.rows; i += part.rows, ++n) {
    part.rows = t.rows * (n + 1) / parts - i;
    part.a = t.a + i * t.lda, part.sums = t.sums + i * NR;
    with_words(t.panel, [&](auto words) { sum_tiles<decltype(words)>(part); });
  }
}

void to_floats(const WeightPanel& w, int64_t k, int64_t kc, float* panel) {
  with_words(w, [&](auto words) { panel_of_floats<decltype(words)>(w, k, kc, panel); });
}

void tile_of_halves(const WeightPanel& w, int64_t k, int64_t kc, const float* a, float* panel,
                    const TileOut& out) {
  const auto run =
      w.floats == DType::bf16 ? widening_tile<Halves<Bf16>> : widening_tile<Halves<F16>>;
  run(w, k, kc, a, panel, out);
}

// Two rows of float16 a line, by way of floats, which are rounded back to what they were.
void pack_float16(const Matrix& b, int64_t j, int nr, int64_t k, int64_t kc, int64_t K,
                  F16* panel) {
  constexpr int kTogether = 16;  // as many as are transposed at once
  const auto src = static_cast<const F16*>(b.data) + j * b.col;
  for (int64_t row = 2 * k, end = 2 * (k + kc); row < end; row += kTogether) {
    float rows[kTogether * NR + kWidth] = {};  // a row that the last line lacks is zero
    const int64_t count = K - row < kTogether ? K - row : kTogether;
    pack_panel(src + row * b.row, b.col, b.row, NR, nr, count, rows);
    const int64_t words = (end - row < kTogether ? end - row : kTogether) * NR;
    for (int64_t i = 0; i < words; i += kWidth, panel += kWidth) store(panel, load(rows + i));
  }
}

void pack(const Matrix& b, int64_t j, int nr, int64_t k, int64_t kc, int64_t K, void* panel) {
  if (b.dtype == DType::f16) return pack_float16(b, j, nr, k, kc, K, static_cast<F16*>(panel));
  const auto src = static_cast<const uint16_t*>(b.data) + 2 * k * b.row + j * b.col;
  pack_words(src, b.col, b.row, NR, nr, kc, K - 2 * k, static_cast<uint32_t*>(panel));
}

// --- by integers ---------------------------------------------------------------------------------

constexpr int MR = kPairRows;

void to_pairs(const void* nibbles, int64_t count, void* pairs) {
  const auto src = static_cast<const char*>(nibbles);
  const auto dst = static_cast<char*>(pairs);
  for (int64_t i = 0; i < count; i += kWidth) {
    VecS8 bytes;
    memcpy(&bytes, src + i, sizeof bytes);
    const VecS16 both = __builtin_convertvector(bytes, VecS16);
    const VecS16 words = (VecS16)(both << 12 >> 12 & 0xff) | (VecS16)(both >> 4 << 8);
    memcpy(dst + 2 * i, &words, sizeof words);
  }
}

void row_sums(bool first, int64_t kc, const void* a, int32_t* sums) {
  const auto words = static_cast<const uint32_t*>(a);
  const VecP ones = broadcast_pair(0x00010001);
  for (int r = 0; r < MR; r += kWidth) {
    VecU sum = {};
    for (int64_t k = 0; k < kc; ++k) sum = add_dot(sum, (VecP)load_words(words + k * MR + r), ones);
    for (int i = r; i < MR && i < r + kWidth; ++i) {
      sums[i] = (first ? 0 : sums[i]) + int32_t(sum[i - r]);
    }
  }
}

void accumulate(int mr, bool first, const void* acc, const int32_t* sums, const WeightPanel& w,
                int64_t group, float* sum) {
  const auto src = static_cast<const uint32_t*>(acc);
  const float* const scale = w.scale + group * w.ld;
  for (int i = 0; i < mr; ++i) {
    const uint32_t shifted = sums ? uint32_t(sums[i]) * uint32_t(w.shift) : 0;
    for (int j = 0; j < NR; j += kWidth) {
      float* const to = sum + i * NR + j;
      const VecU q = load_words(src + i * NR + j) + shifted;
      Vec t = fma_once(to_float((VecI)q), load(scale + j), first ? Vec{} : load(to));
      if (w.offset) {
        t = fma_once(broadcast(float(sums[i])), load(w.offset + group * w.ld + j), t);
      }
      store(to, t);
    }
  }
}

void store_sums(const float* sum, int64_t i0, int mr, int64_t j0, int nr, const Epilogue& e) {
  for (int i = 0; i < mr; ++i) {
    const Vec scale = broadcast(e.scale_a[i0 + i]);
    for (int j = 0; j < nr; j += kWidth) {
      const int n = nr - j < kWidth ? nr - j : kWidth;
      Vec y = load(sum + i * NR + j);
      Vec constant = e.bias ? load_n(e.bias + j0 + j, n) : Vec{};
      if (e.offset_a) {
        const Vec column = load_n(e.column_sums + j0 + j, n);
        constant = fma_once(broadcast(e.offset_a[i0 + i]), column, constant);
      }
      y = activate(e.activation, fma_once(scale, y, constant));
      if (e.residual.data) y = y + load_elements(e.residual, i0 + i, j0 + j, n);
      store_elements(e.out, i0 + i, j0 + j, n, y);
    }
  }
}

}  // namespace

void fill_weights(KernelTable& table) {
  table.weights = {kFew,  kWide,    pack,     to_floats,  tile_of_halves,
                   tiles, to_pairs, row_sums, accumulate, store_sums};
}

}  // namespace tilewright::ISA
