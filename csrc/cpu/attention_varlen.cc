// Attention of sequences of any lengths, one after the other in q, k and v:
//
//   for each large sequence      one after the other; its own tasks in parallel
//   for each small sequence      in parallel; a region inside a task stays on its thread
//
// A sequence is a problem of its own, views into the whole: its rows have the bits that they have
// by themselves, and no row of padding exists anywhere.
//
// Parameter  bounded by
// kSmallNs   above: a task's time, also for Ctrl-C; below: what a region of threads costs
//
// Not handled: masks, kv_lengths (a sequence ends where the next one begins).
#include "cpu/attention_varlen.h"

#include "core/dtype.h"
#include "core/parallel.h"

namespace tilewright {
namespace {

constexpr double kSmallNs = 1.3e6;
constexpr double kSequenceNs = 200;  // of one without any row, too

// Rows [begin, end) of x (1, H, T, …).
View rows_of(View x, int64_t begin, int64_t end) {
  if (!x) return x;
  x.data = static_cast<char*>(x.data) + begin * x.stride[2] * dtype_size(x.dtype);
  x.shape[2] = end - begin;
  return x;
}

// body(i) for each sequence, which takes about `flops` for each row, key and dimension.
template <class Body>
void for_sequences(const AttentionSequences& s, double flops, const Body& body) {
  const double each = flops * double(s.all.heads) * double(s.all.head_dim + s.all.head_dim_v) /
                      attention::kFlopsPerNs;
  std::vector<int64_t> small;
  double work = 0;
  for (int64_t i = 0; i < s.count(); ++i) {
    const AttentionProblem p = s.at(i);
    const double own = each * double(p.seqlen_q) * attention::mean_visible_keys(p);
    if (own > kSmallNs) {
      body(i);
    } else {
      small.push_back(i), work += own + kSequenceNs;
    }
  }
  parallel_for(int64_t(small.size()), work, [&](int64_t i) { body(small[size_t(i)]); });
}

}  // namespace

AttentionProblem AttentionSequences::at(int64_t i) const {
  const auto n = size_t(i);
  AttentionProblem p = all;
  p.seqlen_q = q[n + 1] - q[n], p.seqlen_k = k[n + 1] - k[n];
  p.q = rows_of(all.q, q[n], q[n + 1]);
  p.k = rows_of(all.k, k[n], k[n + 1]);
  p.v = rows_of(all.v, k[n], k[n + 1]);
  p.first_element = element[n];
  if (p.alibi_slopes) {
    p.alibi_slopes.data = p.alibi_slopes.ptr<float>() + i * p.alibi_slopes.stride[0];
  }
  return p;
}

void attention_forward(const AttentionSequences& s, const AttentionOutput& o,
                       const KernelTable& table) {
  for_sequences(s, 2, [&](int64_t i) {
    const int64_t begin = s.q[size_t(i)], end = s.q[size_t(i) + 1];
    attention_forward(s.at(i), {rows_of(o.out, begin, end), rows_of(o.lse, begin, end)}, table);
  });
}

void attention_backward(const AttentionSequences& s, const AttentionGradients& g,
                        const KernelTable& table) {
  for_sequences(s, 5, [&](int64_t i) {
    const auto n = size_t(i);
    const auto queries = [&](const View& x) { return rows_of(x, s.q[n], s.q[n + 1]); };
    const auto keys = [&](const View& x) { return rows_of(x, s.k[n], s.k[n + 1]); };
    attention_backward(s.at(i),
                       {queries(g.dout), queries(g.out), queries(g.lse), queries(g.dlse),
                        queries(g.dq), keys(g.dk), keys(g.dv)},
                       table);
  });
}

}  // namespace tilewright
