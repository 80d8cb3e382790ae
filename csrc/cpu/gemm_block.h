// One task of a matrix product: a block of the output, for all of K.
#pragma once
#include <optional>
#include <vector>

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

// B's panel for one block of K: packed; made of quantized weights or of bfloat16; or the matrix
// itself where its rows are contiguous.
struct PanelSource {
  const char* packed = nullptr;  // chunk that starts at column `origin`
  int64_t origin = 0;
  const Matrix* direct = nullptr;
  const PackedMatrix* quantized = nullptr;
  const WeightKernels* weights = nullptr;
  const GemmKernels* pairs = nullptr;  // what packed a bfloat16 matrix that is read as floats

  bool makes_panels() const { return direct || quantized || pairs; }

  struct Panel {
    const void* data = nullptr;
    int64_t ldb = 0;
  };
  // Words [k, k + kc) of columns [j, j + NR). `edge` has room for them.
  Panel at(int64_t k, int64_t kc, int64_t j, int64_t N, int64_t K, const GemmKernels& g,
           void* edge) const;
  // The part-th of `parts` of the same words, where they are in memory, as lines to fetch.
  CacheLines lines(int64_t k, int64_t kc, int64_t j, int64_t N, int64_t K, const GemmKernels& g,
                   int64_t part, int64_t parts) const;
};

// What a kernel by terms (simd/gemm_split.cc) leaves to the float32 kernel, found by content alone:
// sums that are not finite, and all of a row of A, or of a column of B, whose largest |x| is too
// small.
class GemmRepair {
 public:
  GemmRepair(const Gemm& p, const GemmKernels& g, const PanelSource& b, int64_t rows, int64_t cols)
      : p_(p), g_(g), b_(b), rows_(size_t(rows * g.MR)), cols_(size_t(cols * g.NR)) {}

  // What the r-th panel of A, or the c-th of B, of a block of K ends with.
  void read_rows(int64_t r, const float* largest);
  void read_columns(int64_t c, const float* largest);
  // The finished sums (mr, NR) of the r-th panel of A, which starts at row i, and the c-th of B,
  // which starts at column j.
  void run(int64_t r, int64_t i, int mr, int64_t c, int64_t j, float* sums) const;

 private:
  bool too_small(float largest) const { return largest > 0 && largest < g_.smallest; }
  bool any_too_small(const float* largest, int n) const;
  void compute(int64_t i, int mr, int64_t j, float* out) const;

  const Gemm& p_;
  const GemmKernels& g_;
  const PanelSource& b_;
  std::vector<float> rows_, cols_;  // the largest |x| so far
};

// Rows [i0, i0 + mc), columns [j0, j0 + nt) of the output.
class GemmBlock {
 public:
  GemmBlock(const Gemm& p, const GemmKernels& g, const PanelSource& b, int64_t i0, int64_t mc,
            int64_t j0, int64_t nt);
  ~GemmBlock();
  GemmBlock(const GemmBlock&) = delete;
  GemmBlock& operator=(const GemmBlock&) = delete;
  void run();

 private:
  struct Step {  // a panel of B in a block of K
    int64_t index, k, kc, c;
    bool exists;
  };
  struct Tile {
    int64_t r, c;
    bool first, last;  // block of K
    float* data;
  };
  Step after(const Step& s) const;
  int64_t row(int64_t r) const { return i0_ + r * g_.MR; }
  int64_t column(int64_t c) const { return j0_ + c * g_.NR; }
  int rows_of(int64_t r) const;

  void pack_a(int64_t k, int64_t kc);
  char* prepared(const Step& s) const;
  PanelSource::Panel panel_of(const Step& s) const;
  GemmAside part_of_panel(const Step& s, int64_t part);  // of rows_ parts
  void prepare_first(const Step& s);
  void multiply(const Step& s, const PanelSource::Panel& panel, int64_t r, const Step& next);
  // Where the n-th tile is described: by turns, for to copy what has just been written would wait.
  Tile& tile_of(int64_t n) { return tile_[n & 1]; }
  float* sum_of(const Tile& t) const;
  CacheLines out_lines(const Tile& t) const;
  void finish(const Tile& t);

  const Gemm& p_;
  const GemmKernels& g_;
  const PanelSource& b_;
  const int64_t i0_, mc_, j0_, nt_;
  const int64_t KW_, rows_, cols_, tile_words_, kc_max_;
  const bool one_block_, few_;
  const Scratch a_block_, sums_, tiles_, edge_, prepared_;
  std::optional<GemmRepair> repair_;
  PanelSource::Panel next_;  // what is being prepared
  int64_t count_ = 0;        // tiles multiplied
  Tile tile_[2]{};           // being multiplied, and not finished yet: by turns
};

}  // namespace tilewright
