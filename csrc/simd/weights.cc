// Quantized weights:  b(k, j) = scale(g, j) * q(k, j) + offset(g, j),  g = k / group
//
//   columns: NR = 2 vectors
//   +-----+-----+-----+-----+        A line of words holds two rows of B and is one vector: a lane
//   | 0 1 | 2 3 | 4 5 | ... | k, k+1 has two neighbouring columns, of each the rows k and k + 1. So an
//   +-----+-----+-----+-----+        integer is brought to where all lanes need it by one shift or
//   | 0 1 | 2 3 | 4 5 | ... |        mask for a whole vector: of the even columns or the odd ones, one
//   +-----+-----+-----+-----+        row. Then it is made a float and scaled; sums find their way back
//                                    to the columns' order when they are stored.
//
// Few rows: each row of B goes from memory (a byte or half a byte an element) through registers
// into the rows' accumulators, and is never stored; of one row, several panels side by side. More
// rows: a block (KC, NR) becomes a panel of floats in L1, which gemm_f32's kernel multiplies with
// every tile of rows.
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
// Numerics: b is rounded once to float32 (as tw.dequantize does), the sums are those of
// gemm_kernel.cc in its order: few rows or many, packed or not, the bits are those of
// matmul(a, dequantize(b)). By integers: exact within a group (qgemm_kernel.cc); the groups are
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
#include "simd/tile.h"

namespace tilewright::ISA {
namespace {

typedef int8_t VecS8 __attribute__((vector_size(kWidth)));
typedef int16_t VecS16 __attribute__((vector_size(kWidth * 2)));

// --- by floats -----------------------------------------------------------------------------------

constexpr int kFew = 16, kRows = kRegisters == 32 ? 8 : 5;
constexpr int kWide = kRegisters / 8;
constexpr int kBusy = kRegisters == 32 ? 20 : 12;

// Every other column of NR, from the first or the second on; and back.
TW_INLINE Vec every_other(const float* p, int first) {
  return __builtin_shuffle(load(p), load(p + kWidth), lane_numbers() * 2 + first);
}
TW_INLINE Vec alternating(Vec even, Vec odd, int half) {
  const VecI lane = lane_numbers() + half * kWidth;
  return __builtin_shuffle(even, odd, (lane >> 1) + (lane & 1) * kWidth);
}

// A line of words, two columns in each lane.
template <int Bits>
TW_INLINE VecI load_line(const char* p) {
  if constexpr (Bits == 4) return widen(reinterpret_cast<const int16_t*>(p));
  VecI words;
  memcpy(&words, p, sizeof words);
  return words;
}

// The integers of a line of words as floats, of row k + odd and the columns of parity v: brought down,
// with their sign, and converted.
template <int Bits, bool Shifted, bool kByLogic = kWidth == 16>
struct Integers {
  Vec shift;

  TW_INLINE explicit Integers(int added) : shift(broadcast(float(added))) {}
  TW_INLINE Vec of(VecI words, int odd, int v) const {
    const Vec q = to_float(words << (32 - (2 * v + odd + 1) * Bits) >> (32 - Bits));
    return Shifted ? q + shift : q;
  }
};

// With logic of three operands it takes two instructions instead of three: in the mantissa of the power
// of two at which they count 1, their sign flipped, they are that power + half + q, exactly, and so is
// the difference q. Nibbles of even rows take one: a vector holds all there are.
template <int Bits, bool Shifted>
struct Integers<Bits, Shifted, true> {
  static constexpr int kHalf = 1 << (Bits - 1);
  Vec zero[2], table;

  TW_INLINE explicit Integers(int shift) {
    zero[0] = broadcast(float((1 << 23) + kHalf - shift));
    zero[1] = broadcast(float((1 << (23 - Bits)) + kHalf - shift));
    if constexpr (Bits == 4) table = to_float((lane_numbers() ^ kHalf) - kHalf + shift);
  }
  TW_INLINE Vec of(VecI words, int odd, int v) const {
    constexpr int kMask = (1 << Bits) - 1;
    const int at = odd * Bits, power = (127 + 23 - at) << 23;
    words = words >> (2 * v * Bits);
    if (Bits == 4 && !odd) return __builtin_shuffle(table, words);
    return as_float(and_xor(words, kMask << at, power | kHalf << at)) - zero[odd];
  }
};

// A group's scales and offsets of a panel: of even columns, of odd ones.
template <bool Offset>
struct Scales {
  Vec scale[kVectors], offset[kVectors];

  TW_INLINE void load_group(const WeightPanel& w, int64_t at, int64_t ahead) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      scale[v] = every_other(w.scale + at, v);
      if (Offset) offset[v] = w.offset ? every_other(w.offset + at, v) : Vec{};
      __builtin_prefetch(w.scale + at + v * kWidth + ahead);
      if (Offset && w.offset) __builtin_prefetch(w.offset + at + v * kWidth + ahead);
    }
  }
  TW_INLINE Vec times(Vec q, int v) const {
    return Offset ? fma_once(q, scale[v], offset[v]) : q * scale[v];
  }
};

// body(panel, odd, line) for the rows [k, end) of B, each kVectors vectors of floats; rows of one line of
// words follow each other. Ahead, a line is fetched for each line.
template <int Panels, int Bits, bool Offset, class Body>
TW_INLINE void for_rows(const WeightPanel& w, int64_t k, int64_t end, const WeightAhead& ahead,
                        const Body& body) {
  constexpr int64_t kLine = NR * Bits / 4;
  const int64_t panel = w.lines * kLine;
  const char* from = w.words + (k >> 1) * kLine;
  const Integers<Bits, Offset> integers(w.shift);
  Scales<Offset> scales[Panels];
  const auto rows = [&](bool even, bool odd) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) {
      const VecI words = load_line<Bits>(from + p * panel);
      __builtin_prefetch(from + p * panel + ahead.words);
      const auto row = [&](int r) __attribute__((always_inline)) {
        Vec line[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) line[v] = scales[p].times(integers.of(words, r, v), v);
        body(p, r, line);
      };
      if (even) row(0);
      if (odd) row(1);
    }
    if (odd) from += kLine;
  };
  for (int64_t group = k / w.group; k < end; ++group) {
    const int64_t next = (group + 1) * w.group, stop = next < end ? next : end;
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) {
      scales[p].load_group(w, group * w.ld + p * NR, ahead.scales);
    }
    if (k % 2) rows(false, true), ++k;
    for (; k + 1 < stop; k += 2) rows(true, true);
    if (k < stop) rows(true, false), ++k;
  }
}

template <int Bits, bool Offset>
void panel_of_floats(const WeightPanel& w, int64_t k, int64_t kc, float* panel) {
  const WeightAhead neighbour{w.lines * w.line_bytes(NR), NR};
  const auto store_row = [&](int, int, const Vec(&row)[kVectors]) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(panel + v * kWidth, alternating(row[0], row[1], v));
    panel += NR;
  };
  for_rows<1, Bits, Offset>(w, k, k + kc, neighbour, store_row);
}

template <int Rows, int Panels, int Bits, bool Offset>
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
  for_rows<Panels, Bits, Offset>(t.panel, t.k, t.k + t.kc, t.ahead, add);
#pragma GCC unroll 4
  for (int p = 0; p < Panels; ++p) {
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        float* const to = t.sums + (p * kFew + i) * NR + v * kWidth;
        const Vec sum = alternating(acc[p][i][0], acc[p][i][1], v);
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

template <int Rows, int Bits, bool Offset, int Together = together(Rows)>
void sum_panels(WeightTiles t) {
  WeightPanel& w = t.panel;
  for (; t.panels >= Together; t.panels -= Together) {
    sum_rows<Rows, Together, Bits, Offset>(t);
    w.words += Together * w.lines * w.line_bytes(NR), w.scale += Together * NR;
    if (w.offset) w.offset += Together * NR;
    t.sums += Together * kFew * NR;
  }
  if constexpr (Together > 1) sum_panels<Rows, Bits, Offset, Together / 2>(t);
}

template <int Bits, bool Offset, int Rows = 1>
void sum_tiles(WeightTiles t) {
  if constexpr (Rows < kRows) {
    if (t.rows > Rows) return sum_tiles<Bits, Offset, Rows + 1>(t);
  }
  sum_panels<Rows, Bits, Offset>(t);
}

bool has_offset(const WeightPanel& w) {
  return w.offset || w.shift;
}

void tiles(const WeightTiles& t) {
  const WeightPanel& w = t.panel;
  const auto run = w.bits == 8     ? has_offset(w) ? sum_tiles<8, true> : sum_tiles<8, false>
                   : has_offset(w) ? sum_tiles<4, true>
                                   : sum_tiles<4, false>;
  WeightTiles part = t;
  const int parts = (t.rows + kRows - 1) / kRows;
  for (int i = 0, n = 0; i < t.rows; i += part.rows, ++n) {
    part.rows = t.rows * (n + 1) / parts - i;
    part.a = t.a + i * t.lda, part.sums = t.sums + i * NR;
    run(part);
  }
}

void to_floats(const WeightPanel& w, int64_t k, int64_t kc, float* panel) {
  const auto run = w.bits == 8
                       ? has_offset(w) ? panel_of_floats<8, true> : panel_of_floats<8, false>
                   : has_offset(w) ? panel_of_floats<4, true>
                                   : panel_of_floats<4, false>;
  run(w, k, kc, panel);
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
  table.weights = {kFew, kWide, to_floats, tiles, to_pairs, row_sums, accumulate, store_sums};
}

}  // namespace tilewright::ISA
