// Quantized weights:  b(k, j) = scale(g, j) * q(k, j) + offset(g, j),  g = k / group
//
//   columns: NR = 2 vectors
//   +--------+--------+   k, k + 1      A line of words holds two rows of B. It is loaded once,
//   | words  | words  |                 widened to int32, its halves are cut out by shifts, made
//   +--------+--------+   k + 2, k + 3  floats, scaled: two vectors for each of the two rows.
//   the group's scales and offsets stay in registers until the next group begins
//
// Few rows: each row of B goes from memory (a byte or half a byte an element) through registers
// into MR <= `few` rows of accumulators, and is never stored. More rows: a block (KC, NR) becomes a
// panel of floats in L1, which gemm_f32's kernel multiplies with every tile of rows.
//
// MR, NR, KC: simd/tile.h.
// few        registers: 2 few accumulators, 2 words, 4 lines, 2 scales, 2 offsets: 2 of 16, 8 of 32
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
#include "simd/tile.h"

namespace tilewright::ISA {
namespace {

typedef int8_t VecS8 __attribute__((vector_size(kWidth)));
typedef int16_t VecS16 __attribute__((vector_size(kWidth * 2)));

// kWidth words, sign-extended.
template <int Bits>
TW_INLINE VecI load_wide(const char* p) {
  if constexpr (Bits == 8) {
    return widen(reinterpret_cast<const int16_t*>(p));
  } else {
    return widen(reinterpret_cast<const int8_t*>(p));
  }
}

// The panel's scales of one group.
template <bool Offset>
struct Scales {
  Vec scale[kVectors], offset[kVectors], shift;

  TW_INLINE void load_group(const WeightPanel& w, int64_t group) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      scale[v] = load(w.scale + group * w.ld + v * kWidth);
      if constexpr (Offset) {
        offset[v] = w.offset ? load(w.offset + group * w.ld + v * kWidth) : Vec{};
      }
    }
    if constexpr (Offset) shift = broadcast(float(w.shift));
  }
  TW_INLINE Vec apply(VecI q, int v) const {
    if constexpr (Offset) {
      return fma_once(to_float(q) + shift, scale[v], offset[v]);
    } else {
      return to_float(q) * scale[v];
    }
  }
};

// body(line) for the rows [k, end) of B, each kVectors vectors of floats.
template <int Bits, bool Offset, class Body>
TW_INLINE void for_lines(const WeightPanel& w, int64_t k, int64_t end, const Body& body) {
  constexpr int kUnused = 32 - Bits;
  constexpr int64_t kLine = NR * Bits / 4;
  Scales<Offset> scales;
  // the rows of the word line of k: its lower halves, its upper ones, or both
  const auto rows = [&](int64_t at, bool lower, bool upper) __attribute__((always_inline)) {
    const char* const p = w.words + (at >> 1) * kLine;
    VecI words[kVectors];
    Vec line[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) words[v] = load_wide<Bits>(p + v * (kLine / kVectors));
    if (lower) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        line[v] = scales.apply(words[v] << kUnused >> kUnused, v);
      }
      body(line);
    }
    if (upper) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) line[v] = scales.apply(words[v] >> Bits, v);
      body(line);
    }
  };
  for (int64_t group = k / w.group; k < end; ++group) {
    const int64_t next = (group + 1) * w.group, stop = next < end ? next : end;
    scales.load_group(w, group);
    if (k % 2) rows(k++, false, true);
    for (; k + 1 < stop; k += 2) rows(k, true, true);
    if (k < stop) rows(k++, true, false);
  }
}

template <int Bits, bool Offset>
void panel_of_floats(const WeightPanel& w, int64_t k, int64_t kc, float* panel) {
  for_lines<Bits, Offset>(w, k, k + kc, [&](const Vec(&line)[kVectors]) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(panel + v * kWidth, line[v]);
    panel += NR;
  });
}

template <int Rows, int Bits, bool Offset>
void tile_rows(int64_t kc, const float* a, const WeightPanel& w, int64_t k, float* tile) {
  Vec acc[Rows][kVectors] = {};
  for_lines<Bits, Offset>(w, k, k + kc, [&](const Vec(&line)[kVectors]) {
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const Vec ai = broadcast(a[i]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[i][v] = fma(ai, line[v], acc[i][v]);
    }
    a += kFloatRows;
  });
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(tile + i * NR + v * kWidth, acc[i][v]);
  }
}

constexpr int kFew = kRegisters == 32 ? 8 : 2;

template <int Bits, bool Offset>
void tile_of(int mr, int64_t kc, const float* a, const WeightPanel& w, int64_t k, float* tile) {
  if (mr == 1) return tile_rows<1, Bits, Offset>(kc, a, w, k, tile);
  if constexpr (kFew > 2) {
    if (mr > 4) return tile_rows<kFew, Bits, Offset>(kc, a, w, k, tile);
    if (mr > 2) return tile_rows<4, Bits, Offset>(kc, a, w, k, tile);
  }
  tile_rows<2, Bits, Offset>(kc, a, w, k, tile);
}

bool has_offset(const WeightPanel& w) {
  return w.offset || w.shift;
}

void tile(int mr, int64_t kc, const void* a, const WeightPanel& w, int64_t k, void* out) {
  const auto run = w.bits == 8     ? has_offset(w) ? tile_of<8, true> : tile_of<8, false>
                   : has_offset(w) ? tile_of<4, true>
                                   : tile_of<4, false>;
  run(mr, kc, static_cast<const float*>(a), w, k, static_cast<float*>(out));
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
  table.weights = {kFew, to_floats, tile, to_pairs, row_sums, accumulate, store_sums};
}

}  // namespace tilewright::ISA
