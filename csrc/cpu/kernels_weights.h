// What a level provides for right-hand sides that stay narrow in memory: constant weights of 16, 8 or 4
// bits that are multiplied by floats as the floats they stand for; and quantized ones by integers, group
// by group.
#pragma once
#include <stdint.h>

#include "cpu/kernels_gemm.h"

namespace tilewright {

// NR columns of B in words: a word is a pair along K, two bfloat16 (4 bytes), two int8 (2 bytes) or two
// nibbles (1 byte, the lower one first), both signed. Line k / 2 holds the elements k and k + 1 of every
// column; of float16 row k, then row k + 1.
struct WeightPanel {
  const char* words;    // (ceil(K / 2), NR)
  int bits;             // 16, 8 or 4
  int shift;            // q = stored + shift: 128 or 8 where the data are unsigned, else 0
  int64_t group;        // neighbours along K that share a scale; K where all do
  const float* scale;   // (groups, ld), from the panel's first column on; whole vectors
  const float* offset;  // likewise, or nullptr: b = scale * q + offset
  int64_t ld;
  int64_t lines;                // of words: the next panel's follow
  DType floats = DType::other;  // of 16 bits, which have no scales: bf16 or f16

  int64_t line_bytes(int NR) const { return int64_t(NR) * bits / 4; }
};

// How far beyond what is read lies what is to be fetched meanwhile: words in bytes, scales in floats.
struct WeightAhead {
  int64_t words = 0, scales = 0;
};

// Few rows of floats times rows [k, k + kc) of panels side by side; k is even.
struct WeightTiles {
  int rows, panels;
  const float* a;  // from element k of the first row on
  int64_t lda;
  WeightPanel panel;  // the first
  int64_t k, kc;
  WeightAhead ahead;
  float* sums;  // (panels, few, NR): set where k is 0, else added to
};

struct WeightKernels {
  int few = 0;   // rows that `tiles` takes
  int wide = 0;  // panels that it takes at once, if there are as many

  // Floats of 16 bits, as GemmKernels::pack_b: a panel's lines from word k on.
  void (*pack)(const Matrix& b, int64_t j, int nr, int64_t k, int64_t kc, int64_t K,
               void* panel) = nullptr;
  // panel (kc, NR): rows [k, k + kc) of B as floats; k is even.
  void (*to_floats)(const WeightPanel& w, int64_t k, int64_t kc, float* panel) = nullptr;
  // The same of floats of 16 bits, and gemm_f32's tile of all MR rows of a (kc, MR) times the panel.
  void (*tile_of_halves)(const WeightPanel& w, int64_t k, int64_t kc, const float* a, float* panel,
                         const TileOut& out) = nullptr;
  // gemm_f32's tile without the panel in between: the same floats, the same order.
  void (*tiles)(const WeightTiles& t) = nullptr;
  // Words of nibbles as gemm_s8's words, pairs of int8. `count` is a multiple of NR.
  void (*to_pairs)(const void* nibbles, int64_t count, void* pairs) = nullptr;
  // sums[i] (+)= the sum of row i of a panel (kc, MR) of gemm_s8's a.
  void (*row_sums)(bool first, int64_t kc, const void* a, int32_t* sums) = nullptr;
  // Adds a group's integers (MR, NR) to sum (MR, NR), floats:
  //   sum = fma(row_sum, offset, fma(acc + shift * row_sum, scale, sum))
  // row_sums may be nullptr where there is neither shift nor offset.
  void (*accumulate)(int mr, bool first, const void* acc, const int32_t* row_sums,
                     const WeightPanel& w, int64_t group, float* sum) = nullptr;
  // y = activation(fma(scale_a, sum, fma(offset_a, column_sum, bias))) + residual.
  void (*store)(const float* sum, int64_t i, int mr, int64_t j, int nr,
                const Epilogue& e) = nullptr;
};

}  // namespace tilewright
