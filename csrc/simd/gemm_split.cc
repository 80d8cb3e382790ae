// Float32 GEMM on AMX by bfloat16 terms:  tile (32, 32) = sum over k of a[k][i] * b[k][j]
//
//   x = x0 + x1 + x2     each the bfloat16 nearest to what is left: 3 x 8 bits hold all 24
//
//   a * b = a2 b0 + a1 b0 + a1 b1 + a0 b1 + a0 b2 + a0 b0     left out: terms below 2^-24 of it
//
//   A's panel, a step of 32 elements of K:   a term's rows 0-15, rows 16-31; the next term ...
//   B's panel, prepared:                     a term's 16 lines of pairs (2 KB); the next term ...
//
// Six products of tiles cost 6 x 16 cycles for each of two sums, and load 11 tiles: two thirds of what
// a bfloat16 product loads for its work, so that B's panel may lie in the second cache. 32 fused
// multiply-adds of 16 lanes would take twice as long at least.
//
// B stays float32 in memory, in the panels of simd/gemm_kernel.cc, and is split on its way into the
// first cache, once for each block of rows: packed weights take 4 bytes, and the float32 kernel
// reads the same ones. Precision `high` has two terms and three products, `medium` one.
//
// Parameter  bounded by
// KC         B's prepared panel, 6 bytes a word: 48 KB; and the longest chain of sums, as in float32
// MC, NT     A's block (MC, KC), 6 bytes a word, and the sums (MC, NT) in a second cache of 2 MB;
//            MC rows share what B's splitting costs
//
// Numerics: never above the bound of plain float32. Terms are rounded to nearest, ties to even (cut
// off, they would all err to one side). A block's chain is at most KC long, then one addition for
// each further block. The rest is found by content, so that a row's bits depend on that row and on
// B alone, and is computed by the float32 kernel (cpu/gemm_block.cc):
//   - sums that are not finite: an Inf or a NaN, or a number whose first term rounds up to Inf
//   - rows of A and columns of B whose largest |x| is not zero and below 2^-76: their last terms
//     would be subnormal, which the tiles count as zero. Panels end with the largest |x| of each.
//
// Source: Henry, Tang & Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For
// Higher-Precision Computations" (2019).
#include "cpu/kernel_table.h"

// Compiled at every level, empty where there are no tiles.
#if defined(ISA_amx)

#include "simd/elements.h"
#include "simd/pack.h"
#include "simd/split_tiles.h"
#include "simd/tile.h"

namespace tilewright::ISA {
namespace {

constexpr int MR = 32;
static_assert(NR == 32);

// --- terms ---------------------------------------------------------------------------------------

// The largest |x| so far; NaN doesn't count: its sums aren't finite.
TW_INLINE Vec largest_of(Vec largest, Vec x) {
  return larger(abs(x), largest);
}

int64_t steps_of(int64_t kc) {
  return (kc + kStep - 1) / kStep;
}

// Elements [k, k + kWidth) of a row of `count`; zeros beyond.
template <class T>
TW_INLINE Vec read_row(const T* src, int64_t step, int64_t k, int64_t count) {
  if (k >= count) return Vec{};
  return load_strided(src + k * step, step, int(count - k < kWidth ? count - k : kWidth));
}

// Row i of the panel, along K. Returns its largest |x|.
template <int Terms, class T>
TW_INLINE float split_row(const T* src, int64_t step, int64_t count, char* to) {
  Vec most = {};
  for (int64_t k = 0; k < count; k += kStep, to += Terms * kTermBytes) {
    const Vec left = read_row(src, step, k, count);
    const Vec right = read_row(src, step, k + kWidth, count);
    most = largest_of(largest_of(most, left), right);
    store_line<Terms>(left, right, to);
  }
  return reduce_max(most);
}

// A step of 16 rows whose neighbours are contiguous in memory.
template <int Terms, class T>
TW_INLINE void split_columns(const T* src, int64_t step, int64_t count, char* to, float* largest,
                             bool first) {
  Vec left[kWidth], right[kWidth], most = first ? Vec{} : load(largest);
  for (int k = 0; k < kWidth; ++k) {
    left[k] = k < count ? load(src + k * step) : Vec{};
    right[k] = k + kWidth < count ? load(src + (k + kWidth) * step) : Vec{};
    most = largest_of(largest_of(most, left[k]), right[k]);
  }
  store(largest, most);
  transpose(left);
  transpose(right);
  for (int i = 0; i < kWidth; ++i) store_line<Terms>(left[i], right[i], to + 64 * i);
}

// Where the rows are contiguous in memory, they are read one after the other. Where their neighbours
// are, the parts are steps of K.
template <int Terms, class T>
void split_rows(const RowPanel& p, const T* src, int64_t from, int64_t to) {
  const int64_t steps = steps_of(p.kc);
  const auto panel = static_cast<char*>(p.panel);
  const auto largest = reinterpret_cast<float*>(panel + steps * Terms * kTermBytes);
  if (p.a.row == 1 && p.a.col != 1 && p.mr == MR) {
    for (int64_t t = steps * from / MR; t < steps * to / MR; ++t) {
      const T* const first = src + t * kStep * p.a.col;
      char* const lines = panel + t * Terms * kTermBytes;
      for (int half = 0; half < 2; ++half) {
        split_columns<Terms>(first + half * kWidth, p.a.col, p.kc - t * kStep,
                             lines + half * kTileBytes, largest + half * kWidth, t == 0);
      }
    }
    return;
  }
  for (int64_t i = from; i < to; ++i) {
    char* const lines = panel + i / kWidth * kTileBytes + i % kWidth * 64;
    if (i < p.mr) {
      largest[i] = split_row<Terms>(src + i * p.a.row, p.a.col, p.kc, lines);
      continue;
    }
    largest[i] = 0.0f;
    for (int64_t t = 0; t < steps * Terms; ++t) memset(lines + t * kTermBytes, 0, 64);
  }
}

template <int Terms>
void pack_rows(const RowPanel& p, int64_t from, int64_t to) {
  with_type(p.a, [&](const auto* data) {
    split_rows<Terms>(p, data + p.i * p.a.row + p.k * p.a.col, from, to);
  });
}

template <int Terms>
void pack_a(const Matrix& a, int64_t i, int mr, int64_t k, int64_t kc, int64_t K, void* panel) {
  pack_rows<Terms>({a, i, mr, k, kc, K, panel}, 0, MR);
}

// Floats (kc, NR) with rows ldb apart, into pairs along K of each term.
template <int Terms>
void prepare(const ColumnPanel& p, int64_t from, int64_t end) {
  const int64_t kc = p.kc, ldb = p.ldb;
  const auto src = static_cast<const float*>(p.b);
  const auto to = static_cast<char*>(p.panel);
  Vec most[kVectors] = {};
  for (int64_t k = from; k < end; k += 2) {
    char* const line = to + k / kStep * Terms * kTermBytes + k % kStep / 2 * NR * 4;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const Vec first = k < kc ? load(src + k * ldb + v * kWidth) : Vec{};
      const Vec second = k + 1 < kc ? load(src + (k + 1) * ldb + v * kWidth) : Vec{};
      most[v] = largest_of(largest_of(most[v], first), second);
      VecU terms[Terms];
      split(first, second, terms);
      for (int t = 0; t < Terms; ++t) {
        memcpy(line + t * kTermBytes + v * 64, &terms[t], sizeof terms[t]);
      }
    }
  }
  const auto largest = reinterpret_cast<float*>(to + steps_of(kc) * Terms * kTermBytes);
  for (int v = 0; v < kVectors; ++v) {
    float* const lanes = largest + v * kWidth;
    store(lanes, from > 0 ? larger(most[v], load(lanes)) : most[v]);
  }
}

// --- a * b ---------------------------------------------------------------------------------------

template <int TermsA, int TermsB>
void tile_beside(int mr, int64_t kc, const TileRows& a, const void* b, const TileOut& out,
                 const GemmAside& aside) {
  Beside<Vec, pack_rows<TermsA>, prepare<TermsB>, 2> beside(
      aside, parts_of(mr, kPartsOfStep<TermsA, TermsB> * steps_of(kc)));
  for (int64_t i = 0; i < mr; i += kTileLines) {
    multiply_steps<TermsA, TermsB>(
        kc, static_cast<const char*>(a.data) + i * a.row, static_cast<const char*>(b),
        static_cast<char*>(out.data) + i * out.row * 4, out.row * 4, beside);
  }
  beside.rest();
}

template <int TermsA, int TermsB>
void tile(int mr, int64_t kc, const void* a, const void* b, int64_t, const TileOut& out) {
  tile_beside<TermsA, TermsB>(mr, kc, {a, kLineBytes, TermsA * kTermBytes}, b, out, {});
}

template <int TermsA, int TermsB>
GemmKernels kernels(const KernelTable& table, const GemmNames& names) {
  GemmKernels g = table.gemm_f32;
  g.names = names, g.units = kTileUnits;
  g.MR = MR, g.MC = 256, g.NT = 1024;
  g.a_bytes = 2 * TermsA, g.prepared_bytes = 2 * TermsB;
  g.k_step = kStep, g.a_step = TermsA * kTermBytes;
  g.tile = tile<TermsA, TermsB>, g.tile_beside = tile_beside<TermsA, TermsB>;
  g.pack_a = pack_a<TermsA>, g.pack_rows = pack_rows<TermsA>;
  g.prepare = prepare<TermsB>;
  g.begin = begin_tiles, g.end = end_tiles;
  g.exact = &table.gemm_f32, g.smallest = 0x1p-76f;
  return g;
}

}  // namespace

void fill_gemm_split(KernelTable& table) {
  table.gemm_split[0] = kernels<3, 3>(
      table, {"gemm_split_highest", "gemm_split_highest_packed", "gemm_split_highest_in_place"});
  table.gemm_split[1] = kernels<2, 2>(
      table, {"gemm_split_high", "gemm_split_high_packed", "gemm_split_high_in_place"});
  table.gemm_split[2] = kernels<1, 1>(
      table, {"gemm_split_medium", "gemm_split_medium_packed", "gemm_split_medium_in_place"});
  table.gemm_bf16_weights = kernels<1, 2>(table, {});
}

}  // namespace tilewright::ISA

#endif
