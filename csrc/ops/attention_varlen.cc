// attention_varlen: the shape rule of the forward and the backward pass, then the driver.
#include "cpu/attention_varlen.h"

#include "core/device.h"
#include "core/dtype.h"
#include "core/trace.h"
#include "cpu/isa.h"
#include "cuda/kernels.h"
#include "ops/attention_rules.h"

namespace tilewright {
namespace {

const Check check{"attention_varlen", Check::on_gpu_too};

// (total, H, D) as (1, H, total, D); (H, total) as (1, H, total).
View as_batch(const View& v, bool heads_last) {
  if (!v) return v;
  View b = v;
  b.rank = v.rank + 1;
  for (int d = v.rank; d > 0; --d) b.shape[d] = v.shape[d - 1], b.stride[d] = v.stride[d - 1];
  b.shape[0] = 1, b.stride[0] = 0;
  if (heads_last) std::swap(b.shape[1], b.shape[2]), std::swap(b.stride[1], b.stride[2]);
  return b;
}

// Where the sequences begin and the last ends: 0, ascending, to `total`; none longer than `most`.
// Those of a GPU are the kernel's to read, which clamps them: none.
std::vector<int64_t> read_offsets(const char* name, const View& v, int64_t total, const char* of,
                                  int64_t most) {
  const std::string arg = name;
  check.dtype(name, v, {DType::s32, DType::s64});
  if (v.rank != 1 || v.shape[0] < 1) {
    check.shape_error(arg + " must have shape (sequences + 1,), got " + format_shape(v));
  }
  if (on_gpu(v)) return {};
  std::vector<int64_t> offsets(size_t(v.shape[0]));
  for (size_t i = 0; i < offsets.size(); ++i) {
    const int64_t at = int64_t(i) * v.stride[0];
    offsets[i] = v.dtype == DType::s32 ? v.ptr<int32_t>()[at] : v.ptr<int64_t>()[at];
    const int64_t before = i == 0 ? 0 : offsets[i - 1];
    if (i == 0 ? offsets[i] != 0 : offsets[i] < before) {
      check.shape_error(arg + " must begin with 0 and not descend, got " +
                        std::to_string(offsets[i]) + " at " + std::to_string(i));
    }
    if (most >= 0 && offsets[i] - before > most) {
      check.shape_error("max_seqlen_" + std::string(of) + " must not be less than the longest of " +
                        arg + ", got " + std::to_string(most) + " and a sequence of " +
                        std::to_string(offsets[i] - before));
    }
  }
  if (offsets.back() != total) {
    check.shape_error(arg + " must end with the " + std::to_string(total) + " rows of " + of +
                      ", got " + std::to_string(offsets.back()));
  }
  return offsets;
}

void check_operand(const char* name, const View& v) {
  check.dtype(name, v, kFloats);
  if (v.rank == 3) return;
  check.shape_error(std::string(name) + " must have shape (rows, heads, head dimension), got " +
                    format_shape(v));
}

// Checks everything but the outputs.
AttentionSequences sequences_of(const AttentionVarlen& op) {
  check_operand("q", op.q);
  check_operand("k", op.k);
  check_operand("v", op.v);
  const int64_t want_k[3] = {op.k.shape[0], op.k.shape[1], op.q.shape[2]};
  check.shape("k", op.k, want_k, 3, "to have the head dimension of q", &op.q);
  const int64_t want_v[3] = {op.k.shape[0], op.k.shape[1], op.v.shape[2]};
  check.shape("v", op.v, want_v, 3, "to have the rows and heads of k", &op.k);
  AttentionSequences s;
  AttentionProblem& p = s.all;
  p.q = as_batch(op.q, true), p.k = as_batch(op.k, true), p.v = as_batch(op.v, true);
  p.batch = 1, p.heads = p.q.shape[1], p.heads_kv = p.k.shape[1];
  p.seqlen_q = p.q.shape[2], p.seqlen_k = p.k.shape[2];
  p.head_dim = p.q.shape[3], p.head_dim_v = p.v.shape[3];
  check_heads(check, p);
  check.present("cu_seqlens_q", op.cu_seqlens_q);
  check.present("cu_seqlens_k", op.cu_seqlens_k);
  s.q = read_offsets("cu_seqlens_q", op.cu_seqlens_q, p.seqlen_q, "q", op.max_seqlen_q);
  s.k = read_offsets("cu_seqlens_k", op.cu_seqlens_k, p.seqlen_k, "k", op.max_seqlen_k);
  if (op.cu_seqlens_k.shape[0] != op.cu_seqlens_q.shape[0]) {
    check.shape_error("cu_seqlens_k must have the shape of cu_seqlens_q " +
                      format_shape(op.cu_seqlens_q) + ", got " + format_shape(op.cu_seqlens_k));
  }
  set_scores(check, op.scores, op.cu_seqlens_q.shape[0] - 1, true, p);
  uint64_t element = 0;  // they run on: sequences of one length have the numbers of a batch
  for (size_t i = 0; i + 1 < s.q.size(); ++i) {
    s.element.push_back(element);
    element += uint64_t(p.heads * (s.q[i + 1] - s.q[i])) * uint64_t(s.k[i + 1] - s.k[i]);
  }
  return s;
}

void check_result(const char* name, const View& v, const AttentionVarlen& op) {
  const int64_t want[3] = {op.q.shape[0], op.q.shape[1], op.v.shape[2]};
  check.shape(name, v, want, 3, "(rows and heads of q, last axis of v)");
}

void check_lse(const char* name, const View& v, const AttentionVarlen& op) {
  check.dtype(name, v, {DType::f32});
  check.shape(name, v, {op.q.shape[1], op.q.shape[0]}, "heads and rows of q", &op.q);
}

// The call with slopes (sequences, H), as the kernels of a GPU take it.
[[maybe_unused]] AttentionVarlen with_slopes(const AttentionVarlen& op,
                                             const AttentionSequences& s) {
  AttentionVarlen f = op;
  f.scores.alibi_slopes = s.all.alibi_slopes;
  return f;
}

}  // namespace

void run(const AttentionVarlen& op) {
  const AttentionSequences s = sequences_of(op);
  check.output("out", op.out, kFloats);
  check_result("out", op.out, op);
  if (op.lse) {
    check_lse("lse", op.lse, op);
    check.output("lse", op.lse, {DType::f32});
  }
  const struct {
    const char* name;
    const View& view;
  } inputs[] = {{"q", op.q},
                {"k", op.k},
                {"v", op.v},
                {"cu_seqlens_q", op.cu_seqlens_q},
                {"cu_seqlens_k", op.cu_seqlens_k},
                {"alibi_slopes", op.scores.alibi_slopes}};
  for (const auto& input : inputs) {
    check.no_overlap("out", op.out, input.name, input.view);
    check.no_overlap("lse", op.lse, input.name, input.view);
  }
  const KernelTable& table = kernels();
  const Trace trace("attention_varlen", level_of(op.q, table.isa),
                    [&] { return shape_text(s.all); });
  if constexpr (kHasGpu) {
    if (on_gpu(op.q)) return cuda::attention_varlen_forward(with_slopes(op, s));
  }
  attention_forward(s, {as_batch(op.out, true), as_batch(op.lse, false)}, table);
}

void run(const AttentionVarlenBackward& op) {
  const AttentionVarlen& f = op.forward;
  const AttentionSequences s = sequences_of(f);
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
         {&f.q, &f.k, &f.v, &f.scores.alibi_slopes, &f.out, &f.lse, &op.dout, &op.dlse}) {
      check.no_overlap(x.name, x.gradient, "an input", *input);
    }
  }
  const KernelTable& table = kernels();
  const Trace trace("attention_varlen_backward", level_of(f.q, table.isa),
                    [&] { return shape_text(s.all); });
  if constexpr (kHasGpu) {
    if (on_gpu(f.q)) {
      return cuda::attention_varlen_backward(
          {with_slopes(f, s), op.dout, op.dlse, op.dq, op.dk, op.dv});
    }
  }
  attention_backward(s,
                     {as_batch(op.dout, true), as_batch(f.out, true), as_batch(f.lse, false),
                      as_batch(op.dlse, false), as_batch(op.dq, true), as_batch(op.dk, true),
                      as_batch(op.dv, true)},
                     table);
}

}  // namespace tilewright
