// What a GEMM level provides. A packed word is one step of a multiply-add: a float32, or a pair of
// integers or bfloat16s that one instruction multiplies and sums. Accumulators have 4 bytes, words
// of A a_bytes and words of B b_bytes; so one driver (cpu/gemm.cc) serves every type.
#pragma once
#include <stdint.h>

#include "tilewright/ops.h"

namespace tilewright {

// A strided matrix operand as the packers read it: element (i, j) at data + (i * row + j * col)
// elements.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t row, col;
};

// What happens to a finished MR x NR tile of accumulators on its way to memory:
//   y = activation(alpha * acc + bias) + residual, rounded once to `out`'s dtype.
// Quantized: alpha * acc is replaced by acc * (scale_a[i] * scale_b[j]) with the bias fused in; with
// offsets or groups by what kernels_weights.h says.
struct Epilogue {
  float alpha = 1.0f;
  Activation activation = Activation::none;
  const float* bias = nullptr;         // (N,)
  const float* scale_a = nullptr;      // (M,) quantized only
  const float* scale_b = nullptr;      // (N,)
  const float* offset_a = nullptr;     // (M,), with
  const float* column_sums = nullptr;  // (N,): of the b that is represented
  Matrix residual{nullptr, DType::other, 0, 0};
  Matrix out{nullptr, DType::other, 0, 0};
};

// Whether finished sums are the output but for their rounding; and word by word.
inline bool only_rounds(const Epilogue& e) {
  return e.out.col == 1 && !e.scale_a && e.alpha == 1.0f && !e.bias &&
         e.activation == Activation::none && !e.residual.data;
}
inline bool stores_sums(const Epilogue& e) {
  if (e.out.dtype == DType::s32) return e.out.col == 1;
  return e.out.dtype == DType::f32 && only_rounds(e);
}

// What tw.explain and tw.stats call a kernel, by where B comes from. Literals: counted by address.
struct GemmNames {
  const char *plain, *packed, *in_place, *weights;
};

// `lines` pieces of memory of `width` bytes, `stride` bytes apart.
struct CacheLines {
  const char* data = nullptr;
  int64_t lines = 0, width = 0, stride = 0;
};

// A panel of A in the making: rows [i, i + mr) of a, words [k, k + kc), as GemmKernels::pack_a.
struct RowPanel {
  Matrix a{nullptr, DType::other, 0, 0};
  int64_t i = 0;
  int mr = 0;
  int64_t k = 0, kc = 0, K = 0;
  void* panel = nullptr;
};

// A panel of B that `tile` reads in the making, of packed words (kc, NR); or of the matrix's own rows
// (`elements` of K, NR), ldb elements apart.
struct ColumnPanel {
  const void* b = nullptr;
  int64_t ldb = 0, kc = 0, elements = 0;
  bool in_place = false;
  void* panel = nullptr;
};

// What can be done while matrix units multiply a tile: the tile before is finished, the next panels
// of A and B are made, and what is soon read is fetched. Each may be absent (null).
struct GemmAside {
  // The tile before: added to `sum`, of the blocks of K before. Where there is an epilogue it is
  // complete with that (null: as it is), stays in `tile`, and is stored.
  void* tile = nullptr;
  void* sum = nullptr;
  const Epilogue* epilogue = nullptr;
  void (*store)(const void* tile, int64_t i, int mr, int64_t j, int nr,
                const Epilogue& e) = nullptr;
  int64_t i = 0, j = 0;
  int mr = 0, nr = 0;
  uint32_t* unstored = nullptr;  // rows, as bits, that must not be; those not finite are added

  RowPanel rows;        // the whole panel
  ColumnPanel columns;  // these words of it, multiples of k_step
  int64_t columns_from = 0, columns_to = 0;
  CacheLines ahead[3];  // of A, of B, and where this tile will be stored
};

constexpr int64_t kLineBytes = 64;  // of a row of A in a step

// A panel of A as tiles load it: bytes between its rows, and between its steps of K.
struct TileRows {
  const void* data;
  int64_t row, step;
};

// Where the sums of a tile go: to rows `row` words apart, added to those of the blocks of K before,
// (MR, NR) at `sum`, where there are any. Both may be the same. `ahead`, where it is not null, is
// memory that is soon read: with each word of K, `ahead_step` bytes more of it are fetched.
struct TileOut {
  void* data = nullptr;
  int64_t row = 0;
  const void* sum = nullptr;
  const char* ahead = nullptr;
  int64_t ahead_step = 0;
};

struct GemmKernels {
  int MR = 0, NR = 0;  // tile of accumulators held in registers
  int KC = 0;  // words of K summed in registers before the tile is added to C: the longest chain
  int k_per_word = 1;  // elements of K in a packed word
  int b_bytes = 4;     // of a packed word of B: 4, or 2: int8 pairs that are widened when read

  // out (MR, NR) = sum over kc words of a (kc, MR) * b (kc, NR), added to out.sum; rows >= mr are
  // undefined. b's rows are ldb words apart: NR when packed, the matrix's own stride when it is read
  // in place. Matrix units have rows NR words apart and nothing to add to: they have tile_beside.
  void (*tile)(int mr, int64_t kc, const void* a, const void* b, int64_t ldb,
               const TileOut& out) = nullptr;
  // Rows [i, i + mr) of a, words [k, k + kc): panel (kc, MR), rows beyond mr zero, elements of K
  // beyond `K` zero.
  void (*pack_a)(const Matrix& a, int64_t i, int mr, int64_t k, int64_t kc, int64_t K,
                 void* panel) = nullptr;
  // Columns [j, j + nr) of b: panel (kc, NR), the same way.
  void (*pack_b)(const Matrix& b, int64_t j, int nr, int64_t k, int64_t kc, int64_t K,
                 void* panel) = nullptr;
  // The tile's rows < mr and columns < nr through the epilogue to out(i.., j..).
  void (*store)(const void* tile, int64_t i, int mr, int64_t j, int nr,
                const Epilogue& e) = nullptr;

  GemmNames names{};
  const char* units = "registers";  // where a tile is
  int MC = 168, NT = 2048;          // rows and columns of the output that a task works on (gemm.cc)

  // `tile` of float32 rows of the matrix itself, lda words apart: none beyond mr is read or written.
  // nr columns, a multiple of NR, of b's own rows: without sums before, where there are more than NR.
  // Absent where rows are multiplied by the lanes of a vector.
  void (*tile_in_place)(int mr, int nr, int64_t kc, const float* a, int64_t lda, const float* b,
                        int64_t ldb, const TileOut& out) = nullptr;

  // --- what kernels of narrow numbers and on matrix units need besides ----------------------------
  int a_bytes = 4;
  int k_step =
      1;  // words: panels of A, and prepared ones of B, are filled up to a multiple, by zeros
  // pack_a by parts: the parts [from, to) of MR, in ascending order.
  void (*pack_rows)(const RowPanel& p, int64_t from, int64_t to) = nullptr;
  // The panel that `tile` reads, of prepared_bytes a word, once for each block of rows: words
  // [from, to), in ascending order, multiples of k_step.
  void (*prepare)(const ColumnPanel& p, int64_t from, int64_t to) = nullptr;
  int prepared_bytes = 0;
  bool starts = false;  // prepared panels begin with a line of what the accumulators start at
  bool reads_packed =
      false;  // `tile` reads packed panels as they are: only those in place are prepared
  // `tile`, with the rest between its instructions; the rest alone where kc is 0.
  void (*tile_beside)(int mr, int64_t kc, const TileRows& a, const void* b, const TileOut& out,
                      const GemmAside& aside) = nullptr;
  int64_t a_step = 0;       // bytes of a step of A's panel, in lines of kLineBytes
  bool reads_rows = false;  // whole steps of whole panels of A are read where they are, too
  // Around a task, on its thread: the units' own state.
  void (*begin)() = nullptr;
  void (*end)() = nullptr;
  // Packed words (kc / k_per_word, NR) as floats (kc, NR).
  void (*widen)(const void* words, int64_t kc, float* panel) = nullptr;
  // The float32 kernel that computes what this one must not: sums that aren't finite, rows of A and
  // columns of B whose largest |x| is non-zero and below `smallest`. Where there is one, panels of A
  // end with the largest |x| of their MR rows, prepared ones of B with those of their NR columns.
  const GemmKernels* exact = nullptr;
  float smallest = 0;

  // Bytes of a panel of A of kc words, and of a prepared one of B, with what it ends with.
  int64_t a_panel_bytes(int64_t kc) const {
    return filled(kc) * MR * a_bytes + (exact ? MR * 4 : 0);
  }
  int64_t prepared_panel_bytes(int64_t kc) const {
    return filled(kc) * NR * prepared_bytes + (exact || starts ? NR * 4 : 0);
  }

 private:
  int64_t filled(int64_t kc) const { return (kc + k_step - 1) / k_step * k_step; }
};

}  // namespace tilewright
