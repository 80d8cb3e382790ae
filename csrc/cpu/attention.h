// Attention on the CPU: what the forward and the backward driver share.
//
// One "unit" is a sequence's key/value head with the query heads of its group. A unit's query rows
// are cut into panels of at most NR lanes; a panel never needs to know which rows are its
// neighbours. Keys go in chunks of kChunk counted from the sequence's first, each in blocks of
// AttentionKernels::block. That order is the definition of the result:
//
//   row state = chunk 0 (+) chunk 1 (+) ...        chunk = block 0, block 1, ... streamed
//
// however rows are batched and whoever computes a chunk; so prefill and decode give a row the same
// bits.
#pragma once
#include <algorithm>

#include "core/kvpages.h"
#include "core/scratch.h"
#include "core/size.h"
#include "cpu/isa.h"
#include "tilewright/view.h"

namespace tilewright {

struct AttentionProblem {
  int64_t batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v;
  View q, k,
      v;  // (B, H, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, Dv): any float dtype and strides
  const PagedKeys* paged;  // stands for k and v, which are absent then; forward only
  View mask;               // (B, H, Tq, Tk) by strides that may be 0, bool or additive; optional
  View kv_lengths;         // (B,) int32 or int64; optional
  int64_t left, right;     // keys seen before and after a row's own position; negative: all
  float scale;
  float softcap;      // 0: none
  View alibi_slopes;  // (B, H) float32 by strides that may be 0; optional
  DropoutRule dropout;
  uint64_t first_element;  // number of the weight of (0, 0, 0, 0); the others in row-major order
  bool latency;            // few rows matter more than many: no matrix units, as for a cache
  bool drops() const { return dropout.threshold > 0; }
};

struct AttentionOutput {
  View out;  // (B, H, Tq, Dv)
  View lse;  // (B, H, Tq) float32, optional
};

struct AttentionGradients {
  View dout, out, lse;  // (B, H, Tq, Dv) twice, (B, H, Tq)
  View dlse;            // (B, H, Tq) float32, optional
  View dq, dk, dv;      // like q, k, v; an absent one is not computed
};

void attention_forward(const AttentionProblem& p, const AttentionOutput& o, const KernelTable& t);
void attention_backward(const AttentionProblem& p, const AttentionGradients& g,
                        const KernelTable& t);

namespace attention {

// Some rows of K or of V: a matrix with rows and columns anywhere, or of int8 and times scale[row].
struct KeyRows {
  Matrix rows;
  const float* scale;  // null unless int8
};

// A head's rows of K or, with `v`, of V in a page, from its token `first` on.
KeyRows rows_in_page(const PagedKeys& k, bool v, const char* page, int64_t head, int64_t first);

// K and V of a unit, some rows at a time, wherever they lie: in an array, in a page, or across
// pages, then put together in scratch.
class KeyReader {
 public:
  // `widen`: for a reader of floats; int8 rows are dequantized.
  KeyReader(const AttentionProblem& p, const KernelTable& table, bool widen);
  // Rows [key, key + count), at most AttentionKernels::block of them; valid until the next call of
  // the same name.
  KeyRows keys(int64_t unit, int64_t key, int64_t count) const;
  KeyRows values(int64_t unit, int64_t key, int64_t count) const;

 private:
  KeyRows paged(bool v, int64_t unit, int64_t key, int64_t count) const;

  const AttentionProblem& p_;
  const KernelTable& table_;
  bool widen_;
  int64_t room_;  // bytes for the rows of one block, 0 if they can be read where they are
  Scratch scratch_;
};

// Few query rows a key/value head (decode). The same bits as the panels; true if it applies:
// no mask, contiguous columns of k and v, few enough rows for packing not to pay.
// no mask, contiguous columns of k and v, few enough rows for packing not to pay, no matrix units.
bool forward_few_rows(const AttentionProblem& p, const AttentionOutput& o, const KernelTable& t);

constexpr int64_t kChunk = 512;  // keys whose partial result is defined on its own
constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kMaxLanes = 32;    // NR of the widest level
constexpr double kFlopsPerNs = 150;  // estimated, as core/parallel.h wants it
constexpr float kOnes[kMaxLanes] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Query rows that share a panel's lanes: `rows` rows from `row` on of each of `heads` heads from
// `head` on.
struct Panel {
  int64_t batch, head, row;
  int heads, rows;
  int lanes() const { return heads * rows; }
};

// The panels of a unit: one head's rows in groups of NR, or several whole heads where their rows
// are few.
struct Panels {
  int64_t group, rows;      // query heads of a unit, rows of a head
  int64_t heads_per_panel;  // 1 unless rows < NR
  int64_t panels_per_head;  // 1 where heads_per_panel > 1
  int lanes;                // NR

  Panels(const AttentionProblem& p, int NR);
  int64_t count() const { return divide_up(group, heads_per_panel) * panels_per_head; }
  Panel at(int64_t unit, int64_t heads_kv, int64_t index) const;
};

// Keys [begin, end) of a sequence.
struct Keys {
  int64_t begin, end;
  bool meets(int64_t first, int64_t last) const { return begin < last && first < end; }
  // The chunks of `size` keys that hold them, [first, last): at least one.
  int64_t first_chunk(int64_t size) const { return begin / size; }
  int64_t last_chunk(int64_t size) const {
    return std::max(first_chunk(size) + 1, divide_up(end, size));
  }
};

// Keys of sequence b that exist; the position among them that a row has by itself (the last row
// that of the last key); keys that it sees by its position.
int64_t length_of(const AttentionProblem& p, int64_t b);
int64_t position_of(const AttentionProblem& p, int64_t length, int64_t row);
Keys visible_keys(const AttentionProblem& p, int64_t length, int64_t row);
// Estimates for scheduling: chunks that the keys of `rows` rows of a head span at most; keys that a
// row sees, on average.
int64_t chunk_span(const AttentionProblem& p, int64_t rows);
double mean_visible_keys(const AttentionProblem& p);

// Rows beside each other, in lanes or in a call of DecodeKernels, as ScoreRule wants them.
struct RowRules {
  int32_t begin[kMaxLanes] = {}, end[kMaxLanes] = {};  // in lanes without a row 0: it sees nothing
  int32_t position[kMaxLanes] = {};
  float slope[kMaxLanes] = {};

  void set(const AttentionProblem& p, int i, int64_t batch, int64_t head, int64_t row,
           int64_t length);
  // Of rows from i on, for keys from `key` on; `all`: they see every one of them.
  ScoreRule rule(const AttentionProblem& p, int i, int64_t key, bool all) const;
};

// The rows of a panel, and the keys that some of them and that all of them see.
struct PanelRules : RowRules {
  Keys any, all;

  PanelRules() = default;
  PanelRules(const AttentionProblem& p, const Panel& panel, int64_t length);
  ScoreRule of_block(const AttentionProblem& p, int64_t key, int64_t keys) const {
    return rule(p, 0, key, all.begin <= key && key + keys <= all.end);
  }
};
// The same keys without looking at every row.
Keys seen_by_any(const AttentionProblem& p, const Panel& panel, int64_t length);

// Element d of x's rows of a panel as (d, lane), where a matrix can say so.
bool lanes_of(const View& x, const Panel& panel, Matrix& lanes);
// Elements [first, first + count) of x's rows of a panel as (count, NR), lanes beyond the panel
// zero. Like all packing it may write one vector more.
void pack_panel(const View& x, const Panel& panel, int64_t first, int64_t count,
                const GemmKernels& g, float* packed);
// Matrix of head `head` of x (B, H, T, D): element (row, d).
Matrix head_matrix(const View& x, int64_t batch, int64_t head);
Matrix from_row(Matrix m, int64_t row);

// Dropout of a panel's weights, or of their gradients: x (keys, NR), for keys from `key` on.
void drop(const AttentionProblem& p, const Panel& panel, int64_t key, int64_t keys,
          const AttentionKernels& a, float* x);

// The mask of a block of keys as ScoreBlock::bias wants it. False where the mask hides all of it.
bool load_bias(const AttentionProblem& p, const Panel& panel, int64_t key, int64_t keys,
               const KernelTable& t, float* rows, float* bias);

}  // namespace attention
}  // namespace tilewright
