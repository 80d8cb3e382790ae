// One task of a matrix product: a block of the output, for all of K. Here with the kernels that
// multiply in registers; gemm_pipeline.h has the matrix units.
#pragma once
#include "core/scratch.h"
#include "cpu/gemm.h"

namespace tilewright {

inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
inline int64_t round_up(int64_t a, int64_t b) {
  return divide_up(a, b) * b;
}

constexpr int64_t kPackSlack = 64;  // words: packing may write one vector past a panel

// K counted in packed words.
inline int64_t words_of(int64_t K, const GemmKernels& g) {
  return divide_up(K, g.k_per_word);
}

// Where word k of panel `j / NR` lies in a packed chunk.
inline int64_t panel_offset(int64_t k, int64_t j, int64_t KW, int64_t NR) {
  return j * KW + k * NR;
}

// B's panel for one block of K: packed; made of weights that stay narrow in memory; or the matrix itself
// where its rows are contiguous.
struct PanelSource {
  const char* packed = nullptr;  // chunk that starts at column `origin`
  int64_t origin = 0;
  const Matrix* direct = nullptr;
  const PackedMatrix* narrow = nullptr;
  const WeightKernels* weights = nullptr;

  bool makes_panels() const { return direct || narrow; }

  struct Panel {
    const void* data = nullptr;
    int64_t ldb = 0;        // words, or in place elements
    bool in_place = false;  // the matrix's own rows
  };
  // Words [k, k + kc) of columns [j, j + NR). `edge` has room for them.
  Panel at(int64_t k, int64_t kc, int64_t j, int64_t N, int64_t K, const GemmKernels& g,
           void* edge) const;
  // The part-th of `parts` of the same words, where they are in memory, as lines to fetch; none where
  // they are made.
  CacheLines lines(int64_t k, int64_t kc, int64_t j, int64_t N, int64_t K, const GemmKernels& g,
                   int64_t part, int64_t parts) const;
};

// Rows [i0, i0 + mc), columns [j0, j0 + nt) of the output.
class GemmBlock {
 public:
  GemmBlock(const Gemm& p, const GemmKernels& g, const PanelSource& b, int64_t i0, int64_t mc,
            int64_t j0, int64_t nt);
  GemmBlock(const GemmBlock&) = delete;
  GemmBlock& operator=(const GemmBlock&) = delete;
  void run();

 private:
  int rows_of(int64_t r) const;
  char* panel_of_a(int64_t r, int64_t k, int64_t kc) const;
  PanelSource::Panel panel_of_b(int64_t k, int64_t kc, int64_t j) const;
  bool goes_to_output(int64_t r, int nr) const;
  CacheLines next_panel(int64_t k, int64_t kc, int64_t c) const;
  TileOut out_of(int64_t r, int64_t c, int64_t j, bool first, bool last, int nr) const;
  void multiply(int64_t k, int64_t kc, int64_t r, int64_t c, const PanelSource::Panel& panel,
                const char* next, int64_t ahead);
  void multiply_down(int64_t k, int64_t kc, int64_t c);
  void multiply_across();

  const Gemm& p_;
  const GemmKernels& g_;
  const PanelSource& b_;
  const int64_t i0_, mc_, j0_, nt_;
  const int64_t KW_, rows_, cols_, tile_words_, kc_max_;
  const bool one_block_, rows_in_place_, all_k_;
  const bool down_;    // one panel of B after the other, as they lie in memory
  const bool widens_;  // the first rows' tile makes a panel of B, for the others
  const bool across_;  // one panel of A's rows after the other: B stays in the first cache
  const Scratch a_block_, sums_, tile_, edge_, prepared_;
};

}  // namespace tilewright
