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
// Few rows (decode) take attention_decode.cc, if it can. Where a unit has one panel and there are
// fewer units than threads want, chunks are tasks of their own and meet afterwards, in the same
// order: the bits don't change.
//
// Parameter    bounded by
// panels/task  packing K and V again in another task should cost little (kRowsPerTask), but a task
//              stays short (kTaskFlops)
// chunk        512 keys x (D + Dv) packed words in L2: 256 KB for heads of 64
//
// Numerics: float32; see simd/attention.cc for the order of sums. A block that a row does not see
// leaves its state alone, so neither padding nor the rows of the same panel can be felt. Inf and
// NaN in values reach the rows that see them and no other: such blocks go to the guarded tile.
// Windows skip the blocks outside them. Memory: packed chunk and row states, linear in Tq and D,
// independent of Tk. Dropout comes after the sum: it weighs values, lse does not see it.
//
// Method: Dao (2023), FlashAttention-2, on the GEMM of gemm_kernel.cc.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "core/parallel.h"
#include "core/scratch.h"
#include "core/trace.h"
#include "cpu/attention.h"

namespace tilewright {
namespace attention {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kRowsPerTask = 512;
constexpr double kTaskFlops = 4e8;

// What a chunk of keys (or all chunks so far) says about a panel: max (NR,), sum (NR,), out (Dv,
// NR).
struct State {
  float *max, *sum, *out;

  static int64_t words(const GemmKernels& g, int64_t dims) { return (2 + dims + g.MR) * g.NR; }
  State(float* memory, int NR) : max(memory), sum(memory + NR), out(memory + 2 * NR) {}
  void clear(int NR, int64_t dims) {
    std::fill(max, max + NR, -kInf);
    std::fill(sum, sum + NR, 0.0f);
    std::fill(out, out + dims * NR, 0.0f);
  }
};

// K and V of one chunk, each block packed when a panel first needs it.
class PackedChunk {
 public:
  PackedChunk(const AttentionProblem& p, const KernelTable& table)
      : p_(p),
        g_(table.gemm_f32),
        a_(table.attention),
        keys_(p, table, true),
        block_k_(divide_up(a_.block, g_.MR) * g_.MR * p.head_dim),
        block_v_(divide_up(p.head_dim_v, g_.MR) * g_.MR * a_.block +
                 kMaxLanes),  // packing writes one vector more
        blocks_(divide_up(kChunk, a_.block)),
        words_(blocks_ * (block_k_ + block_v_) * 4) {}

  // From here on the chunk that starts at `key` of the unit's keys; `end`: no key from there on is
  // read.
  void start(int64_t unit, int64_t key, int64_t end) {
    unit_ = unit, first_ = key, end_ = std::min(end, key + kChunk);
    std::fill(ready_, ready_ + blocks_, false);
  }
  int64_t first() const { return first_; }
  int64_t end() const { return end_; }

  struct Block {
    const float *k, *v;  // panels (D, MR) of keys, panels (stride, MR) of V's columns
    int64_t v_keys;      // keys in a panel of v
    bool finite;         // V is
  };
  Block block(int64_t index) {
    if (!ready_[index]) pack(index);
    float* k = words_.as<float>() + index * (block_k_ + block_v_);
    return {k, k + block_k_, keys_of(index), finite_[index]};
  }
  int64_t keys_of(int64_t index) const {
    return std::min<int64_t>(a_.block, end_ - first_ - index * a_.block);
  }

 private:
  void pack(int64_t index) {
    float* k = words_.as<float>() + index * (block_k_ + block_v_);
    float* v = k + block_k_;
    const int64_t key = first_ + index * a_.block, keys = keys_of(index);
    const Matrix rows = keys_.keys(unit_, key, keys).rows;
    for (int64_t i = 0; i < keys; i += g_.MR) {
      g_.pack_a(rows, i, int(std::min<int64_t>(g_.MR, keys - i)), 0, p_.head_dim, p_.head_dim,
                k + i * p_.head_dim);
    }
    const Matrix values = keys_.values(unit_, key, keys).rows;
    const Matrix columns{values.data, values.dtype, values.col, values.row};  // V^T
    for (int64_t d = 0; d < p_.head_dim_v; d += g_.MR) {
      const int mr = int(std::min<int64_t>(g_.MR, p_.head_dim_v - d));
      g_.pack_a(columns, d, mr, 0, keys, keys, v + d * keys);
    }
    finite_[index] = a_.all_finite(v, divide_up(p_.head_dim_v, g_.MR) * g_.MR * keys);
    ready_[index] = true;
  }

  const AttentionProblem& p_;
  const GemmKernels& g_;
  const AttentionKernels& a_;
  KeyReader keys_;
  int64_t block_k_, block_v_, blocks_;
  Scratch words_;
  int64_t unit_ = 0, first_ = 0, end_ = 0;
  bool ready_[16], finite_[16];
};

// What one thread needs to take a panel through a chunk.
class Worker {
 public:
  Worker(const AttentionProblem& p, const KernelTable& table)
      : p_(p),
        table_(table),
        g_(table.gemm_f32),
        a_(table.attention),
        scores_((a_.block + g_.MR) * g_.NR * 4),
        tile_(g_.MR * g_.NR * 4),
        bias_(p.mask ? (2 * a_.block + 2) * g_.NR * 4 : 0) {}

  // state = what the chunk's keys say about the panel, whose packed rows are q (D, NR).
  void run_chunk(const Panel& panel, const PanelRules& rules, const float* q, PackedChunk& chunk,
                 State state) {
    state.clear(g_.NR, p_.head_dim_v);
    const int64_t end = std::min(chunk.end(), rules.any.end);
    int64_t index = std::max<int64_t>(0, rules.any.begin - chunk.first()) / a_.block;
    for (int64_t key = chunk.first() + index * a_.block; key < end; ++index, key += a_.block) {
      const int64_t keys = std::min<int64_t>(a_.block, end - key);
      float* bias = nullptr;
      if (p_.mask) {
        bias = bias_.as<float>() + (a_.block + 1) * g_.NR;
        if (!load_bias(p_, panel, key, keys, table_, bias_.as<float>(), bias)) continue;
      }
      run_block(panel, rules, q, chunk.block(index), key, keys, bias, state);
    }
  }

 private:
  void run_block(const Panel& panel, const PanelRules& rules, const float* q,
                 const PackedChunk::Block& block, int64_t key, int64_t keys, const float* bias,
                 State state) {
    float *scores = scores_.as<float>(), *tile = tile_.as<float>();
    for (int64_t i = 0; i < keys; i += g_.MR) {  // a partial tile's surplus lines lie beyond `keys`
      const int mr = int(std::min<int64_t>(g_.MR, keys - i));
      g_.tile(mr, p_.head_dim, block.k + i * p_.head_dim, q, g_.NR, scores + i * g_.NR);
    }
    float alpha[kMaxLanes];
    const ScoreBlock s{scores, bias, nullptr, keys, rules.of_block(p_, key, keys)};
    a_.softmax(s, state.max, state.sum, alpha);
    if (p_.drops()) drop(p_, panel, key, keys, a_, scores);
    for (int64_t d = 0; d < p_.head_dim_v; d += g_.MR) {
      const int mr = int(std::min<int64_t>(g_.MR, p_.head_dim_v - d));
      const float* v = block.v + d * block.v_keys;
      if (block.finite) {
        g_.tile(mr, keys, v, scores, g_.NR, tile);
      } else {
        a_.guarded_tile(mr, keys, v, scores, tile);
      }
      a_.rescale_add(mr, alpha, tile, state.out + d * g_.NR);
    }
  }

  const AttentionProblem& p_;
  const KernelTable& table_;
  const GemmKernels& g_;
  const AttentionKernels& a_;
  Scratch scores_, tile_, bias_;
};

// out = O / sum, lse = max + log(sum); a row that saw nothing gets 0 and -inf.
void finish(const AttentionOutput& o, const Panel& panel, int64_t dims, State state,
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
void run_panels(const AttentionProblem& p, const AttentionOutput& o, const KernelTable& table,
                const Panels& panels, int64_t unit, int64_t first, int64_t last) {
  const GemmKernels& g = table.gemm_f32;
  const int64_t count = last - first, length = length_of(p, unit / p.heads_kv);
  const int64_t state_words = State::words(g, p.head_dim_v), q_words = (p.head_dim + 1) * g.NR;
  const Scratch states((count + 1) * state_words * 4), packed_q(count * q_words * 4);
  const auto state_of = [&](int64_t i) {
    return State(states.as<float>() + i * state_words, g.NR);
  };
  const State chunk_state = state_of(count);
  Keys seen{length, 0};
  for (int64_t i = 0; i < count; ++i) {
    const Panel panel = panels.at(unit, p.heads_kv, first + i);
    pack_panel(p.q, panel, 0, p.head_dim, g, packed_q.as<float>() + i * q_words);
    const Keys own = seen_by_any(p, panel, length);
    seen = {std::min(seen.begin, own.begin), std::max(seen.end, own.end)};
    state_of(i).clear(g.NR, p.head_dim_v);
  }
  PackedChunk chunk(p, table);
  Worker worker(p, table);
  for (int64_t key = seen.begin / kChunk * kChunk; key < seen.end; key += kChunk) {
    chunk.start(unit, key, seen.end);
    for (int64_t i = 0; i < count; ++i) {
      const Panel panel = panels.at(unit, p.heads_kv, first + i);
      const PanelRules rules(p, panel, length);
      if (!rules.any.meets(key, key + kChunk)) continue;
      const State state = state_of(i);
      const float* q = packed_q.as<float>() + i * q_words;
      if (rules.any.begin >= key) {  // its first: joining an empty state would copy the chunk's
        worker.run_chunk(panel, rules, q, chunk, state);
      } else {
        worker.run_chunk(panel, rules, q, chunk, chunk_state);
        table.attention.combine(p.head_dim_v, chunk_state.max, chunk_state.sum, chunk_state.out,
                                state.max, state.sum, state.out);
      }
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    finish(o, panels.at(unit, p.heads_kv, first + i), p.head_dim_v, state_of(i), table);
  }
}

// Few panels and many keys: a task is one panel against one chunk; their states meet in a second
// pass.
void run_by_chunks(const AttentionProblem& p, const AttentionOutput& o, const KernelTable& table,
                   const Panels& panels, double work) {
  const GemmKernels& g = table.gemm_f32;
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
    const Scratch q((p.head_dim + 1) * g.NR * 4);
    pack_panel(p.q, panel, 0, p.head_dim, g, q.as<float>());
    PackedChunk chunk(p, table);
    chunk.start(i / panels.count(), key, rules.any.end);
    Worker(p, table).run_chunk(panel, rules, q.as<float>(), chunk, state_of(i, task % chunks));
  });
  parallel_for(count, double(count * chunks * state_words), [&](int64_t i) {
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
int64_t panels_per_task(const AttentionProblem& p, const Panels& panels) {
  const double flops =
      2.0 * mean_visible_keys(p) * double(p.head_dim + p.head_dim_v) * panels.lanes;
  int64_t most = std::min(kRowsPerTask / panels.lanes, int64_t(kTaskFlops / std::max(flops, 1.0)));
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
  if (forward_few_rows(p, o, table)) return;
  Trace::kernel("attention_panels");
  const Panels panels(p, table.gemm_f32.NR);
  const int64_t units = p.batch * p.heads_kv;
  const double flops = 2.0 * double(p.head_dim + p.head_dim_v) * mean_visible_keys(p) *
                       double(units) * double(panels.count()) * panels.lanes;
  if (units * panels.count() < 2 * num_threads() &&
      chunk_span(p, std::min<int64_t>(panels.rows, panels.lanes)) > 1) {
    return run_by_chunks(p, o, table, panels, flops / kFlopsPerNs);
  }
  const int64_t step = panels_per_task(p, panels), tasks = divide_up(panels.count(), step);
  // The last panels of a causal unit see the most keys: first in, so that no thread ends on a long
  // task.
  parallel_for(units * tasks, flops / kFlopsPerNs, [&](int64_t task) {
    const int64_t first = (tasks - 1 - task / units) * step;
    run_panels(p, o, table, panels, task % units, first, std::min(panels.count(), first + step));
  });
}

}  // namespace tilewright
