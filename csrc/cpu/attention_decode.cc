// Attention of few query rows (decode): the loops of attention_forward.cc without packing.
//
//   for each unit (batch, key/value head)      in parallel
//     for each chunk of 512 keys               in parallel too where units are few
//       for each block of 128 keys             from the first key that a row sees
//         for each 4 rows of the unit          its rows: those of all query heads of the group
//           row states (+)= block              simd/attention_decode.cc
//       row states = row states (+) chunk's
//
// Parameter  bounded by
// rows       NR / 2 of a unit: K is turned and V read again for each 4 rows; packing serves NR rows
//
// Numerics: the chunks and blocks, and the order in which they meet, are those of
// attention_forward.cc; so are the bits. Memory: the rows' states, of every chunk where chunks are
// tasks. Not handled: masks and columns apart; the general driver takes them.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "core/dtype.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/trace.h"
#include "cpu/attention.h"

namespace tilewright::attention {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr double kElementsPerNs = 16;        // of K and V, from a cache that is not the nearest
constexpr int64_t kMaxRows = kMaxLanes / 2;  // of a unit

RowStates rows_from(const RowStates& s, int row) {
  return {s.max + row, s.sum + row, s.out + row * s.stride, s.stride};
}

// The query rows of one key/value head: row i is row i % Tq of the group's head i / Tq.
class Unit {
 public:
  Unit(const AttentionProblem& p, const KernelTable& table, int64_t index)
      : p_(p),
        table_(table),
        keys_(p, table, false),
        unit_(index),
        batch_(index / p.heads_kv),
        head_kv_(index % p.heads_kv),
        group_(p.heads / p.heads_kv),
        rows_(int(rows(p))) {
    const int64_t length = length_of(p, batch_);
    for (int i = 0; i < rows_; ++i) {
      rules_.set(p, i, batch_, head_kv_ * group_ + i / p.seqlen_q, i % p.seqlen_q, length);
    }
    seen_ = {rules_.begin[0], rules_.end[rows_ - 1]};
  }

  static int64_t rows(const AttentionProblem& p) { return p.heads / p.heads_kv * p.seqlen_q; }
  static int64_t stride(const AttentionProblem& p) { return divide_up(p.head_dim_v, 16) * 16; }
  static int64_t state_words(const AttentionProblem& p) {
    return kMaxRows * 2 + rows(p) * stride(p);
  }
  static RowStates states_at(const AttentionProblem& p, float* memory) {
    return {memory, memory + kMaxRows, memory + 2 * kMaxRows, stride(p)};
  }

  int64_t chunks() const { return seen_.last_chunk(kChunk) - seen_.first_chunk(kChunk); }

  // states = what the keys of a chunk, 0 being the first that is seen, say about the rows.
  void run_chunk(int64_t chunk, const RowStates& states) const {
    std::fill(states.max, states.max + rows_, -kInf);
    std::fill(states.sum, states.sum + rows_, 0.0f);
    std::fill(states.out, states.out + rows_ * states.stride, 0.0f);
    const int64_t block = table_.attention.block;
    const int64_t first = (seen_.first_chunk(kChunk) + chunk) * kChunk;
    const int64_t end = std::min(seen_.end, first + kChunk);
    const Scratch q(rows_ * p_.head_dim * 4), scores(table_.decode.rows * block * 4);
    widen_queries(q.as<float>());
    for (int64_t key = std::max(seen_.begin, first), next; key < end; key = next) {
      next = std::min(end, (key / block + 1) * block);
      run_block(key, next - key, q.as<float>(), scores.as<float>(), states);
    }
  }

  void join(const RowStates& chunk, const RowStates& states) const {
    table_.decode.combine(rows_, p_.head_dim_v, chunk, states);
  }

  // out = O / sum, lse = max + log(sum); a row that saw nothing gets 0 and -inf.
  void finish(const AttentionOutput& o, const RowStates& s) const {
    for (int i = 0; i < rows_; ++i) {
      const int64_t head = head_kv_ * group_ + i / p_.seqlen_q, row = i % p_.seqlen_q;
      table_.decode.store(s.out + i * s.stride, p_.head_dim_v, s.sum[i] == 0 ? 0 : 1 / s.sum[i],
                          row, head_matrix(o.out, batch_, head));
      if (!o.lse) continue;
      const int64_t* stride = o.lse.stride;
      o.lse.ptr<float>()[batch_ * stride[0] + head * stride[1] + row * stride[2]] =
          s.sum[i] == 0 ? -kInf : s.max[i] + std::log(s.sum[i]);
    }
  }

 private:
  void widen_queries(float* q) const {
    for (int i = 0; i < rows_; ++i) {
      const Matrix m =
          from_row(head_matrix(p_.q, batch_, head_kv_ * group_ + i / p_.seqlen_q), i % p_.seqlen_q);
      for (int64_t d = 0; d < p_.head_dim; ++d) *q++ = load_float(m.data, d * m.col, m.dtype);
    }
  }

  void run_block(int64_t key, int64_t keys, const float* q, float* scores,
                 const RowStates& states) const {
    const KeyRows k = keys_.keys(unit_, key, keys), v = keys_.values(unit_, key, keys);
    for (int i = 0; i < rows_; i += table_.decode.rows) {
      const int rows = std::min(table_.decode.rows, rows_ - i);
      table_.decode.block({rows, q + i * p_.head_dim, k.rows, v.rows, k.scale, v.scale, keys,
                           p_.head_dim, p_.head_dim_v, rules_.rule(p_, i, key, false), scores},
                          rows_from(states, i));
    }
  }

  const AttentionProblem& p_;
  const KernelTable& table_;
  KeyReader keys_;
  int64_t unit_, batch_, head_kv_, group_;
  int rows_;
  RowRules rules_;
  Keys seen_;
};

void run_unit(const AttentionProblem& p, const AttentionOutput& o, const KernelTable& table,
              int64_t index) {
  const Unit unit(p, table, index);
  const Scratch memory(2 * Unit::state_words(p) * 4);
  const RowStates states = Unit::states_at(p, memory.as<float>());
  const RowStates chunk = Unit::states_at(p, memory.as<float>() + Unit::state_words(p));
  unit.run_chunk(0, states);
  for (int64_t c = 1; c < unit.chunks(); ++c) {
    unit.run_chunk(c, chunk);
    unit.join(chunk, states);
  }
  unit.finish(o, states);
}

// Few units and many keys: chunks are tasks, and meet in the order in which one task would take
// them.
void run_by_chunks(const AttentionProblem& p, const AttentionOutput& o, const KernelTable& table,
                   int64_t units, double work) {
  const int64_t chunks = chunk_span(p, p.seqlen_q);
  const Scratch memory(product_of({units, chunks, Unit::state_words(p), 4}));
  const auto states_of = [&](int64_t unit, int64_t chunk) {
    return Unit::states_at(p, memory.as<float>() + (unit * chunks + chunk) * Unit::state_words(p));
  };
  parallel_for(units * chunks, work, [&](int64_t task) {
    const Unit unit(p, table, task / chunks);
    const int64_t chunk = task % chunks;
    if (chunk < unit.chunks()) unit.run_chunk(chunk, states_of(task / chunks, chunk));
  });
  for (int64_t i = 0; i < units; ++i) {
    const Unit unit(p, table, i);
    for (int64_t c = 1; c < unit.chunks(); ++c) unit.join(states_of(i, c), states_of(i, 0));
    unit.finish(o, states_of(i, 0));
  }
}

bool applies(const AttentionProblem& p, const KernelTable& table) {
  const auto columns_adjacent = [](const View& x) { return x.stride[3] == 1 || x.shape[3] == 1; };
  return !p.mask && !p.drops() && p.head_dim_v > 0 && Unit::rows(p) <= table.gemm_f32.NR / 2 &&
         (p.paged || (columns_adjacent(p.k) && columns_adjacent(p.v)));
}

}  // namespace

bool forward_few_rows(const AttentionProblem& p, const AttentionOutput& o,
                      const KernelTable& table) {
  if (!applies(p, table)) {
    if (Trace::described()) {
      Trace::note("not the kernel for few rows: that one takes at most " +
                  std::to_string(table.gemm_f32.NR / 2) +
                  " query rows for a key head, no mask, and contiguous columns of k and v");
    }
    return false;
  }
  Trace::kernel("attention_few_rows");
  const int64_t units = p.batch * p.heads_kv;
  const double elements = double(units) * mean_visible_keys(p) * double(p.head_dim + p.head_dim_v);
  const double work = elements / kElementsPerNs;
  if (units < 2 * num_threads() && chunk_span(p, p.seqlen_q) > 1) {
    run_by_chunks(p, o, table, units, work);
  } else {
    parallel_for(units, work, [&](int64_t i) { run_unit(p, o, table, i); });
  }
  return true;
}

}  // namespace tilewright::attention
