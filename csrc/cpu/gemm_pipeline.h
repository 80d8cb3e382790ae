// One task of a matrix product on matrix units: as GemmBlock, with the rest of the work between their
// instructions.
#pragma once
#include <optional>
#include <vector>

#include "cpu/gemm_block.h"

namespace tilewright {

// What a kernel by terms (simd/gemm_split.cc) leaves to the float32 kernel, found by content alone:
// sums that are not finite, and all of a row of A, or of a column of B, whose largest |x| is too
// small.
class GemmRepair {
 public:
  GemmRepair(const Gemm& p, const GemmKernels& g, const PanelSource& b, int64_t rows, int64_t cols);

  // What the r-th panel of A, or the c-th of B, of a block of K ends with.
  void read_rows(int64_t r, const float* largest);
  void read_columns(int64_t c, const float* largest);
  // Rows of a tile, as bits, that the kernel must not compute: valid once all of K has been read.
  uint32_t rows_of(int64_t r, int64_t c) const;
  // The finished sums (mr, NR) of the r-th panel of A, which starts at row i, and the c-th of B,
  // which starts at column j.
  void run(int64_t r, int64_t i, int mr, int64_t c, int64_t j, float* sums) const;

 private:
  bool too_small(float largest) const { return largest > 0 && largest < g_.smallest; }
  void compute(int64_t i, int mr, int64_t j, float* out) const;

  const Gemm& p_;
  const GemmKernels& g_;
  const PanelSource& b_;
  std::vector<float> rows_, cols_;                 // the largest |x| so far
  std::vector<uint32_t> small_rows_, small_cols_;  // of each panel, as bits
};

// Rows [i0, i0 + mc), columns [j0, j0 + nt) of the output.
class GemmPipeline {
 public:
  GemmPipeline(const Gemm& p, const GemmKernels& g, const PanelSource& b, int64_t i0, int64_t mc,
               int64_t j0, int64_t nt);
  ~GemmPipeline();
  GemmPipeline(const GemmPipeline&) = delete;
  GemmPipeline& operator=(const GemmPipeline&) = delete;
  void run();

 private:
  struct Step {  // a panel of B in a block of K
    int64_t index, block, k, kc, c;
    bool exists;
  };
  struct Tile {
    int64_t r, c;
    bool last;          // block of K
    float* data;        // null: the tile is where it belongs
    float* sum;         // of the blocks of K before, or null
    uint32_t unstored;  // rows that are left to the repair
  };
  Step after(const Step& s) const;
  int64_t row(int64_t r) const { return i0_ + r * g_.MR; }
  int64_t column(int64_t c) const { return j0_ + c * g_.NR; }
  int rows_of(int64_t r) const;
  int columns_of(int64_t c) const;

  bool in_place(int64_t r) const { return rows_in_place_ && rows_of(r) == g_.MR; }
  TileRows rows_at(const Step& s, int64_t r) const;
  char* panel_of_a(const Step& s, int64_t r) const;
  char* prepared(const Step& s) const;
  const void* panel_of_b(const Step& s);
  void add_rows(GemmAside& aside, const Step& s, int64_t r) const;
  void add_columns(GemmAside& aside, const Step& s, int64_t part);
  void add_finish(GemmAside& aside, Tile& t) const;
  void fetch_rows(GemmAside& aside, const Step& s, int64_t r) const;
  CacheLines out_lines(const Tile& t) const;
  void read_largest(const Step& s, int64_t r);
  void begin(const Step& s);
  void multiply(const Step& s, const void* b, int64_t r, const Step& next);
  void end();
  void repair(const Tile& t) const;
  // Where the n-th tile is described: by turns, for to copy what has just been written would wait.
  Tile& tile_of(int64_t n) { return tile_[n & 1]; }
  float* sum_of(int64_t r, int64_t c) const;
  float* spare(int64_t n) const { return tiles_.as<float>() + (n & 1) * tile_words_; }
  TileOut place(Tile& t, bool first);

  const Gemm& p_;
  const GemmKernels& g_;
  const PanelSource& b_;
  const int64_t i0_, mc_, j0_, nt_;
  const int64_t KW_, rows_, cols_, tile_words_, kc_max_, a_bytes_, b_bytes_;
  const bool one_block_, prepares_, rows_in_place_;
  const Scratch a_block_, sums_, tiles_, edge_, prepared_;
  std::optional<GemmRepair> repair_;
  PanelSource::Panel next_;  // what is being prepared
  int64_t count_ = 0;        // tiles multiplied
  Tile tile_[2]{};           // being multiplied, and not finished yet: by turns
};

}  // namespace tilewright
