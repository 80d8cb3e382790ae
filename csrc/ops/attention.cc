// attention: the shape rule of the forward and the backward pass, then the driver.
#include <vector>

#include "core/device.h"
#include "core/dtype.h"
#include "core/trace.h"
#include "cpu/isa.h"
#include "cpu/kvcache.h"
#include "cuda/kernels.h"
#include "ops/attention_rules.h"

namespace tilewright {
namespace {

const Check check{"attention", Check::on_gpu_too};

// (B, T, D) as (B, 1, T, D); (B, T) as (B, 1, T).
View with_heads(View v, int rank) {
  if (!v || v.rank == rank) return v;
  for (int d = v.rank; d > 1; --d) v.shape[d] = v.shape[d - 1], v.stride[d] = v.stride[d - 1];
  v.shape[1] = 1, v.stride[1] = 0;
  ++v.rank;
  return v;
}

// mask by strides that are 0 where it is broadcast to `want`.
View broadcast_mask(const View& mask, const int64_t* want, int rank) {
  bool fits = mask.rank <= rank;
  View v = mask;
  v.rank = rank;
  for (int d = 0; d < rank; ++d) {
    const int own = d - (rank - mask.rank);
    const bool stretched = own < 0 || (mask.shape[own] == 1 && want[d] != 1);
    fits = fits && (stretched || mask.shape[own] == want[d]);
    v.shape[d] = want[d];
    v.stride[d] = stretched || !fits ? 0 : mask.stride[own];
  }
  if (!fits) {
    check.shape_error("mask must broadcast to " + format_shape(want, rank) +
                      ", query rows by keys, got " + format_shape(mask));
  }
  return v;
}

void check_operand(const char* name, const View& v, const View& q, int64_t keys) {
  check.dtype(name, v, kFloats);
  if (v.rank != q.rank) {
    check.shape_error(std::string(name) + " must have as many axes as q " + format_shape(q) +
                      ", got " + format_shape(v));
  }
  int64_t want[4];
  std::copy(v.shape, v.shape + v.rank, want);
  want[0] = q.shape[0], want[v.rank - 2] = keys;
  check.shape(name, v, want, v.rank, "(the batch of q, the keys of k)");
}

// kv_lengths as int64 in `kept`: the caller's array is read once, since another thread may write to
// it while the kernel runs. Those of a GPU are the kernel's to read, which clamps them.
View read_lengths(const Attention& op, int64_t batch, int64_t keys, std::vector<int64_t>& kept) {
  if (!op.kv_lengths) return {};
  check.dtype("kv_lengths", op.kv_lengths, {DType::s32, DType::s64});
  check.shape("kv_lengths", op.kv_lengths, {batch}, "one for each sequence of q", &op.q);
  if (on_gpu(op.kv_lengths)) return op.kv_lengths;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t at = b * op.kv_lengths.stride[0];
    const int64_t n = op.kv_lengths.dtype == DType::s32 ? op.kv_lengths.ptr<int32_t>()[at]
                                                        : op.kv_lengths.ptr<int64_t>()[at];
    const int64_t most = op.cache ? op.cache->lengths().ptr<int64_t>()[b] : keys;
    kept.push_back(n);
    if (n >= 0 && n <= most) continue;
    check.shape_error("kv_lengths must lie between 0 and the " + std::to_string(most) +
                      " keys of k, got " + std::to_string(n) + " at " + std::to_string(b));
  }
  View lengths = op.kv_lengths;
  lengths.data = kept.data(), lengths.dtype = DType::s64, lengths.stride[0] = 1;
  return lengths;
}

// k and v from a cache: sizes of the problem.
void load_cache(const Attention& op, AttentionProblem& p, PagedKeys& paged) {
  paged = op.cache->paged();
  p.paged = &paged;
  if (op.cache->longest() > 0 && op.cache->device() != op.q.device) {
    throw DeviceError(std::string("attention: q must be where the keys of the KVCache are, on ") +
                      (on_gpu(op.q) ? "the CPU" : "the GPU"));
  }
  const int64_t batch = op.cache->lengths().shape[0];
  if (op.v) check.shape_error("v must be None where k is a layer of a KVCache");
  if (op.q.rank != 4 || op.q.shape[0] != batch || op.q.last() != paged.dims) {
    check.shape_error("q must have shape (" + std::to_string(batch) + ", H, Tq, " +
                      std::to_string(paged.dims) + ") to match the KVCache, got " +
                      format_shape(op.q));
  }
  p.q = op.q;
  p.heads_kv = paged.heads, p.head_dim_v = paged.dims;
  p.seqlen_k = op.cache->longest();
}

// k and v as arrays: the same.
void load_arrays(const Attention& op, AttentionProblem& p) {
  const int rank = op.q.rank;
  check.present("k", op.k);
  check_operand("k", op.k, op.q, op.k.rank >= 2 ? op.k.shape[op.k.rank - 2] : 0);
  const int64_t keys = op.k.shape[rank - 2];
  check_operand("v", op.v, op.q, keys);
  if (op.k.last() != op.q.last()) {
    check.shape_error("k must have head dimension " + std::to_string(op.q.last()) + " to match q " +
                      format_shape(op.q) + ", got " + format_shape(op.k));
  }
  p.q = with_heads(op.q, 4), p.k = with_heads(op.k, 4), p.v = with_heads(op.v, 4);
  p.heads_kv = p.k.shape[1], p.head_dim_v = p.v.shape[3];
  p.seqlen_k = keys;
  if (p.v.shape[1] != p.heads_kv) {
    check.shape_error("v must have the heads of k " + format_shape(op.k) + ", got " +
                      format_shape(op.v));
  }
}

// What a problem points to.
struct Kept {
  PagedKeys paged;  // describes a cache's pages
  std::vector<int64_t> lengths;
};

// Checks everything but the outputs.
AttentionProblem problem_of(const Attention& op, Kept& kept) {
  check.dtype("q", op.q, kFloats);
  if (op.q.rank != 3 && op.q.rank != 4) {
    check.shape_error("q must be (B, H, Tq, D), or (B, Tq, D) for one head, got shape " +
                      format_shape(op.q));
  }
  AttentionProblem p{};
  op.cache ? load_cache(op, p, kept.paged) : load_arrays(op, p);
  const int rank = op.q.rank;
  p.latency = op.latency;
  p.batch = p.q.shape[0], p.heads = p.q.shape[1];
  p.seqlen_q = p.q.shape[2], p.head_dim = p.q.shape[3];
  check_heads(check, p);
  if (op.mask) {
    check.dtype("mask", op.mask, {DType::boolean, DType::f32, DType::bf16, DType::f16});
    const int64_t want[4] = {p.batch, p.heads, p.seqlen_q, p.seqlen_k};
    const int64_t want3[3] = {p.batch, p.seqlen_q, p.seqlen_k};
    p.mask = with_heads(broadcast_mask(op.mask, rank == 4 ? want : want3, rank), 4);
  }
  p.kv_lengths = read_lengths(op, p.batch, p.seqlen_k, kept.lengths);
  if (op.cache && !op.kv_lengths) p.kv_lengths = op.cache->lengths();
  set_scores(check, op.scores, p.batch, rank == 4, p);
  return p;
}

// Result-shaped views: (…, Tq, Dv) and (…, Tq).
void check_result(const char* name, const View& v, const Attention& op) {
  int64_t want[4];
  std::copy(op.q.shape, op.q.shape + op.q.rank, want);
  if (!op.cache) want[op.q.rank - 1] = op.v.last();
  check.shape(name, v, want, op.q.rank, "(rows of q, last axis of v)");
}

void check_lse(const char* name, const View& v, const Attention& op) {
  check.dtype(name, v, {DType::f32});
  check.shape(name, v, op.q.shape, op.q.rank - 1, "one for each row of q", &op.q);
}

// The call with all axes of every view, as the kernels of a GPU take it.
[[maybe_unused]] Attention with_all_axes(const Attention& op, const AttentionProblem& p) {
  Attention f = op;
  f.q = p.q, f.k = p.k, f.v = p.v, f.mask = p.mask;
  f.scores.alibi_slopes = p.alibi_slopes;
  f.out = with_heads(op.out, 4), f.lse = with_heads(op.lse, 3);
  return f;
}

}  // namespace

void run(const Attention& op) {
  Kept kept;
  const AttentionProblem p = problem_of(op, kept);
  check.output("out", op.out, kFloats);
  check_result("out", op.out, op);
  if (op.lse) {
    check_lse("lse", op.lse, op);
    check.output("lse", op.lse, {DType::f32});
  }
  for (const View* out : {&op.out, &op.lse}) {
    const char* name = out == &op.out ? "out" : "lse";
    check.no_overlap(name, *out, "q", op.q);
    check.no_overlap(name, *out, "k", op.k);
    check.no_overlap(name, *out, "v", op.v);
    check.no_overlap(name, *out, "mask", op.mask);
    check.no_overlap(name, *out, "alibi_slopes", op.scores.alibi_slopes);
    check.no_overlap(name, *out, "kv_lengths", op.kv_lengths);
  }
  const KernelTable& table = kernels();
  const Trace trace("attention", level_of(op.q, table.isa), [&] { return shape_text(p); });
  if constexpr (kHasGpu) {
    if (on_gpu(op.q)) return cuda::attention_forward(with_all_axes(op, p));
  }
  attention_forward(p, {with_heads(op.out, 4), with_heads(op.lse, 3)}, table);
}

void run(const AttentionBackward& op) {
  const Attention& f = op.forward;
  if (f.cache) check.unsupported("gradients through a KVCache are not computed");
  Kept kept;
  const AttentionProblem p = problem_of(f, kept);
  check.dtype("out", f.out, kFloats);
  check_result("out", f.out, f);
  check.dtype("dout", op.dout, kFloats);
  check_result("dout", op.dout, f);
  check_lse("lse", f.lse, f);
  if (op.dlse) check_lse("dlse", op.dlse, f);
  const struct {
    const char *name, *like_name;
    const View &gradient, &like;
  } gradients[] = {{"dq", "q", op.dq, f.q}, {"dk", "k", op.dk, f.k}, {"dv", "v", op.dv, f.v}};
  for (const auto& x : gradients) {
    if (!x.gradient) continue;
    check.output(x.name, x.gradient, kFloats);
    check.same_shape(x.name, x.gradient, x.like, x.like_name);
    for (const View* input :
         {&f.q, &f.k, &f.v, &f.mask, &f.scores.alibi_slopes, &f.out, &f.lse, &op.dout, &op.dlse}) {
      check.no_overlap(x.name, x.gradient, "an input", *input);
    }
  }
  const KernelTable& table = kernels();
  const Trace trace("attention_backward", level_of(f.q, table.isa), [&] { return shape_text(p); });
  if constexpr (kHasGpu) {
    if (on_gpu(f.q)) {
      return cuda::attention_backward({with_all_axes(f, p), with_heads(op.dout, 4),
                                       with_heads(op.dlse, 3), with_heads(op.dq, 4),
                                       with_heads(op.dk, 4), with_heads(op.dv, 4)});
    }
  }
  attention_backward(
      p,
      {with_heads(op.dout, 4), with_heads(f.out, 4), with_heads(f.lse, 3), with_heads(op.dlse, 3),
       with_heads(op.dq, 4), with_heads(op.dk, 4), with_heads(op.dv, 4)},
      table);
}

}  // namespace tilewright
