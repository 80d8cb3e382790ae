// Attention, forward:  out = softmax(t) V,  lse = log(sum(exp(t))),  t = scale * Q K^T + bias, with
// softcap, ALiBi and windows as ScoreRule (cpu/kernels_attention.h) says
//
//   for each unit (batch, key/value head)      in parallel: a task has a range of the unit's panels
//     for each chunk of 512 keys
//       for each block of 128 keys             K and V packed once for all the task's panels
//       for each panel of NR query rows
//         for each block that a row sees
//           S^T = K Q^T    (keys, NR)            micro-kernel, straight into the score block
//           P^T, alpha     (keys, NR)            softmax down the lanes
//           O^T = alpha O^T + V^T P^T  (Dv, NR)  micro-kernel
//         row state = state (+) chunk's
//
// The two products are those of attention_products.h, in registers or on matrix units; the latter
// have a softmax of their own (simd/attention_amx.cc). Few rows (decode) take attention_decode.cc, if
// it can and there are no such units. Where a unit has one panel and there are
// fewer units than threads want, chunks are tasks of their own and meet afterwards, in the same
// order: the bits don't change.
//
// Parameter    bounded by
// panels/task  packing K and V again in another task should cost little (kRowsPerTask), but a task
//              stays short (kTaskFlops)
// chunk        512 keys x (D + Dv) packed words in L2: 256 KB for heads of 64, 384 KB in three terms
//
// Numerics: float32; see simd/attention.cc for the order of sums. A block that a row does not see
// leaves its state alone, so neither padding nor the rows of the same panel can be felt. Inf and
// NaN in values reach the rows that see them and no other: such blocks go to the guarded tile (on
// matrix units: such values do).
// Windows skip the blocks outside them. Memory: packed chunk and row states, linear in Tq and D,
// independent of Tk. Dropout comes after the sum: it weighs values, lse does not see it.
//
// Method: Dao (2023), FlashAttention-2, on the GEMM of gemm_kernel.cc.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "core/parallel.h"
#include "core/scratch.h"
#include "core/trace.h"
#include "cpu/attention_products.h"

namespace tilewright {
namespace attention {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kRowsPerTask = 512, kRowsPerTaskOnUnits = 1024;
constexpr double kTaskFlops = 4e8;

// What a chunk of keys (or all chunks so far) says about a panel: max (NR,), sum (NR,), out (Dv,
// NR).
struct State {
  float *max, *sum, *out;

  static int64_t words(const GemmKernels& g, int64_t dims) { return (2 + dims + g.MR) * g.NR; }
  State(float* memory, int NR) : max(memory), sum(memory + NR), out(memory + 2 * NR) {}
  void clear(int NR) const {  // but for out
    std::fill(max, max + NR, -kInf);
    std::fill(sum, sum + NR, 0.0f);
  }
};

// K and V of one chunk, each block packed when a panel first needs it.
class PackedChunk {
 public:
  PackedChunk(const AttentionProblem& p, const Products& products)
      : p_(p),
        products_(products),
        block_(products.table.attention.block),
        keys_(p, products.table, true),
        block_k_(ScoreRows::bytes(block_, p.head_dim, products)),
        block_v_(SumRows::bytes(p.head_dim_v, block_, products)),
        memory_(divide_up(kChunk, block_) * (block_k_ + block_v_)) {}

  // From here on the chunk that starts at `key` of the unit's keys; `end`: no key from there on is
  // read.
  void start(int64_t unit, int64_t key, int64_t end) {
    unit_ = unit, first_ = key, end_ = std::min(end, key + kChunk);
    std::fill(ready_, ready_ + divide_up(kChunk, block_), false);
  }
  int64_t first() const { return first_; }
  int64_t end() const { return end_; }

  struct Block {
    ScoreRows k;
    SumRows v;
  };
  const Block& block(int64_t index) {
    if (!ready_[index]) pack(index);
    return packed_[index];
  }

 private:
  void pack(int64_t index) {
    char* const memory = memory_.as<char>() + index * (block_k_ + block_v_);
    const int64_t key = first_ + index * block_, keys = std::min<int64_t>(block_, end_ - key);
    Block& b = packed_[index];
    b.k.pack(keys_.keys(unit_, key, keys).rows, keys, p_.head_dim, products_, memory);
    const Matrix v = keys_.values(unit_, key, keys).rows;
    b.v.start(p_.head_dim_v, keys, products_, memory + block_k_);
    b.v.pack({v.data, v.dtype, v.col, v.row}, 0, keys);
    ready_[index] = true;
  }

  const AttentionProblem& p_;
  const Products& products_;
  const int64_t block_;
  KeyReader keys_;
  int64_t block_k_, block_v_;
  Scratch memory_;
  int64_t unit_ = 0, first_ = 0, end_ = 0;
  Block packed_[16];
  bool ready_[16];
};

// A panel's way through a chunk: what its keys say, `own`, joins `all` at the end; or is `all`.
struct Visit {
  Panel panel{};
  PanelRules rules;
  const Lanes* q = nullptr;
  State own{nullptr, 0}, all{nullptr, 0};
  bool begun = false;  // own.out holds sums
};

// What one thread needs to take panels through a chunk.
//
// On matrix units three blocks are under way, of whatever panels: beside the softmax of one, the
// scores of the next one and the sums of the one before are multiplied. So units and registers work
// at once, and neither waits for the other's results.
class Worker {
 public:
  Worker(const AttentionProblem& p, const Products& products)
      : p_(p),
        products_(products),
        g_(products.sums),
        a_(products.table.attention),
        score_words_((a_.block + g_.MR) * g_.NR),
        bias_words_(p.mask ? (2 * a_.block + 2) * g_.NR : 0),
        state_words_(State::words(g_, p.head_dim_v)),
        weight_bytes_(Lanes::bytes(a_.block, g_)),
        blocks_(2 * (score_words_ + bias_words_) * 4),
        weights_(2 * weight_bytes_),
        sums_((p.head_dim_v + g_.MR) * g_.NR * 4),
        states_(kVisits * state_words_ * 4) {}

  // What the chunk's keys say about the panel, whose rows are q, becomes `all` or joins it; not
  // before finish(). Until then q and the chunk have to stay.
  void run_chunk(const Panel& panel, const PanelRules& rules, const Lanes& q, PackedChunk& chunk,
                 State all, bool join) {
    Visit& visit = visits_[at_];
    const State own(join ? states_.as<float>() + at_ * state_words_ : all.max, g_.NR);
    visit = {panel, rules, &q, own, all, false};
    own.clear(g_.NR);
    Block block = next_block(visit, chunk, first_visible(rules, chunk));
    if (block.keys > 0) at_ = (at_ + 1) % kVisits;
    for (; block.keys > 0; block = next_block(visit, chunk, block.key + a_.block)) take(block);
    now_.visit == &visit ? void(now_.last = true) : leave(visit);
  }
  void finish() {
    while (now_.keys > 0 || before_.keys > 0) advance({});
  }

 private:
  static constexpr int kVisits = 3;  // as many as there are blocks under way

  // Keys [key, key + keys) of a chunk for a visit; none: no block.
  struct Block {
    Visit* visit = nullptr;
    int64_t key = 0, keys = 0;
    const PackedChunk::Block* packed = nullptr;
    float *scores = nullptr, *bias = nullptr;
    char* weights = nullptr;
    float* alpha = nullptr;
    bool last = false;  // of the visit
  };

  int64_t first_visible(const PanelRules& rules, const PackedChunk& chunk) const {
    return chunk.first() +
           std::max<int64_t>(0, rules.any.begin - chunk.first()) / a_.block * a_.block;
  }

  // The first block from `key` on that the mask does not hide; memory by turns.
  Block next_block(Visit& visit, PackedChunk& chunk, int64_t key) {
    const int64_t end = std::min(chunk.end(), visit.rules.any.end);
    float* const scores = blocks_.as<float>() + turn_ * (score_words_ + bias_words_);
    float *const rows = scores + score_words_, *const bias = rows + (a_.block + 1) * g_.NR;
    for (; key < end; key += a_.block) {
      const int64_t keys = std::min<int64_t>(a_.block, end - key);
      if (p_.mask && !load_bias(p_, visit.panel, key, keys, products_.table, rows, bias)) continue;
      const Block block{&visit,
                        key,
                        keys,
                        &chunk.block((key - chunk.first()) / a_.block),
                        scores,
                        p_.mask ? bias : nullptr,
                        weights_.as<char>() + turn_ * weight_bytes_,
                        alpha_[turn_]};
      turn_ = 1 - turn_;
      return block;
    }
    return {};
  }

  ScoreBlock score_block(const Block& b) const {
    return {b.scores, b.bias, nullptr, b.keys, b.visit->rules.of_block(p_, b.key, b.keys)};
  }

  void take(const Block& b) {
    if (a_.softmax_beside[terms()] && !p_.drops() && b.packed->v.usual()) return advance(b);
    finish();
    multiply_scores(b);
    const Lanes weights = softmax(b);
    b.packed->v.multiply(0, b.keys, weights, sums_of(b));
    add_sums(b);
  }
  int terms() const { return g_.prepared_bytes / 2; }

  // One block further.
  void advance(const Block& next) {
    if (now_.keys == 0) {
      if (next.keys > 0) multiply_scores(next);
      if (before_.keys > 0)
        before_.packed->v.multiply(0, before_.keys, lanes_of(before_), sums_of(before_));
    } else {
      const State& state = now_.visit->own;
      TileProduct scores, sums;
      if (next.keys > 0) {
        scores = next.packed->k.product(next.keys, *next.visit->q, products_, next.scores);
      }
      if (before_.keys > 0) {
        sums = before_.packed->v.product(before_.keys, before_.weights, sums_of(before_));
      }
      a_.softmax_beside[terms()](score_block(now_), state.max, state.sum, now_.alpha, now_.weights,
                                 scores, sums);
      if (next.keys > 0) next.packed->k.settle(next.keys, *next.visit->q, products_, next.scores);
    }
    if (before_.keys > 0) add_sums(before_);
    before_ = now_, now_ = next;
  }
  static Lanes lanes_of(const Block& b) { return {b.scores, b.weights, nullptr}; }

  void multiply_scores(const Block& b) const {
    b.packed->k.multiply(b.keys, *b.visit->q, products_, b.scores);
  }
  // Where sums go: a visit's first are its state.
  float* sums_of(const Block& b) const {
    return b.visit->begun ? sums_.as<float>() : b.visit->own.out;
  }
  void add_sums(const Block& b) {
    Visit& visit = *b.visit;
    if (visit.begun) a_.rescale_add(p_.head_dim_v, b.alpha, sums_.as<float>(), visit.own.out);
    visit.begun = true;
    if (b.last) leave(visit);
  }
  void leave(const Visit& v) const {
    if (!v.begun) std::fill(v.own.out, v.own.out + p_.head_dim_v * g_.NR, 0.0f);
    if (v.own.out == v.all.out) return;
    a_.combine(p_.head_dim_v, v.own.max, v.own.sum, v.own.out, v.all.max, v.all.sum, v.all.out);
  }

  // Weights, after dropout, as the right operand of sums. How they are made must not follow from the
  // values that they weigh, or a row would feel what it does not see.
  Lanes softmax(const Block& b) const {
    const ScoreBlock s = score_block(b);
    const State& state = b.visit->own;
    if (const auto by_terms = a_.softmax_by_terms[terms()]) {
      by_terms(s, true, state.max, state.sum, b.alpha, b.weights);
      if (!p_.drops()) return lanes_of(b);
    } else {
      a_.softmax(s, state.max, state.sum, b.alpha);
    }
    if (p_.drops()) drop(p_, b.visit->panel, b.key, s.keys, a_, s.scores);
    // Weights are at most 1, and what is lost of small ones is small beside the row's largest.
    return Lanes::prepare(s.scores, s.keys, g_, 0, b.weights);
  }

  const AttentionProblem& p_;
  const Products& products_;
  const GemmKernels& g_;
  const AttentionKernels& a_;
  const int64_t score_words_, bias_words_, state_words_, weight_bytes_;
  Scratch blocks_, weights_, sums_, states_;
  float alpha_[2][kMaxLanes];
  Visit visits_[kVisits];
  Block now_, before_;
  int at_ = 0, turn_ = 0;
};

// out = O / sum, lse = max + log(sum); a row that saw nothing gets 0 and -inf.
void finish(const AttentionOutput& o, const Panel& panel, int64_t dims, const State& state,
            const KernelTable& table) {
  float factor[kMaxLanes] = {};
  for (int i = 0; i < panel.lanes(); ++i) factor[i] = state.sum[i] == 0 ? 0 : 1 / state.sum[i];
  for (int h = 0; h < panel.heads; ++h) {
    Matrix out = head_matrix(o.out, panel.batch, panel.head + h);
    out.data = static_cast<const char*>(out.data) + panel.row * out.row * dtype_size(out.dtype);
    table.attention.store_rows(state.out, dims, h * panel.rows, panel.rows, factor, out);
    if (!o.lse) continue;
    float* lse =
        o.lse.ptr<float>() + panel.batch * o.lse.stride[0] + (panel.head + h) * o.lse.stride[1];
    for (int r = 0; r < panel.rows; ++r) {
      const int i = h * panel.rows + r;
      lse[(panel.row + r) * o.lse.stride[2]] =
          state.sum[i] == 0 ? -kInf : state.max[i] + std::log(state.sum[i]);
    }
  }
}

// One task: panels [first, last) of a unit against all their keys.
void run_panels(const AttentionProblem& p, const AttentionOutput& o, const Products& products,
                const Panels& panels, int64_t unit, int64_t first, int64_t last) {
  const Units units(products);
  const GemmKernels& g = products.sums;
  const KernelTable& table = products.table;
  const int64_t count = last - first, length = length_of(p, unit / p.heads_kv);
  const int64_t state_words = State::words(g, p.head_dim_v),
                q_bytes = Lanes::row_bytes(p.head_dim, products);
  const Scratch states(count * state_words * 4), packed_q(count * q_bytes);
  const auto state_of = [&](int64_t i) {
    return State(states.as<float>() + i * state_words, g.NR);
  };
  std::vector<Lanes> queries;
  Keys seen{length, 0};
  for (int64_t i = 0; i < count; ++i) {
    const Panel panel = panels.at(unit, p.heads_kv, first + i);
    queries.push_back(
        Lanes::of_rows(p.q, panel, p.head_dim, products, packed_q.as<char>() + i * q_bytes));
    const Keys own = seen_by_any(p, panel, length);
    seen = {std::min(seen.begin, own.begin), std::max(seen.end, own.end)};
    if (own.begin < own.end) continue;
    state_of(i).clear(g.NR);
    std::fill_n(state_of(i).out, p.head_dim_v * g.NR, 0.0f);
  }
  PackedChunk chunk(p, products);
  Worker worker(p, products);
  for (int64_t key = seen.begin / kChunk * kChunk; key < seen.end; key += kChunk) {
    chunk.start(unit, key, seen.end);
    for (int64_t i = 0; i < count; ++i) {
      const Panel panel = panels.at(unit, p.heads_kv, first + i);
      const PanelRules rules(p, panel, length);
      if (!rules.any.meets(key, key + kChunk)) continue;
      // its first keys: joining an empty state would copy the chunk's
      const bool join = rules.any.begin < key;
      worker.run_chunk(panel, rules, queries[size_t(i)], chunk, state_of(i), join);
    }
    worker.finish();
  }
  for (int64_t i = 0; i < count; ++i) {
    finish(o, panels.at(unit, p.heads_kv, first + i), p.head_dim_v, state_of(i), table);
  }
}

// Few panels and many keys: a task is one panel against one chunk; their states meet in a second
// pass.
void run_by_chunks(const AttentionProblem& p, const AttentionOutput& o, const Products& products,
                   const Panels& panels, double work) {
  const GemmKernels& g = products.sums;
  const KernelTable& table = products.table;
  const int64_t count = panels.count() * p.batch * p.heads_kv,
                chunks = chunk_span(p, std::min<int64_t>(panels.rows, panels.lanes));
  const int64_t state_words = State::words(g, p.head_dim_v);
  const Scratch states(product_of({count, chunks, state_words, 4}));
  const auto panel_of = [&](int64_t i) {
    return panels.at(i / panels.count(), p.heads_kv, i % panels.count());
  };
  const auto state_of = [&](int64_t i, int64_t c) {
    return State(states.as<float>() + (i * chunks + c) * state_words, g.NR);
  };
  parallel_for(count * chunks, work, [&](int64_t task) {
    const int64_t i = task / chunks;
    const Panel panel = panel_of(i);
    const PanelRules rules(p, panel, length_of(p, panel.batch));
    const int64_t number = rules.any.first_chunk(kChunk) + task % chunks, key = number * kChunk;
    if (number >= rules.any.last_chunk(kChunk)) return;
    const Units units(products);
    const Scratch memory(Lanes::row_bytes(p.head_dim, products));
    const Lanes q = Lanes::of_rows(p.q, panel, p.head_dim, products, memory.as<char>());
    PackedChunk chunk(p, products);
    chunk.start(i / panels.count(), key, rules.any.end);
    Worker worker(p, products);
    worker.run_chunk(panel, rules, q, chunk, state_of(i, task % chunks), false);
    worker.finish();
  });
  parallel_for(count, 0.1 * double(count * chunks * state_words), [&](int64_t i) {
    const Panel panel = panel_of(i);
    const Keys seen = seen_by_any(p, panel, length_of(p, panel.batch));
    const int64_t own = seen.last_chunk(kChunk) - seen.first_chunk(kChunk);
    const State state = state_of(i, 0);
    for (int64_t c = 1; c < own; ++c) {
      const State next = state_of(i, c);
      table.attention.combine(p.head_dim_v, next.max, next.sum, next.out, state.max, state.sum,
                              state.out);
    }
    finish(o, panel, p.head_dim_v, state, table);
  });
}

// Panels of a task: as many as share the packed keys well, in equal parts, and enough tasks for
// every thread.
int64_t panels_per_task(const AttentionProblem& p, const Products& products, const Panels& panels) {
  const int64_t rows = products.on_matrix_units() ? kRowsPerTaskOnUnits : kRowsPerTask;
  const double flops =
      2.0 * mean_visible_keys(p) * double(p.head_dim + p.head_dim_v) * panels.lanes;
  int64_t most = std::min(rows / panels.lanes, int64_t(kTaskFlops / std::max(flops, 1.0)));
  const int64_t units = p.batch * p.heads_kv, wanted = 2 * num_threads();
  if (units % num_threads() != 0 && units < 2 * wanted) {
    most = std::min(most, panels.count() * units / wanted);
  }
  most = std::clamp<int64_t>(most, 1, panels.count());
  return divide_up(panels.count(), divide_up(panels.count(), most));
}

}  // namespace
}  // namespace attention

void attention_forward(const AttentionProblem& p, const AttentionOutput& o,
                       const KernelTable& table) {
  using namespace attention;
  if (p.batch * p.heads * p.seqlen_q == 0) return;
  if (Trace::described()) {
    Trace::detail("keys", "in chunks of " + std::to_string(kChunk) + ", blocks of " +
                              std::to_string(table.attention.block));
  }
  const Products products(p, {}, table);
  if (!products.on_matrix_units() && forward_few_rows(p, o, table)) return;
  Trace::kernel("attention_panels");
  if (Trace::described()) {
    Trace::detail("products", "in " + std::string(products.scores.units) +
                                  (products.on_matrix_units() ? ", by bfloat16 terms" : ""));
  }
  const Panels panels(p, table.gemm_f32.NR);
  const int64_t units = p.batch * p.heads_kv;
  const double flops = 2.0 * double(p.head_dim + p.head_dim_v) * mean_visible_keys(p) *
                       double(units) * double(panels.count()) * panels.lanes;
  if (units * panels.count() < 2 * num_threads() &&
      chunk_span(p, std::min<int64_t>(panels.rows, panels.lanes)) > 1) {
    return run_by_chunks(p, o, products, panels, flops / kFlopsPerNs);
  }
  const int64_t step = panels_per_task(p, products, panels),
                tasks = divide_up(panels.count(), step);
  // The last panels of a causal unit see the most keys: first in, so that no thread ends on a long
  // task.
  parallel_for(units * tasks, flops / kFlopsPerNs, [&](int64_t task) {
    const int64_t first = (tasks - 1 - task / units) * step;
    run_panels(p, o, products, panels, task % units, first, std::min(panels.count(), first + step));
  });
}

}  // namespace tilewright
