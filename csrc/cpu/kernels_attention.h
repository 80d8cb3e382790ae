// What an attention level provides beside its GEMM tile: the softmax of a block of scores, and what
// joins blocks.
//
// Everything works on panels whose NR lanes (GemmKernels::NR) are query rows: a block of scores is
// (keys, NR), an accumulator (dims, NR). So maxima, sums and rescaling run down the lanes, and no
// row can see another one.
#pragma once
#include <stdint.h>

#include "cpu/kernels_dropout.h"
#include "cpu/kernels_gemm.h"

namespace tilewright {

// How q . k of some rows becomes their scores, for keys from `first` on:
//
//   t = scale * s                          softcap * tanh(scale * s) where softcap > 0
//   t = t - slope * |position - key|       ALiBi
//   t = -inf                               unless begin <= key < end
//
// All arrays are (rows,); keys and positions count from the sequence's first key.
struct ScoreRule {
  float scale;    // where softcap > 0 already divided by it
  float softcap;  // 0: none
  int32_t first;
  const int32_t *begin, *end;  // null where every row sees every key of the block
  const int32_t* position;
  const float* slope;  // null: no ALiBi
};

// A block of scores: `keys` consecutive keys against one panel of rows.
struct ScoreBlock {
  float* scores;  // (keys, NR): q . k on entry, softmax weights on return
  const float*
      bias;  // (keys, NR), added by the rule's end; -inf masks whatever the score is. May be null
  float* derivative;  // (keys, NR), of the softcap at each score; written if it is not null
  int64_t keys;
  ScoreRule rule;
};

// A product on matrix units: out (rows, NR) = left (rows, kc) * right (kc, NR), where the left operand
// lies in panels of 32 rows. out may be written up to a whole panel. No rows: nothing to do.
struct TileProduct {
  const void* left = nullptr;
  int64_t panel_bytes = 0, rows = 0, kc = 0;
  const void* right = nullptr;
  float* out = nullptr;
};

struct AttentionKernels {
  int block = 0;  // keys of one step of the streaming softmax

  // P = exp(t - max), t by the rule, with the running maximum (NR,) and sum (NR,) brought up
  // to date; `alpha` (NR,) is what older sums have to be multiplied by. A row without a visible key
  // in the block keeps its state.
  void (*softmax)(const ScoreBlock& s, float* max, float* sum, float* alpha) = nullptr;
  // The same for matrix units, whose right operand `weights` is P by so many terms; the scores become
  // P only if `floats` are wanted. Null without such units.
  void (*softmax_by_terms[4])(const ScoreBlock& s, bool floats, float* max, float* sum,
                              float* alpha, void* weights) = {};
  // The same without floats, and beside it the scores of one block and the sums of another one.
  void (*softmax_beside[4])(const ScoreBlock& s, float* max, float* sum, float* alpha,
                            void* weights, const TileProduct& scores, const TileProduct& sums) = {};
  // The products of blocks alone, where weights have so many terms.
  void (*scores_by_terms[4])(const TileProduct& p) = {};
  void (*sums_by_terms[4])(const TileProduct& p) = {};
  // A right operand of so many terms from its columns: x (keys, NR) becomes one step of it, NR words
  // of K by NR keys, those from `keys` on zero. largest (NR,): of the first terms, keys by lane.
  void (*turn_to_terms[4])(const float* x, int keys, void* step, float* largest) = {};
  // What a right operand of kc words is made of: (kc, NR).
  void (*widen_terms[4])(const void* panel, int64_t kc, float* x) = {};
  // weights and score_gradient in one, without a derivative, and dS as a right operand of so many
  // terms, which ends with the largest |dS| of each lane.
  void (*gradient_to_terms[4])(const ScoreBlock& s, const float* lse, const float* delta, float* dP,
                               void* terms) = {};
  // P = exp(t - lse), the backward pass's recomputation; 0 everywhere in a row whose lse is -inf.
  void (*weights)(const ScoreBlock& s, const float* lse) = nullptr;
  // dS = P * (dP - delta), times the `derivative` of the softcap if there is one, in place of dP; 0 where P is 0, whatever
  // else is.
  void (*score_gradient)(int64_t keys, const float* P, const float* delta, const float* derivative,
                         float* dP) = nullptr;
  // x (keys, NR) of the first `lanes` rows with dropout; first (lanes,): the element number of a
  // row's first key.
  void (*drop)(const DropoutRule& rule, const uint64_t* first, int lanes, int64_t keys,
               float* x) = nullptr;
  // sum (rows, NR) = alpha * sum + tile.
  void (*rescale_add)(int64_t rows, const float* alpha, const float* tile, float* sum) = nullptr;
  // The state of a chunk of keys joins that of the chunks before it: (max, sum, out (dims, NR)).
  void (*combine)(int64_t dims, const float* chunk_max, const float* chunk_sum,
                  const float* chunk_out, float* max, float* sum, float* out) = nullptr;
  // out(i, d) = panel[d][lane + i] * factor[lane + i] for i < rows: the panel's lanes become rows
  // of a matrix.
  void (*store_rows)(const float* panel, int64_t dims, int lane, int rows, const float* factor,
                     const Matrix& out) = nullptr;
  // GemmKernels::tile for an operand `a` with Inf or NaN: a zero in b leaves the sum alone instead
  // of making a NaN of it.
  void (*guarded_tile)(int mr, int64_t kc, const float* a, const float* b, float* tile) = nullptr;
  bool (*all_finite)(const float* x, int64_t n) = nullptr;
  // Whether all of x is zero or in [2^-76, 2^59); and what is not, moved to `rest`, a zero in its
  // place (cpu/attention_products.h).
  bool (*all_usual)(const float* x, int64_t n) = nullptr;
  void (*separate)(float* x, int64_t n, float* rest) = nullptr;
  // all_usual of bfloat16: `lines` of n, `stride` elements apart.
  bool (*all_usual_bf16)(const uint16_t* x, int64_t lines, int64_t n, int64_t stride) = nullptr;
  // out[lane] = sum over d of a[d][lane] * b[d][lane].
  void (*dot_lanes)(int64_t dims, const float* a, const float* b, float* out) = nullptr;
  // rows (n, keys) of bool, `row` and `col` apart, to 0 (true) and -inf (false).
  void (*expand_bool)(const uint8_t* mask, int64_t row, int64_t col, int n, int64_t keys,
                      float* out) = nullptr;
};

// Few query rows against a block of keys, K and V read where they are.
struct DecodeBlock {
  int rows;                        // 1 to DecodeKernels::rows
  const float* q;                  // (rows, head_dim)
  Matrix k, v;                     // (keys, head_dim), (keys, head_dim_v), columns contiguous
  const float *k_scale, *v_scale;  // (keys,): what rows of int8 are multiplied by; else null
  int64_t keys;                    // at most AttentionKernels::block
  int64_t head_dim, head_dim_v;
  ScoreRule rule;  // begin and end are there
  float* scores;   // (rows, block), scratch
};

// What keys say about some rows, a row to a line: the state of a panel turned around.
struct RowStates {
  float *max, *sum;  // (rows,)
  float* out;        // (rows, stride)
  int64_t stride;    // head_dim_v rounded up to whole vectors
};

// The same numbers as the panels', bit for bit, where a panel would have few lanes in use.
struct DecodeKernels {
  int rows = 0;  // most rows of one call
  // The block joins the rows' states.
  void (*block)(const DecodeBlock& b, const RowStates& s) = nullptr;
  // The states of a chunk of keys join those of the chunks before it.
  void (*combine)(int rows, int64_t dims, const RowStates& chunk, const RowStates& s) = nullptr;
  // Row `row` of out = x * factor.
  void (*store)(const float* x, int64_t dims, float factor, int64_t row,
                const Matrix& out) = nullptr;
};

}  // namespace tilewright
