// Attention, backward, by recomputation of P from lse (nothing of size Tq x Tk is ever kept):
//
//   P = exp(t - lse)                        dV = P^T dO      dP = dO V^T
//   dS = P * (dP - delta)                   dQ = scale * dS K     dK = scale * dS^T Q
//   delta = rowsum(dO * O) - dlse           t = scale * Q K^T + bias, as in the forward pass
//
// With dropout dV has the weights that were kept, dP likewise; delta is right as it is. With a
// softcap dS is also multiplied by its derivative, 1 - tanh^2.
//
//   for each wave of units, for each round of 512 query rows   one after the other
//     for each (unit, chunk of 256 keys)                       in parallel: a task owns the chunk's
//                                                              dK and dV
//       for each group of 4 panels of rows, for each block of 128 keys
//         for each panel     S^T, dP^T (keys, NR) -> P^T, dS^T;  dQ^T (D, NR) += K^T dS^T
//         for each NR keys   dV^T (Dv, NR) += dO^T P,  dK^T (D, NR) += Q^T dS
//                            P and dS turned into panels of keys
//     for each panel         in parallel: dQ = sum over chunks
//
// Every sum has one order: rows of a round in a task, rounds one after the other, chunks ascending.
// So the gradients are the same for any number of threads, and one head alone still has a task for
// every 256 keys. A chunk that a panel's rows don't see by position takes no part in it.
//
// Parameter    bounded by
// kKeys        packed K, V, K^T and dK, dV beside the row panels in L2; enough tasks if few heads
// kRoundRows   a task's time (2 ms for heads of 64), and partial dQ: kRoundRows x D words for each
//              chunk, linear in Tk
// kGroup       panels whose rows are one multiply-add chain of dK and dV: amortises adding a tile;
//              P in L2
//
// Products are those of attention_products.h.
//
// Numerics: float32; scale is applied to the sums. A weight of zero hides what it weighs, NaN and
// Inf included. Not handled: a gradient for the mask.
//
// Method: Dao (2023), FlashAttention-2, section 3.1.2.
#include <algorithm>
#include <limits>

#include "core/dtype.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "cpu/attention_products.h"

namespace tilewright {
namespace attention {
namespace {

constexpr int64_t kKeys = 256;
constexpr int64_t kRoundRows = 512;
constexpr int kGroup = 4;
constexpr int64_t kWaveBytes = 64 << 20;
constexpr float kInf = std::numeric_limits<float>::infinity();

struct Gradients {
  const AttentionProblem& p;
  const AttentionGradients& g;
  View delta;  // (B, H, Tq)
  Products products;
  Panels panels;
  const KernelTable& table() const { return products.table; }
};

// lane -> x(b, h, t) of a panel's rows; `beyond` in lanes without a row.
void load_lanes(const View& x, const Panel& panel, float beyond, float* lanes) {
  std::fill(lanes, lanes + kMaxLanes, beyond);
  for (int i = 0; i < panel.lanes(); ++i) {
    lanes[i] =
        x.ptr<float>()[panel.batch * x.stride[0] + (panel.head + i / panel.rows) * x.stride[1] +
                       (panel.row + i % panel.rows) * x.stride[2]];
  }
}

// Stores a panel's gradient (dims, NR) to the rows of x.
void store_panel(const float* sum, const Panel& panel, float factor, const View& x,
                 const KernelTable& table) {
  float factors[kMaxLanes];
  std::fill(factors, factors + kMaxLanes, factor);
  for (int h = 0; h < panel.heads; ++h) {
    Matrix out = head_matrix(x, panel.batch, panel.head + h);
    out.data = static_cast<const char*>(out.data) + panel.row * out.row * dtype_size(out.dtype);
    table.attention.store_rows(sum, x.shape[3], h * panel.rows, panel.rows, factors, out);
  }
}

// Up to kGroup panels of query rows in every layout that the products want.
class RowGroup {
 public:
  explicit RowGroup(const Gradients& c)
      : c_(c),
        g_(c.products.exact),
        D_(c.p.head_dim),
        Dv_(c.p.head_dim_v),
        bytes_q_(Lanes::row_bytes(D_, c.products)),
        bytes_dout_(Lanes::row_bytes(Dv_, c.products)),
        lanes_(kGroup * (bytes_q_ + bytes_dout_)),
        columns_(SumRows::bytes(D_, kGroup * g_.NR, c.products) +
                 SumRows::bytes(Dv_, kGroup * g_.NR, c.products)) {}

  // Panels [first, last) and the keys that their rows see.
  void name(int64_t unit, int64_t first, int64_t last, int64_t length) {
    count = int(last - first), seen = {length, 0};
    for (int i = 0; i < count; ++i) {
      panel[i] = c_.panels.at(unit, c_.p.heads_kv, first + i);
      rules[i] = PanelRules(c_.p, panel[i], length);
      seen.begin = std::min(seen.begin, rules[i].any.begin);
      seen.end = std::max(seen.end, rules[i].any.end);
    }
  }

  // Their data.
  void load() {
    const int64_t rows = kGroup * g_.NR;
    char* const memory = columns_.as<char>();
    q_columns.start(D_, rows, c_.products, memory);
    dout_columns.start(Dv_, rows, c_.products, memory + SumRows::bytes(D_, rows, c_.products));
    for (int i = 0; i < count; ++i) {
      char* const to = lanes_.as<char>() + i * (bytes_q_ + bytes_dout_);
      q[i] = Lanes::of_rows(c_.p.q, panel[i], D_, c_.products, to);
      dout[i] = Lanes::of_rows(c_.g.dout, panel[i], Dv_, c_.products, to + bytes_q_);
      load_lanes(c_.g.lse, panel[i], -kInf, lse[i]);
      load_lanes(c_.delta, panel[i], 0, delta[i]);
    }
    q_columns.pack_panels(c_.p.q, panel, q, count);
    dout_columns.pack_panels(c_.g.dout, panel, dout, count);
  }

  int count = 0;
  Keys seen{};
  Panel panel[kGroup];
  PanelRules rules[kGroup];
  float lse[kGroup][kMaxLanes], delta[kGroup][kMaxLanes];
  Lanes q[kGroup], dout[kGroup];    // (D, NR), (Dv, NR)
  SumRows q_columns, dout_columns;  // Q^T, dO^T: (D, kGroup * NR), (Dv, kGroup * NR)

 private:
  const Gradients& c_;
  const GemmKernels& g_;
  int64_t D_, Dv_, bytes_q_, bytes_dout_;
  Scratch lanes_, columns_;
};

// One task: a chunk of keys of one unit against the rows of a round.
class ChunkTask {
 public:
  ChunkTask(const Gradients& c, int64_t unit, int64_t key)
      : c_(c),
        units_(c.products),
        g_(c.products.exact),
        a_(c.table().attention),
        D_(c.p.head_dim),
        Dv_(c.p.head_dim_v),
        unit_(unit),
        first_(key),
        length_(length_of(c.p, unit / c.p.heads_kv)),
        end_(std::min(length_, key + kKeys)),
        bytes_k_(ScoreRows::bytes(a_.block, D_, c.products)),
        bytes_v_(ScoreRows::bytes(a_.block, Dv_, c.products)),
        bytes_c_(SumRows::bytes(D_, a_.block, c.products)),
        keys_(divide_up(kKeys, a_.block) * (bytes_k_ + bytes_v_ + bytes_c_)),
        scores_((c.p.softcap == 0 ? 2 : 3) * (a_.block + c.products.scores.MR) * g_.NR * 4),
        turned_p_(kGroup, a_.block, c.products),
        turned_ds_(kGroup, a_.block, c.products),
        weights_(Lanes::bytes(a_.block, c.products.sums)),
        product_((std::max(D_, Dv_) + c.products.sums.MR) * g_.NR * 4),
        bias_(c.p.mask ? (2 * a_.block + 2) * g_.NR * 4 : 0),
        rows_(c) {}

  static int64_t sum_words(const Gradients& c) {  // dK (kKeys / NR, D, NR), then dV
    return kKeys * (c.p.head_dim + c.p.head_dim_v);
  }

  // dK, dV += what the rows of panels [first, last) say; their dQ goes to dq(panel), for panels
  // that have the chunk among theirs.
  template <class DQ>
  void run(int64_t first, int64_t last, float* sums, const DQ& dq) {
    const int64_t chunk = first_ / kKeys;
    for (int64_t group = first; group < last; group += kGroup) {
      rows_.name(unit_, group, std::min(last, group + kGroup), length_);
      for (int i = 0; i < rows_.count; ++i) {
        const Keys& seen = rows_.rules[i].any;
        if (seen.first_chunk(kKeys) <= chunk && chunk < seen.last_chunk(kKeys)) {
          std::fill_n(dq(group + i), D_ * g_.NR, 0.0f);
        }
      }
      if (!rows_.seen.meets(first_, end_)) continue;
      rows_.load();
      const int64_t end = std::min(end_, rows_.seen.end);
      int64_t block = std::max<int64_t>(0, rows_.seen.begin - first_) / a_.block;
      for (int64_t key = first_ + block * a_.block; key < end; ++block, key += a_.block) {
        if (!ready_[block]) pack(block);
        run_block(block, key, std::min<int64_t>(a_.block, end - key), sums,
                  [&](int i) { return dq(group + i); });
      }
    }
  }

  void store(const float* sums) const {
    const int64_t batch = unit_ / c_.p.heads_kv, head = unit_ % c_.p.heads_kv;
    const int64_t keys = std::min(kKeys, c_.p.seqlen_k - first_);
    for (int64_t k = 0; k < keys; k += g_.NR) {
      const Panel panel{batch, head, first_ + k, 1, int(std::min<int64_t>(g_.NR, keys - k))};
      if (c_.g.dk) store_panel(sums + k * D_, panel, c_.p.scale, c_.g.dk, c_.table());
      if (c_.g.dv) store_panel(sums + kKeys * D_ + k * Dv_, panel, 1.0f, c_.g.dv, c_.table());
    }
  }

 private:
  void pack(int64_t block) {
    const Matrix k = head_matrix(c_.p.k, unit_ / c_.p.heads_kv, unit_ % c_.p.heads_kv);
    const Matrix v = head_matrix(c_.p.v, unit_ / c_.p.heads_kv, unit_ % c_.p.heads_kv);
    const int64_t key = first_ + block * a_.block, keys = std::min<int64_t>(a_.block, end_ - key);
    char* const memory = keys_.as<char>() + block * (bytes_k_ + bytes_v_ + bytes_c_);
    const Matrix rows = from_row(k, key);
    k_rows_[block].pack(rows, keys, D_, c_.products, memory);
    v_rows_[block].pack(from_row(v, key), keys, Dv_, c_.products, memory + bytes_k_);
    k_columns_[block].start(D_, keys, c_.products, memory + bytes_k_ + bytes_v_);
    k_columns_[block].pack({rows.data, rows.dtype, rows.col, rows.row}, 0, keys);
    ready_[block] = true;
  }

  template <class DQ>
  void run_block(int64_t block, int64_t key, int64_t keys, float* sums, const DQ& dq) {
    int first = kGroup, last = 0;
    for (int i = 0; i < rows_.count; ++i) {
      const bool seen = run_panel(i, block, key, keys, dq(i));
      if (seen) first = std::min(first, i), last = i + 1;
      for (int64_t k = 0; k < keys; k += g_.NR) {
        const int n = int(std::min<int64_t>(g_.NR, keys - k));
        turned_p_.put(k, i, seen ? score(0) + k * g_.NR : nullptr, n);
        turned_ds_.put(k, i, seen ? score(1) + k * g_.NR : nullptr, n);
      }
    }
    if (last == 0) return;
    const int64_t from = first * g_.NR, rows = (last - first) * g_.NR;
    for (int64_t k = 0; k < keys; k += g_.NR) {
      const int64_t at = key - first_ + k;
      add(rows_.dout_columns, Dv_, from, rows, turned_p_.get(k, first, last),
          sums + kKeys * D_ + at * Dv_);
      add(rows_.q_columns, D_, from, rows, turned_ds_.get(k, first, last), sums + at * D_);
    }
  }

  // P^T and dS^T of one panel into score(0) and score(1), and its share of dQ. False where no row
  // sees a key.
  bool run_panel(int i, int64_t block, int64_t key, int64_t keys, float* dq) {
    const PanelRules& rules = rows_.rules[i];
    if (!rules.any.meets(key, key + keys)) return false;
    float* bias = nullptr;
    if (c_.p.mask) {
      bias = bias_.as<float>() + (a_.block + 1) * g_.NR;
      if (!load_bias(c_.p, rows_.panel[i], key, keys, c_.table(), bias_.as<float>(), bias))
        return false;
    }
    k_rows_[block].multiply(keys, rows_.q[i], c_.products, score(0));
    v_rows_[block].multiply(keys, rows_.dout[i], c_.products, score(1));
    float* derivative = c_.p.softcap == 0 ? nullptr : score(2);
    const ScoreBlock s{score(0), bias, derivative, keys, rules.of_block(c_.p, key, keys)};
    add(k_columns_[block], D_, 0, keys, weigh(i, s, key), dq);
    return true;
  }
  // Scores and dP become P and dS; the latter as the right operand of dQ.
  Lanes weigh(int i, const ScoreBlock& s, int64_t key) const {
    const float *const lse = rows_.lse[i], *const delta = rows_.delta[i];
    const auto to_terms = a_.gradient_to_terms[c_.products.terms()];
    if (to_terms && !s.derivative && !c_.p.drops()) {
      to_terms(s, lse, delta, score(1), weights_.as<void>());
      return Lanes::prepared_from(score(1), s.keys, c_.products.sums, kSmallestWeight,
                                  weights_.as<void>());
    }
    a_.weights(s, lse);
    if (c_.p.drops()) drop(c_.p, rows_.panel[i], key, s.keys, a_, score(1));
    a_.score_gradient(s.keys, s.scores, delta, s.derivative, score(1));
    if (c_.p.drops()) drop(c_.p, rows_.panel[i], key, s.keys, a_, s.scores);
    return Lanes::prepare(score(1), s.keys, c_.products.sums, kSmallestWeight, weights_.as<void>());
  }
  float* score(int which) const {
    return scores_.as<float>() + which * (a_.block + c_.products.scores.MR) * g_.NR;
  }
  // sum (dims, NR) += columns [from, from + n) of x, times P or dS (n, NR).
  void add(const SumRows& x, int64_t dims, int64_t from, int64_t n, const Lanes& weights,
           float* sum) const {
    x.multiply(from, n, weights, product_.as<float>());
    a_.rescale_add(dims, kOnes, product_.as<float>(), sum);
  }

  static constexpr int kMostBlocks = 16;

  const Gradients& c_;
  const Units units_;
  const GemmKernels& g_;
  const AttentionKernels& a_;
  int64_t D_, Dv_, unit_, first_, length_, end_, bytes_k_, bytes_v_, bytes_c_;
  Scratch keys_, scores_;
  TurnedWeights turned_p_, turned_ds_;
  Scratch weights_, product_, bias_;
  ScoreRows k_rows_[kMostBlocks], v_rows_[kMostBlocks];
  SumRows k_columns_[kMostBlocks];
  bool ready_[kMostBlocks] = {};
  RowGroup rows_;
};

// delta = rowsum(dO * O) - dlse.
void compute_delta(const Gradients& c, int64_t units) {
  const GemmKernels& g = c.products.exact;
  const int64_t count = c.panels.count(), words = (c.p.head_dim_v + 1) * g.NR;
  parallel_for(units * count, 0.1 * double(units * count * words), [&](int64_t task) {
    const Panel panel = c.panels.at(task / count, c.p.heads_kv, task % count);
    const Scratch packed(2 * words * 4);
    float *dout = packed.as<float>(), *out = dout + words, sum[kMaxLanes], dlse[kMaxLanes] = {};
    pack_panel(c.g.dout, panel, 0, c.p.head_dim_v, g, dout);
    pack_panel(c.g.out, panel, 0, c.p.head_dim_v, g, out);
    c.table().attention.dot_lanes(c.p.head_dim_v, dout, out, sum);
    if (c.g.dlse) load_lanes(c.g.dlse, panel, 0, dlse);
    for (int i = 0; i < panel.lanes(); ++i) {
      const int64_t h = panel.head + i / panel.rows, t = panel.row + i % panel.rows;
      c.delta.ptr<float>()[(panel.batch * c.p.heads + h) * c.p.seqlen_q + t] = sum[i] - dlse[i];
    }
  });
}

// The rounds of units [first, last): their panels in order, every chunk of keys in parallel.
void run_wave(const Gradients& c, int64_t first, int64_t last, int64_t chunks) {
  const GemmKernels& g = c.products.exact;
  const int64_t units = last - first, per_round = kRoundRows / g.NR,
                dq_words = (c.p.head_dim + c.products.sums.MR) * g.NR;
  const bool one_round = c.panels.count() <= per_round;
  const int64_t in_round = std::min(per_round, c.panels.count()),
                sum_words = ChunkTask::sum_words(c);
  const Scratch sums(one_round ? 0 : product_of({units, chunks, sum_words, 4}));
  const Scratch partial(product_of({units, chunks, in_round, dq_words, 4}));
  const double flops =
      10.0 * double(units * in_round * g.NR) * double(c.p.head_dim) * mean_visible_keys(c.p);
  for (int64_t panel = 0; panel < c.panels.count(); panel += per_round) {
    const int64_t end = std::min(c.panels.count(), panel + per_round);
    const auto dq_of = [&](int64_t unit, int64_t chunk, int64_t i) {
      return partial.as<float>() + ((unit * in_round + i - panel) * chunks + chunk) * dq_words;
    };
    parallel_for(units * chunks, flops / kFlopsPerNs, [&](int64_t task) {
      const int64_t unit = task % units, chunk = task / units;
      const Scratch own(one_round ? sum_words * 4 : 0);
      float* sum =
          one_round ? own.as<float>() : sums.as<float>() + (unit * chunks + chunk) * sum_words;
      if (panel == 0) std::fill_n(sum, sum_words, 0.0f);
      ChunkTask work(c, first + unit, chunk * kKeys);
      work.run(panel, end, sum, [&](int64_t i) { return dq_of(unit, chunk, i); });
      if (end == c.panels.count()) work.store(sum);
    });
    if (!c.g.dq) continue;
    parallel_for(units * (end - panel), 0.1 * double(units * in_round * chunks * dq_words),
                 [&](int64_t task) {
                   const int64_t unit = task / (end - panel), i = panel + task % (end - panel);
                   const Panel rows = c.panels.at(first + unit, c.p.heads_kv, i);
                   const Keys seen = seen_by_any(c.p, rows, length_of(c.p, rows.batch));
                   int64_t chunk = seen.first_chunk(kKeys);
                   float* dq = dq_of(unit, chunk, i);
                   while (++chunk < seen.last_chunk(kKeys)) {
                     c.table().attention.rescale_add(c.p.head_dim, kOnes, dq_of(unit, chunk, i),
                                                     dq);
                   }
                   store_panel(dq, rows, c.p.scale, c.g.dq, c.table());
                 });
  }
}

void fill_zero(const View& x) {
  if (!x) return;
  for (int64_t i = 0; i < x.size(); ++i) {
    int64_t rest = i, at = 0;
    for (int d = x.rank - 1; d >= 0; rest /= x.shape[d], --d) at += rest % x.shape[d] * x.stride[d];
    store_float(x.data, at, x.dtype, 0.0f);
  }
}

}  // namespace
}  // namespace attention

void attention_backward(const AttentionProblem& p, const AttentionGradients& g,
                        const KernelTable& table) {
  using namespace attention;
  if (p.heads * p.seqlen_q == 0) {
    fill_zero(g.dk);
    fill_zero(g.dv);
    return;
  }
  const Scratch memory(product_of({p.batch, p.heads, p.seqlen_q, 4}));
  View delta = g.lse;
  delta.data = memory.as<float>();
  delta.stride[0] = p.heads * p.seqlen_q, delta.stride[1] = p.seqlen_q, delta.stride[2] = 1;
  const Gradients c{p, g, delta, Products(p, g.dout, table), Panels(p, table.gemm_f32.NR)};
  const int64_t units = p.batch * p.heads_kv,
                chunks = std::max<int64_t>(1, divide_up(p.seqlen_k, kKeys));
  compute_delta(c, units);
  const int64_t unit_bytes = product_of(
      {4, chunks, ChunkTask::sum_words(c) + kRoundRows * (p.head_dim + c.products.sums.MR)});
  const int64_t wave = std::clamp<int64_t>(kWaveBytes / unit_bytes, 1, std::max<int64_t>(units, 1));
  for (int64_t unit = 0; unit < units; unit += wave)
    run_wave(c, unit, std::min(units, unit + wave), chunks);
}

}  // namespace tilewright
