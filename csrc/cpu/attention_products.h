// The products of attention, in registers or on matrix units. Both have lanes, columns of rows of
// queries or keys, as their right operand:
//
//   scores (keys, NR) = rows of K or V (keys, dims) * lanes (dims, NR)
//   sums (dims, NR)  += V^T, K^T, Q^T or dO^T (dims, n) * weights (n, NR)
//
// A weight of zero hides what it weighs, NaN and Inf included.
//
// On matrix units float32 goes by three bfloat16 terms (simd/gemm_split.cc); of operands that are
// bfloat16 one term is all there is, and weights get two. What that can't hold is found by content,
// so that no row feels another one, and is left to the float32 kernel:
//
//   scores    of a row whose largest |x| is unusual, and of such a lane
//   sums      elements of the left operand that are unusual: taken out, multiplied by themselves;
//             lanes of weights whose largest is unusual
//
// unusual: not zero and below 2^-76 (weights: 2^-96, for they meet operands that are not smaller
// than that), or from 2^59 on: a sum of 256 products of usual numbers neither overflows nor loses
// what float32 would keep.
#pragma once
#include <vector>

#include "core/scratch.h"
#include "cpu/attention.h"

namespace tilewright::attention {

// Which kernels multiply.
struct Products {
  const KernelTable& table;
  const GemmKernels& exact;   // float32, in registers
  const GemmKernels& scores;  // the same one, or one on matrix units
  const GemmKernels& sums;
  const GemmKernels* narrow;  // packs bfloat16 as they are, in the layout of one term; may be null

  // `more`: another operand, or an empty view.
  Products(const AttentionProblem& p, const View& more, const KernelTable& table);
  bool on_matrix_units() const { return &scores != &exact; }
  int terms() const { return sums.prepared_bytes / 2; }  // of weights; in registers none
};

// Around a task: the state of the matrix units.
class Units {
 public:
  explicit Units(const Products& p) : g_(p.scores) {
    if (g_.begin) g_.begin();
  }
  ~Units() {
    if (g_.end) g_.end();
  }
  Units(const Units&) = delete;
  Units& operator=(const Units&) = delete;

 private:
  const GemmKernels& g_;
};

// A right operand: floats (kc, NR), and what a kernel reads of them.
struct Lanes {
  const float* x = nullptr;  // null where only terms were made of them
  const void* prepared = nullptr;
  const float* largest = nullptr;  // (NR,) of |x|; null if no lane is unusual

  // Bytes of what prepare() writes.
  static int64_t bytes(int64_t kc, const GemmKernels& g) {
    return g.prepare ? g.prepared_panel_bytes(kc) : 0;
  }
  // `smallest`: below it a largest |x| is unusual; 0: no lane can be unusual.
  static Lanes prepare(const float* x, int64_t kc, const GemmKernels& g, float smallest, void* to);
  // What prepare() returns, of what somebody else prepared.
  static Lanes prepared_from(const float* x, int64_t kc, const GemmKernels& g, float smallest,
                             const void* prepared);
  // Elements [0, dims) of x's rows of a panel as the right operand of scores, in memory of the caller.
  static Lanes of_rows(const View& x, const Panel& panel, int64_t dims, const Products& p,
                       char* memory);
  static int64_t row_bytes(int64_t dims, const Products& p) {
    return (dims + 1) * p.scores.NR * 4 + bytes(dims, p.scores);  // packing writes a vector beyond
  }
  bool unusual(int lane, float smallest) const;
};
constexpr float kSmallestInput = 0x1p-76f, kSmallestWeight = 0x1p-96f;

// Weights (rows, keys) of up to `panels` panels of rows as right operands, a panel of NR keys each, from
// what scores become: (keys, NR) of a panel of rows.
class TurnedWeights {
 public:
  TurnedWeights(int panels, int64_t keys, const Products& p);
  // Keys [at, at + NR) of panel i, of which there are `count`; x null: all zero.
  void put(int64_t at, int i, const float* x, int count);
  // Those of panels [first, last).
  Lanes get(int64_t at, int first, int last) const;

 private:
  int64_t number(int64_t at, int i) const { return at / p_.exact.NR * panels_ + i; }
  char* step(int64_t at, int i) const { return memory_.as<char>() + number(at, i) * step_bytes_; }
  float* largest(int64_t at, int i) const {
    return largest_.as<float>() + number(at, i) * p_.exact.NR;
  }
  float* floats(int64_t at, int i) const {
    return floats_.as<float>() + number(at, i) * p_.exact.NR * p_.exact.NR;
  }

  const Products& p_;
  int panels_;
  int64_t steps_, step_bytes_;
  Scratch memory_, largest_, floats_;
  std::vector<char> kept_;  // floats are there, of what terms don't hold
};

// Rows of K or of V as the left operand of scores, packed in memory of the caller.
class ScoreRows {
 public:
  static int64_t bytes(int64_t rows, int64_t dims, const Products& p) {
    return divide_up(rows, p.scores.MR) * p.scores.a_panel_bytes(dims);
  }
  void pack(const Matrix& rows, int64_t count, int64_t dims, const Products& p, char* memory);
  // scores (count, NR); a last partial tile writes lines beyond `count`.
  void multiply(int64_t count, const Lanes& lanes, const Products& p, float* scores) const;
  // The same on matrix units by somebody else, and what is left to do then.
  TileProduct product(int64_t count, const Lanes& lanes, const Products& p, float* scores) const {
    return {memory_, p.scores.a_panel_bytes(dims_), count, dims_, lanes.prepared, scores};
  }
  void settle(int64_t count, const Lanes& lanes, const Products& p, float* scores) const {
    if (!usual_ || lanes.largest) repair(count, lanes, p, scores);
  }

 private:
  const float* largest(int64_t panel, const Products& p) const;
  void repair(int64_t count, const Lanes& lanes, const Products& p, float* scores) const;

  Matrix rows_{};
  int64_t dims_ = 0;
  char* memory_ = nullptr;
  bool usual_ = true;
};

// The left operand (dims, n) of sums, in pieces of n, packed in memory of the caller.
class SumRows {
 public:
  static int64_t bytes(int64_t dims, int64_t n, const Products& p) {
    return divide_up(dims, p.sums.MR) * p.sums.a_panel_bytes(n) + kMaxLanes * 4;
  }
  void start(int64_t dims, int64_t n, const Products& p, char* memory);
  bool usual() const { return rest_.empty(); }  // lanes' floats are not read
  // Columns [at, at + count): x(d, i) of any dtype and strides. On matrix units `at` is a multiple
  // of NR.
  void pack(const Matrix& x, int64_t at, int64_t count);
  // All columns: x's rows of these panels, which are `lanes` already.
  void pack_panels(const View& x, const Panel* panels, const Lanes* lanes, int count);
  // sums (dims, NR) = columns [from, from + kc) * lanes; a last partial tile writes lines beyond.
  void multiply(int64_t from, int64_t kc, const Lanes& lanes, float* sums) const;
  // The same of the first kc columns, usual ones, on matrix units by somebody else.
  TileProduct product(int64_t kc, const void* weights, float* sums) const {
    return {memory_, p_->sums.a_panel_bytes(n_), dims_, kc, weights, sums};
  }

 private:
  struct Piece {  // rows [first, first + rows) of x, columns [at, at + count)
    int64_t first, rows, at, count;
    Matrix x;
    std::vector<float> own;  // what x shows, if it is nobody else's
  };
  void pack_narrow(const View& x, const Panel& rows, int64_t at);
  void pack_block(const float* x, int64_t first, int64_t at);
  void pack_usual(int64_t first, int64_t at, int64_t count, float* block, const Matrix& shown);
  void repair(int64_t d, int mr, int64_t from, int64_t kc, const Lanes& lanes, float* tile) const;
  void add_exact(const std::vector<Piece>& pieces, int64_t d, int mr, int64_t from, int64_t kc,
                 const float* weights, float* sums) const;
  char* panel(int64_t d) const { return memory_ + d / p_->sums.MR * p_->sums.a_panel_bytes(n_); }

  const Products* p_ = nullptr;
  int64_t dims_ = 0, n_ = 0;
  char* memory_ = nullptr;
  bool finite_ = true;             // in registers
  std::vector<Piece> all_, rest_;  // on matrix units: where x is; its unusual elements
};

}  // namespace tilewright::attention
