// bfloat16 and int8 GEMM on AMX:  tile (32, 32) = sum over k of a[k][i] . b[k][j]
//
//   A's panel, step by step of 64 bytes of K:   rows 0-15 | rows 16-31     (16 lines of 64 bytes each);
//                                               or the matrix's own rows, where these are whole lines
//   B's panel (kc, 32) in words of 4 bytes:     a step is 16 lines; columns 0-15 and 16-31 of a line
//                                               are two tiles 64 bytes apart
//
// Each step loads a tile of A and two of B (simd/amx.h): 3 KB for 2 products of 16 cycles. A second
// cache delivers about 48 bytes a cycle, so one of the panels has to come from the first: B's, which
// is used for every panel of A, and twice; A's is streamed past it.
//
// Parameter  bounded by                                            bfloat16      int8
// KC         B's panel of 32 KB in a first cache of 48 KB           256 pairs     512 pairs
// MC, NT     the sums (MC, NT) and A's block in a second cache of   256 x 1024    256 x 1024
//            2 MB; B is read from the third MC rows at a time,
//            2 / MC bytes a multiply-add
//
// A core of its own hides products behind the rest (512 cubed of int8: 179 us, without its products
// 172): caches bind, so other work belongs between tile instructions, and memory is worth saving.
//
// Words: packed bfloat16 are the pairs along K of simd/gemm_bf16.cc, for this level as for the one
// below, and are multiplied as they are. Packed int8 keep the pairs of simd/qgemm_kernel.cc in memory;
// two lines of them become one of four bytes a word on the way into the first cache, once for each
// block of rows. So do the matrix's own rows, of either type, where there are up to two of them.
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
#include "simd/quads.h"
#include "simd/tile.h"

namespace tilewright::ISA {
namespace {

constexpr int MR = 32;
static_assert(NR == 32);
constexpr int64_t kStepBytes = 2 * kTileBytes;  // of A's panel, and of B's

// --- B's panel on its way into the first cache ---------------------------------------------------

// Pairs of bfloat16: rows 2 k and 2 k + 1.
void prepare_bf16(const ColumnPanel& p, int64_t from, int64_t end) {
  const auto to = static_cast<char*>(p.panel);
  const auto source = static_cast<const uint16_t*>(p.b);
  for (int64_t k = from; k < end; ++k) {
    if (!p.in_place) {
      k < p.kc ? memcpy(to + k * kQuadLine, source + k * 2 * NR, kQuadLine)
               : memset(to + k * kQuadLine, 0, kQuadLine);
      continue;
    }
    const uint16_t* const row = source + 2 * k * p.ldb;
    const Halves x = 2 * k < p.elements ? halves_at(row) : Halves{};
    const Halves y = 2 * k + 1 < p.elements ? halves_at(row + p.ldb) : Halves{};
    put_interleaved(x, y, to + k * kQuadLine);
  }
}

void prepare_bytes(const ColumnPanel& p, int64_t from, int64_t end) {
  put_quads(p, from, end, static_cast<char*>(p.panel));
}

// --- a . b ---------------------------------------------------------------------------------------

template <Words w, class Work>
TW_INLINE void step(const char* a, int64_t row, const char* b, Work& beside) {
  constexpr int64_t line = NR * 4;
  load_tile<6>(b, line);
  stream_tile<4>(a, row);
  multiply_tiles<w, 0, 4, 6>();
  load_tile<6>(b + 64, line);
  multiply_tiles<w, 1, 4, 6>();
  beside.next_part();
}

// 16 rows; `lines` of B, of which the last step may lack some.
template <Words w, class Work>
TW_INLINE void multiply_rows(int64_t lines, const char* a, const TileRows& rows, const char* b,
                             char* out, int64_t out_line, Work& beside) {
  const int64_t row = rows.row, next = rows.step;
  clear_sums();
  for (; lines >= kTileLines; lines -= kTileLines, a += next, b += kStepBytes) {
    step<w>(a, row, b, beside);
  }
  if (lines > 0) {
    alignas(64) char padded[kStepBytes] = {};
    memcpy(padded, b, size_t(lines) * NR * 4);
    step<w>(a, row, padded, beside);
  }
  store_sums(out, out_line);
}

template <Words w, class Work>
TW_INLINE void multiply(int mr, int64_t lines, const TileRows& rows, const void* b,
                        const TileOut& out, Work& beside) {
  const auto a = static_cast<const char*>(rows.data);
  const auto to = static_cast<char*>(out.data);
  for (int64_t i = 0; i < mr; i += kTileLines) {
    multiply_rows<w>(lines, a + i * rows.row, rows, static_cast<const char*>(b),
                     to + i * out.row * 4, out.row * 4, beside);
  }
  beside.rest();
}

int64_t steps_of(int64_t lines) {
  return (lines + kTileLines - 1) / kTileLines;
}

// --- A: lines of 64 bytes along K, zero beyond the matrix ----------------------------------------

template <class E>
constexpr int64_t kStepElements = 64 / int64_t(sizeof(E));

// kWidth neighbours, a word each.
TW_INLINE VecU words_of(const uint8_t* p) {
  return (VecU)widen(p);
}
TW_INLINE VecU words_of(const uint16_t* p) {
  VecH line;
  memcpy(&line, p, sizeof line);
  return __builtin_convertvector(line, VecU);
}

// 16 rows of `n` elements whose neighbours along the rows are contiguous: words of K, transposed.
template <class E>
TW_INLINE void put_columns(const E* src, int64_t step, int64_t n, char* to) {
  constexpr int per_word = 4 / int(sizeof(E));
  Vec words[kWidth];
#pragma GCC unroll 16
  for (int k = 0; k < kWidth; ++k) {
    VecU word = {};
    for (int e = 0; e < per_word; ++e) {
      const int64_t at = k * per_word + e;
      if (at < n) word |= words_of(src + at * step) << (8 * int(sizeof(E)) * e);
    }
    words[k] = (Vec)word;
  }
  transpose(words);
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) memcpy(to + 64 * i, &words[i], 64);
}

// A row along K into its line of each step.
template <class E>
TW_INLINE void put_row(const E* src, int64_t step, int64_t count, char* to) {
  constexpr int64_t n = kStepElements<E>;
  int64_t k = 0;
  if (step == 1) {
    for (; k + n <= count; k += n, to += kStepBytes) memcpy(to, src + k, 64);
  }
  for (; k < count; k += n, to += kStepBytes) {
    E line[n] = {};
    for (int64_t e = 0; e < n && k + e < count; ++e) line[e] = src[(k + e) * step];
    memcpy(to, line, 64);
  }
}

// Where the rows are contiguous in memory, they are read one after the other. Where their neighbours
// are, the parts are steps of K.
template <class E>
void pack_rows(const RowPanel& p, int64_t from, int64_t to) {
  const int64_t left = p.K - 2 * p.k, count = 2 * p.kc < left ? 2 * p.kc : left;
  const int64_t steps = (count + kStepElements<E> - 1) / kStepElements<E>;
  const auto src = static_cast<const E*>(p.a.data) + p.i * p.a.row + 2 * p.k * p.a.col;
  const auto panel = static_cast<char*>(p.panel);
  if (p.a.row == 1 && p.a.col != 1 && p.mr == MR) {
    for (int64_t t = steps * from / MR; t < steps * to / MR; ++t) {
      const int64_t at = t * kStepElements<E>;
      const E* const first = src + at * p.a.col;
      char* const lines = panel + t * kStepBytes;
      put_columns(first, p.a.col, count - at, lines);
      put_columns(first + kTileLines, p.a.col, count - at, lines + kTileBytes);
    }
    return;
  }
  for (int64_t i = from; i < to; ++i) {
    char* const lines = panel + i / kTileLines * kTileBytes + i % kTileLines * 64;
    if (i < p.mr) {
      put_row(src + i * p.a.row, p.a.col, count, lines);
    } else {
      for (int64_t t = 0; t < steps; ++t) memset(lines + t * kStepBytes, 0, 64);
    }
  }
}

template <class E>
void pack_a(const Matrix& a, int64_t i, int mr, int64_t k, int64_t kc, int64_t K, void* panel) {
  pack_rows<E>({a, i, mr, k, kc, K, panel}, 0, MR);
}

// --- both, with the rest between -----------------------------------------------------------------

void multiply_bf16(int mr, int64_t kc, const TileRows& a, const void* b, const TileOut& out,
                   const GemmAside& aside) {
  Beside<Vec, pack_rows<uint16_t>, prepare_bf16, 1> beside(aside, parts_of(mr, steps_of(kc)));
  multiply<Words::bf16>(mr, kc, a, b, out, beside);
}
template <Words w>
void multiply_bytes(int mr, int64_t kc, const TileRows& a, const void* b, const TileOut& out,
                    const GemmAside& aside) {
  const int64_t lines = (kc + 1) / 2;
  Beside<VecU, pack_rows<uint8_t>, prepare_bytes, 2> beside(aside, parts_of(mr, steps_of(lines)));
  multiply<w>(mr, lines, a, b, out, beside);
}

void tile_bf16(int mr, int64_t kc, const void* a, const void* b, int64_t, const TileOut& out) {
  multiply_bf16(mr, kc, {a, kLineBytes, kStepBytes}, b, out, {});
}
template <Words w>
void tile_bytes(int mr, int64_t kc, const void* a, const void* b, int64_t, const TileOut& out) {
  multiply_bytes<w>(mr, kc, {a, kLineBytes, kStepBytes}, b, out, {});
}

template <Words w>
GemmKernels bytes_kernels(const GemmKernels& pairs) {
  GemmKernels g = pairs;
  g.names = {"gemm_s8_tiles", "gemm_s8_tiles_packed", "gemm_s8_tiles_in_place", nullptr};
  g.units = kTileUnits;
  g.MR = MR, g.KC = 512, g.MC = 256, g.NT = 1024;
  g.a_bytes = 2, g.k_step = 32, g.a_step = kStepBytes, g.reads_rows = true;
  g.tile = tile_bytes<w>, g.tile_beside = multiply_bytes<w>, g.pack_a = pack_a<uint8_t>,
  g.pack_rows = pack_rows<uint8_t>;
  g.prepare = prepare_bytes, g.prepared_bytes = 2;
  g.begin = begin_tiles, g.end = end_tiles;
  return g;
}

}  // namespace

#if defined(TILEWRIGHT_EMULATE_AMX)
__thread Tiles t_tiles;
#endif

void fill_gemm_amx(KernelTable& table) {
  GemmKernels& g = table.gemm_bf16;
  g.MR = MR, g.KC = 256, g.MC = 256, g.NT = 1024;
  g.k_step = 16, g.a_step = kStepBytes, g.reads_rows = true;
  g.tile = tile_bf16, g.tile_beside = multiply_bf16, g.pack_a = pack_a<uint16_t>,
  g.pack_rows = pack_rows<uint16_t>;
  g.prepare = prepare_bf16, g.prepared_bytes = 4, g.reads_packed = true;
  g.begin = begin_tiles, g.end = end_tiles;
  g.names = {"gemm_bf16_tiles", "gemm_bf16_tiles_packed", "gemm_bf16_tiles_in_place", nullptr};
  g.units = kTileUnits;
  table.gemm_s8_once = bytes_kernels<Words::s8>(table.gemm_s8);
  table.gemm_u8_once = bytes_kernels<Words::u8>(table.gemm_u8);
}

}  // namespace tilewright::ISA

#endif
