// Cross entropy, and its gradient:
//
//     loss[r] = sum over classes c of q[c] (lse - x[r, c])          lse = log(sum(exp(x[r])))
//     dx[r, c] = scale dloss (sum(q) exp(x[r, c] - lse) - q[c])
//
// where a class counts
//
//     ids             q = keep weight at the target, and spread weight at every class
//     probabilities   q = weight (keep target + spread)
//
//     keep = 1 - smoothing                   spread = smoothing / C
//
// x, dx: (rows, C), any strides and float dtypes, dx maybe x itself; target: ids (rows,) or
// probabilities (rows, C); dloss: () or (rows,). An id that is ignore_index leaves 0, one that
// names no class NaN: nobody reads it before the kernel does.
//
// Forward: a team of threads (team.h) reads a row once, each with the maximum M of what it has seen
// and S = sum(exp(x - M)), which shrinks when M grows; lse = M + log(S). Where every class counts,
// the row is read again, from the cache if it is that short, since lse is part of each term.
//
// The row losses, and what "mean" divides by, are summed in double (sums.h). Backward: one pass,
// and before it one over what the classes count where all do. Both are bound by memory.
//
// kChunk   4 loads of a thread in flight, and one rescaling of S for 4 elements
//
// Numerics: float32; NaN, +inf or nothing but -inf in a row make its loss NaN, as the definition
// does.
//
// Source: Milakov & Gimelshein, "Online normalizer calculation for softmax" (2018).
#include "cuda/ids.h"
#include "cuda/kernels.h"
#include "cuda/sums.h"
#include "cuda/team.h"
#include "cuda/workspace.h"

namespace tilewright::cuda {
namespace {

constexpr int kChunk = 4;

// What each class counts.
struct Shares {
  bool soft;
  Rows probabilities;  // where soft, else
  Array ids;
  Array weight;  // absent: 1
  std::int64_t C, ignored;
  float keep, spread;

  // Whether every class counts, not the target alone.
  __device__ bool everywhere() const { return soft || spread > 0; }
  __device__ float weight_of(std::int64_t c) const {
    return weight ? weight.load<Mixed>(weight.offset(c)) : 1.0f;
  }
  // Of class c in the row that starts here, without what the row's id adds.
  __device__ float of(std::int64_t row, std::int64_t c) const {
    const float p = soft ? probabilities.load<Mixed>(row + c * probabilities.step) : 0;
    return fmaf(p, keep, spread) * weight_of(c);
  }
  __device__ std::int64_t row(std::int64_t r) const { return soft ? probabilities.row(r) : 0; }

  // -1 where the row's target is probabilities.
  __device__ std::int64_t id(std::int64_t r) const {
    return soft ? -1 : load_id(ids, ids.offset(r));
  }
  // A class may be `ignored` too.
  __device__ bool counts(std::int64_t id) const { return names(id, C) && id != ignored; }
};

// What terms are relative to: there is no finite maximum in a row of -inf.
__device__ inline float base_of(float top) {
  return top == -INFINITY ? 0.0f : top;
}

template <class Team, class Element>
__global__ void cross_entropy_forward_kernel(Rows x, Shares shares, Array losses, float* lse,
                                             std::int64_t rows) {
  Team team;
  const std::int64_t r = Team::row(), C = shares.C;
  if (r >= rows) return;
  const std::int64_t from = x.row(r);
  float top = -INFINITY, sum = 0;
  for (std::int64_t c = Team::thread(); c < C; c += kChunk * Team::kThreads) {
    float z[kChunk], higher = top;
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
      const std::int64_t at = c + k * Team::kThreads;
      z[k] = at < C ? x.load<Element>(from + at * x.step) : -INFINITY;
      higher = fmaxf(higher, z[k]);
    }
    const float base = base_of(higher);
    sum *= expf(top - base);
#pragma unroll
    for (int k = 0; k < kChunk; ++k) sum += expf(z[k] - base);
    top = higher;
  }
  const float own_top = top;
  top = team.max(top);
  const float log_sum = logf(team.sum(sum * expf(own_top - base_of(top))));
  float loss = 0;
  if (shares.everywhere()) {
    const std::int64_t target = shares.row(r);
    for (std::int64_t c = Team::thread(); c < C; c += Team::kThreads) {
      const float nll = (top - x.load<Element>(from + c * x.step)) + log_sum;
      loss = fmaf(shares.of(target, c), nll, loss);
    }
    loss = team.sum(loss);
  }
  if (Team::thread() > 0) return;
  if (lse) lse[r] = top + log_sum;
  if (!shares.soft) {
    const std::int64_t id = shares.id(r);
    if (shares.counts(id)) {
      const float own = shares.keep * shares.weight_of(id);
      loss = fmaf(own, (top - x.load<Element>(from + id * x.step)) + log_sum, loss);
    } else {
      loss = id == shares.ignored ? 0 : NAN;
    }
  }
  losses.store<float>(losses.offset(r), loss);
}

__global__ void cross_entropy_sum_kernel(const float* losses, Shares shares, double* sums,
                                         double* divisors, std::int64_t rows) {
  double loss = 0, divisor = 0;
  for_run(blockIdx.x, rows, [&](std::int64_t r) {
    loss += losses[r];
    const std::int64_t id = shares.id(r);
    divisor += shares.soft ? 1 : shares.counts(id) ? shares.weight_of(id) : 0;
  });
  loss = block_sum(loss, 0);
  divisor = block_sum(divisor, 1);
  if (threadIdx.x > 0) return;
  sums[blockIdx.x] = loss;
  divisors[blockIdx.x] = divisor;
}

__global__ void cross_entropy_total_kernel(const double* sums, const double* divisors,
                                           std::int64_t count, bool mean, float* loss,
                                           float* scale) {
  const double sum = block_sum(thread_sum(sums, count), 0);
  const double divisor = block_sum(thread_sum(divisors, count), 1);
  if (threadIdx.x > 0) return;
  *loss = static_cast<float>(!mean ? sum : divisor != 0 ? sum / divisor : NAN);
  if (scale) *scale = divisor != 0 ? static_cast<float>(1 / divisor) : 1.0f;
}

template <class Team, class Element>
__global__ void cross_entropy_backward_kernel(Rows x, Shares shares, const float* lse, Array dloss,
                                              const float* scale, Rows dx, std::int64_t rows) {
  Team team;
  const std::int64_t r = Team::row(), C = shares.C;
  if (r >= rows) return;
  const std::int64_t from = x.row(r), to = dx.row(r), target = shares.row(r), id = shares.id(r);
  const bool everywhere = shares.everywhere();
  if (!shares.soft && !shares.counts(id)) {
    for (std::int64_t c = Team::thread(); c < C; c += Team::kThreads) {
      dx.store<Element>(to + c * dx.step, id == shares.ignored ? 0 : NAN);
    }
    return;
  }
  const float own = shares.soft ? 0 : shares.keep * shares.weight_of(id);
  float total = 0;
  if (everywhere) {
    for (std::int64_t c = Team::thread(); c < C; c += Team::kThreads) total += shares.of(target, c);
    total = team.sum(total);
  }
  total += own;
  const float shift = lse[r];
  const float factor =
      (scale ? *scale : 1.0f) * dloss.load<Mixed>(dloss.axes > 0 ? dloss.offset(r) : 0);
  for (std::int64_t c = Team::thread(); c < C; c += Team::kThreads) {
    float q = everywhere ? shares.of(target, c) : 0;
    if (c == id) q += own;
    const float p = expf(x.load<Element>(from + c * x.step) - shift);
    dx.store<Element>(to + c * dx.step, factor * fmaf(p, total, -q));
  }
}

template <class Op>
Shares shares_of(const Op& op) {
  Shares s;
  s.soft = op.target.dtype != DType::s32 && op.target.dtype != DType::s64;
  if (s.soft) {
    s.probabilities = rows_of(op.target);
  } else {
    s.ids = array_of(op.target);
  }
  s.weight = array_of(op.weight);
  s.C = op.logits.last();
  s.ignored = op.ignore_index;
  s.keep = 1.0f - op.label_smoothing;
  s.spread = s.C > 0 ? op.label_smoothing / static_cast<float>(s.C) : 0.0f;
  return s;
}

// Also where there are no classes.
std::int64_t rows_before(const View& logits) {
  std::int64_t rows = 1;
  for (int d = 0; d < logits.rank - 1; ++d) rows *= logits.shape[d];
  return rows;
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForward& op) {
  const std::int64_t rows = rows_before(op.logits);
  const Shares shares = shares_of(op);
  const bool reduced = op.reduction != Reduction::none;
  const Matrix room(reduced ? rows : 0, 1);
  const View& losses = reduced ? room.view() : op.loss;
  if (rows > 0) {
    with_team(shares.C, [&](auto team) {
      with_element({&op.logits}, [&](auto element) {
        using T = decltype(team);
        launch_rows<T>("cross_entropy_forward", cross_entropy_forward_kernel<T, decltype(element)>,
                       rows, rows_of(op.logits), shares, array_of(losses),
                       op.lse ? op.lse.ptr<float>() : nullptr, rows);
      });
    });
  }
  if (!reduced) return;
  const std::int64_t blocks = runs_of(rows);
  const gpu::Workspace sums(static_cast<std::size_t>(2 * blocks) * sizeof(double));
  double *const sum = sums.as<double>(), *const divisor = sum + blocks;
  launch_sum("cross_entropy_sum", cross_entropy_sum_kernel, blocks, room.data(), shares, sum,
             divisor, rows);
  launch_sum("cross_entropy_total", cross_entropy_total_kernel, 1, sum, divisor, blocks,
             op.reduction == Reduction::mean, op.loss.ptr<float>(),
             op.scale ? op.scale.ptr<float>() : nullptr);
}

void cross_entropy_backward(const CrossEntropyBackward& op) {
  const std::int64_t rows = rows_before(op.logits);
  const Shares shares = shares_of(op);
  with_team(shares.C, [&](auto team) {
    with_element({&op.logits, &op.dlogits}, [&](auto element) {
      using T = decltype(team);
      launch_rows<T>("cross_entropy_backward", cross_entropy_backward_kernel<T, decltype(element)>,
                     rows, rows_of(op.logits), shares, op.lse.ptr<float>(), array_of(op.dloss),
                     op.scale ? op.scale.ptr<float>() : nullptr, rows_of(op.dlogits), rows);
    });
  });
}

}  // namespace tilewright::cuda
