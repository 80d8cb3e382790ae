// The argument rules that attention and attention_varlen share.
#pragma once
#include <algorithm>
#include <limits>
#include <string>

#include "core/check.h"
#include "cpu/attention.h"
#include "cpu/dropout.h"
#include "tilewright/ops.h"

namespace tilewright {

// p's heads and head dimensions fit each other and the kernels.
inline void check_heads(const Check& check, const AttentionProblem& p) {
  if (p.heads_kv == 0 ? p.heads != 0 : p.heads % p.heads_kv != 0) {
    check.shape_error("k must have a number of heads that divides the " + std::to_string(p.heads) +
                      " of q, got " + std::to_string(p.heads_kv));
  }
  if (p.head_dim < 1 || p.head_dim > attention::kMaxHeadDim) {
    check.unsupported("q must have a head dimension of 1 to 256, got " +
                      std::to_string(p.head_dim));
  }
  if (p.head_dim_v > attention::kMaxHeadDim) {
    check.unsupported("v must have a head dimension of at most 256, got " +
                      std::to_string(p.head_dim_v));
  }
  if (p.seqlen_k > INT32_MAX) {
    check.unsupported("k must have fewer than 2^31 keys, got " + std::to_string(p.seqlen_k));
  }
}

// slopes (H,) or (sequences, H), without H where heads are no axis of the call, as (sequences, H)
// by strides.
inline View slopes_by_head(const Check& check, const View& slopes, int64_t sequences, int64_t heads,
                           bool has_heads) {
  if (!slopes) return slopes;
  check.dtype("alibi_slopes", slopes, {DType::f32});
  const int64_t want[2] = {sequences, heads};
  const int axes = has_heads ? 2 : 1;
  const bool own = slopes.rank == axes;
  if (own) {
    check.shape("alibi_slopes", slopes, want, axes, "one for each sequence and head of q");
  } else {
    check.shape("alibi_slopes", slopes, want + 1, axes - 1, "one for each head of q");
  }
  View v = slopes;
  v.rank = 2, v.shape[0] = sequences, v.shape[1] = heads;
  v.stride[0] = own ? slopes.stride[0] : 0;
  v.stride[1] = has_heads ? slopes.stride[slopes.rank - 1] : 0;
  return v;
}

// The scores' options become p's. Its sizes are set.
inline void set_scores(const Check& check, const AttentionScores& s, int64_t sequences,
                       bool has_heads, AttentionProblem& p) {
  for (const int64_t n : {s.left, s.right}) {
    if (n >= -1) continue;
    check.shape_error(
        "window must be (left, right), keys before and after a row's own or -1 for all, got (" +
        std::to_string(s.left) + ", " + std::to_string(s.right) + ")");
  }
  if (!(s.softcap >= 0 && s.softcap <= std::numeric_limits<float>::max())) {
    check.shape_error("softcap must be a positive number, got " + std::to_string(s.softcap));
  }
  p.left = std::min<int64_t>(s.left, INT32_MAX);
  p.right = s.causal ? 0 : std::min<int64_t>(s.right, INT32_MAX);
  if (!(s.dropout_p >= 0.0 && s.dropout_p <= 1.0)) {
    check.shape_error("dropout_p must be in [0, 1], a probability, got " +
                      std::to_string(s.dropout_p));
  }
  p.dropout = dropout_rule(s.dropout_p, s.seed);
  p.scale = s.scale;
  p.softcap = s.softcap;
  p.alibi_slopes = slopes_by_head(check, s.alibi_slopes, sequences, p.heads, has_heads);
  if (p.alibi_slopes && p.seqlen_q + p.seqlen_k > INT32_MAX) {
    check.unsupported("alibi_slopes need fewer than 2^31 rows of q and k together, got " +
                      std::to_string(p.seqlen_q + p.seqlen_k));
  }
}

inline std::string shape_text(const AttentionProblem& p) {
  return std::to_string(p.batch) + "x" + std::to_string(p.heads) + ":" +
         std::to_string(p.heads_kv) + "x" + std::to_string(p.seqlen_q) + "x" +
         std::to_string(p.seqlen_k) + "x" + std::to_string(p.head_dim);
}

}  // namespace tilewright
