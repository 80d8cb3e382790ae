// bfloat16 and int8 GEMM on AMX:  tile (32, 32) = sum over k of a[k][i] . b[k][j]
//
//   A's panel, step by step of 64 bytes of K:   rows 0-15 | rows 16-31     (16 lines of 64 bytes each)
//   B's panel (kc, 32) in words of 4 bytes:     a step is 16 lines; columns 0-15 and 16-31 of a line
//                                               are two tiles 64 bytes apart
//
// Each step loads 4 tiles and multiplies them 2 x 2 (simd/amx.h): 4 KB for 4 products of 16 cycles.
// A second cache delivers about 48 bytes a cycle, so one of the panels has to come from the first:
// B's, which is used for every panel of A; A's is streamed past it.
//
// Parameter  bounded by                                            bfloat16      int8
// KC         B's panel of 32 KB in a first cache of 48 KB           256 pairs     512 pairs
// MC, NT     the sums (MC, NT) and A's block in a second cache of   256 x 1024    256 x 1024
//            2 MB; B is read from the third MC rows at a time,
//            2 / MC bytes a multiply-add
//
// Words: bfloat16 is packed in pairs along K by simd/gemm_bf16.cc, for this level as for the one
// below. Int8 keeps the pairs of simd/qgemm_kernel.cc in memory; two lines of them become one of
// four bytes a word on the way into the first cache, once for each block of rows.
//
// Numerics: bfloat16 products are exact in float32 and added to the sum two at a time, k ascending;
// subnormal inputs count as zero and subnormal sums become zero, as the instruction has it. One
// addition for each further block of K. Rows beyond mr are zero, so a row's bits depend on that row
// alone. Integers are exact modulo 2^32.
#include "cpu/kernel_table.h"

// Compiled at every level, empty where there are no tiles.
#if defined(ISA_amx)

#include "simd/amx.h"
#include "simd/pack.h"
#include "simd/tile.h"

namespace tilewright::ISA {
namespace {

constexpr int MR = 32;
static_assert(NR == 32);
constexpr int64_t kStepBytes = 2 * kTileBytes;  // of A's panel, and of B's

// Two lines of int8 pairs, (k, k + 1) and (k + 2, k + 3), as one of four bytes a column.
void quads_of_pairs(int64_t begin, int64_t end, int64_t kc, const void* pairs, int64_t,
                    void* quads) {
  typedef uint16_t Line __attribute__((vector_size(2 * NR)));
  typedef Line Order;
  Order low, high;
  for (int i = 0; i < NR / 2; ++i) {
    low[2 * i] = uint16_t(i), low[2 * i + 1] = uint16_t(NR + i);
    high[2 * i] = uint16_t(NR / 2 + i), high[2 * i + 1] = uint16_t(NR + NR / 2 + i);
  }
  const auto from = static_cast<const char*>(pairs);
  const auto to = static_cast<char*>(quads);
  if (end > kc) end = kc;
  for (int64_t k = begin; k < end; k += 2) {
    Line first, second = {};
    memcpy(&first, from + k * 2 * NR, sizeof first);
    if (k + 1 < kc) memcpy(&second, from + (k + 1) * 2 * NR, sizeof second);
    const Line left = __builtin_shuffle(first, second, low);
    const Line right = __builtin_shuffle(first, second, high);
    memcpy(to + k * 2 * NR, &left, sizeof left);
    memcpy(to + k * 2 * NR + 64, &right, sizeof right);
  }
}

// --- a . b ---------------------------------------------------------------------------------------

template <Words w, bool both, class Work>
TW_INLINE void step(const char* a, const char* b, Work& beside) {
  constexpr int64_t line = NR * 4;
  load_tile<6>(b, line);
  stream_tile<4>(a, 64);
  multiply_tiles<w, 0, 4, 6>();
  load_tile<7>(b + 64, line);
  multiply_tiles<w, 1, 4, 7>();
  beside.next_part();
  if constexpr (both) {
    stream_tile<5>(a + kTileBytes, 64);
    multiply_tiles<w, 2, 5, 6>();
    multiply_tiles<w, 3, 5, 7>();
  }
}

// `lines` of B, of which the last step may lack some.
template <Words w, bool both, class Work>
TW_INLINE void multiply(int64_t lines, const char* a, const char* b, char* out, Work& beside) {
  clear_sums<both>();
  for (; lines >= kTileLines; lines -= kTileLines, a += kStepBytes, b += kStepBytes) {
    step<w, both>(a, b, beside);
  }
  if (lines > 0) {
    alignas(64) char padded[kStepBytes] = {};
    memcpy(padded, b, size_t(lines) * NR * 4);
    step<w, both>(a, padded, beside);
  }
  store_sums<both>(out);
}

template <Words w, class Work>
TW_INLINE void multiply(int mr, int64_t lines, const void* a, const void* b, void* out,
                        Work& beside) {
  const auto pa = static_cast<const char*>(a), pb = static_cast<const char*>(b);
  const auto pt = static_cast<char*>(out);
  mr > kTileLines ? multiply<w, true>(lines, pa, pb, pt, beside)
                  : multiply<w, false>(lines, pa, pb, pt, beside);
}

int64_t steps_of(int64_t lines) {
  return (lines + kTileLines - 1) / kTileLines;
}

void multiply_bf16(int mr, int64_t kc, const void* a, const void* b, void* out,
                   const GemmAside& aside) {
  Beside<Vec, nullptr> beside(aside, steps_of(kc), 1);
  multiply<Words::bf16>(mr, kc, a, b, out, beside);
}
template <Words w>
void multiply_bytes(int mr, int64_t kc, const void* a, const void* b, void* out,
                    const GemmAside& aside) {
  const int64_t lines = (kc + 1) / 2;
  Beside<VecU, quads_of_pairs> beside(aside, steps_of(lines), 2);
  multiply<w>(mr, lines, a, b, out, beside);
}

void tile_bf16(int mr, int64_t kc, const void* a, const void* b, int64_t, void* out) {
  multiply_bf16(mr, kc, a, b, out, {});
}
template <Words w>
void tile_bytes(int mr, int64_t kc, const void* a, const void* b, int64_t, void* out) {
  multiply_bytes<w>(mr, kc, a, b, out, {});
}

// --- A: lines of 64 bytes along K, zero beyond the matrix ----------------------------------------

template <class E>
constexpr int64_t kStepElements = 64 / int64_t(sizeof(E));

// 16 rows of `n` elements whose neighbours along the rows are contiguous: words of K, transposed.
template <class E>
TW_INLINE void put_columns(const E* src, int64_t step, int64_t n, char* to) {
  typedef E Line __attribute__((vector_size(kWidth * sizeof(E))));
  constexpr int per_word = 4 / int(sizeof(E));
  Vec words[kWidth];
#pragma GCC unroll 16
  for (int k = 0; k < kWidth; ++k) {
    VecU word = {};
    for (int e = 0; e < per_word; ++e) {
      const int64_t at = k * per_word + e;
      Line line = {};
      if (at < n) memcpy(&line, src + at * step, sizeof line);
      word |= __builtin_convertvector(line, VecU) << (8 * int(sizeof(E)) * e);
    }
    words[k] = (Vec)word;
  }
  transpose(words);
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) memcpy(to + 64 * i, &words[i], 64);
}

template <class E>
TW_INLINE void put_row(const E* src, int64_t step, int64_t n, char* to) {
  if (step == 1 && n == kStepElements<E>) {
    memcpy(to, src, 64);
    return;
  }
  E line[kStepElements<E>] = {};
  for (int64_t k = 0; k < n; ++k) line[k] = src[k * step];
  memcpy(to, line, 64);
}

// Rows [0, mr) of src, `left` elements of K or kc * per_word, whichever is less.
template <class E>
void pack_rows(const E* src, int64_t line, int64_t step, int mr, int64_t count, int64_t steps,
               char* panel) {
  for (int tile = 0; tile < 2; ++tile) {
    const int rows = mr - kTileLines * tile < 0            ? 0
                     : mr - kTileLines * tile > kTileLines ? kTileLines
                                                           : mr - kTileLines * tile;
    const E* first = src + kTileLines * tile * line;
    for (int64_t t = 0; t < steps; ++t) {
      char* const to = panel + t * kStepBytes + tile * kTileBytes;
      const int64_t at = t * kStepElements<E>;
      const int64_t n = count - at < kStepElements<E> ? count - at : kStepElements<E>;
      if (line == 1 && step != 1 && rows == kTileLines) {
        put_columns(first + at * step, step, n, to);
        continue;
      }
      for (int i = 0; i < rows; ++i) put_row(first + i * line + at * step, step, n, to + 64 * i);
      memset(to + 64 * rows, 0, size_t(64 * (kTileLines - rows)));
    }
  }
}

template <class E>
void pack(const Matrix& a, int64_t i, int mr, int64_t k, int64_t count, int64_t K, void* panel) {
  if (count > K - k) count = K - k;
  const int64_t steps = (count + kStepElements<E> - 1) / kStepElements<E>;
  pack_rows(static_cast<const E*>(a.data) + i * a.row + k * a.col, a.row, a.col, mr, count, steps,
            static_cast<char*>(panel));
}

void pack_bf16(const Matrix& a, int64_t i, int mr, int64_t k, int64_t kc, int64_t K, void* panel) {
  pack<uint16_t>(a, i, mr, 2 * k, 2 * kc, K, panel);
}
void pack_bytes(const Matrix& a, int64_t i, int mr, int64_t k, int64_t kc, int64_t K, void* panel) {
  pack<uint8_t>(a, i, mr, 2 * k, 2 * kc, K, panel);
}

template <Words w>
GemmKernels bytes_kernels(const GemmKernels& pairs) {
  GemmKernels g = pairs;
  g.names = {"gemm_s8_tiles", "gemm_s8_tiles_packed", nullptr, nullptr};
  g.units = "AMX tiles";
  g.MR = MR, g.KC = 512, g.MC = 256, g.NT = 1024;
  g.a_bytes = 2, g.k_step = 32;
  g.tile = tile_bytes<w>, g.tile_beside = multiply_bytes<w>, g.add_tile = add_sums<VecU>,
  g.pack_a = pack_bytes;
  g.prepare = quads_of_pairs, g.prepared_bytes = 2;
  g.begin = begin_tiles, g.end = end_tiles;
  return g;
}

}  // namespace

void fill_gemm_amx(KernelTable& table) {
  GemmKernels& g = table.gemm_bf16;
  g.MR = MR, g.KC = 256, g.MC = 256, g.NT = 1024;
  g.k_step = 16;
  g.tile = tile_bf16, g.tile_beside = multiply_bf16, g.add_tile = add_sums<Vec>,
  g.pack_a = pack_bf16;
  g.begin = begin_tiles, g.end = end_tiles;
  g.names = {"gemm_bf16_tiles", "gemm_bf16_tiles_packed", nullptr, nullptr};
  g.units = "AMX tiles";
  table.gemm_s8_once = bytes_kernels<Words::s8>(table.gemm_s8);
  table.gemm_u8_once = bytes_kernels<Words::u8>(table.gemm_u8);
}

}  // namespace tilewright::ISA

#endif
