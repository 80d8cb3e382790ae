// softmax and its logarithm over the last axis.
//
//     M = max(x), S = sum(exp(x - M))
//     y = exp(x - M) / S                     dx = y (dy - sum(y dy))
//     log: y = (x - M) - log(S)              dx = dy - exp(y) sum(dy)
//
// x, y, dy, dx: (rows, C), any strides and float dtypes. A team of threads (team.h) takes a row in
// three passes: maximum, sum, result. The first brings the row from memory, the others find it in the
// cache (a row of 32 KiB fits the smallest L1): bound by memory, 2 C elements a row.
//
// Numerics: float32, one rounding at the end. NaN, +inf or nothing but -inf in a row make it NaN, as
// the definition does.
#include "cuda/array.h"
#include "cuda/kernels.h"
#include "cuda/team.h"

namespace tilewright::cuda {
namespace {

template <class Team, class Element>
__global__ void softmax_forward_kernel(Rows x, Rows y, std::int64_t rows, std::int64_t C,
                                       bool log) {
  Team team;
  const std::int64_t r = Team::row();
  if (r >= rows) return;
  const std::int64_t from = x.row(r), to = y.row(r);
  float top = -INFINITY;
  for (std::int64_t c = Team::thread(); c < C; c += Team::kThreads) {
    top = fmaxf(top, x.load<Element>(from + c * x.step));
  }
  top = team.max(top);
  float sum = 0;
  for (std::int64_t c = Team::thread(); c < C; c += Team::kThreads) {
    sum += expf(x.load<Element>(from + c * x.step) - top);
  }
  sum = team.sum(sum);
  const float shift = log ? logf(sum) : 0, scale = 1 / sum;
  for (std::int64_t c = Team::thread(); c < C; c += Team::kThreads) {
    const float z = x.load<Element>(from + c * x.step) - top;
    y.store<Element>(to + c * y.step, log ? z - shift : expf(z) * scale);
  }
}

template <class Team, class Element>
__global__ void softmax_backward_kernel(Rows y, Rows dy, Rows dx, std::int64_t rows, std::int64_t C,
                                        bool log) {
  Team team;
  const std::int64_t r = Team::row();
  if (r >= rows) return;
  const std::int64_t at_y = y.row(r), at_dy = dy.row(r), to = dx.row(r);
  float sum = 0;
  for (std::int64_t c = Team::thread(); c < C; c += Team::kThreads) {
    const float d = dy.load<Element>(at_dy + c * dy.step);
    sum = log ? sum + d : fmaf(d, y.load<Element>(at_y + c * y.step), sum);
  }
  sum = team.sum(sum);
  for (std::int64_t c = Team::thread(); c < C; c += Team::kThreads) {
    const float d = dy.load<Element>(at_dy + c * dy.step);
    const float p = y.load<Element>(at_y + c * y.step);
    dx.store<Element>(to + c * dx.step, log ? fmaf(-expf(p), sum, d) : p * (d - sum));
  }
}

}  // namespace

void softmax_forward(const SoftmaxForward& op) {
  const std::int64_t rows = row_count(op.x), C = op.x.last();
  with_team(C, [&](auto team) {
    with_element({&op.x, &op.y}, [&](auto element) {
      using T = decltype(team);
      launch_rows<T>("softmax_forward", softmax_forward_kernel<T, decltype(element)>, rows,
                     rows_of(op.x), rows_of(op.y), rows, C, op.log);
    });
  });
}

void softmax_backward(const SoftmaxBackward& op) {
  const std::int64_t rows = row_count(op.y), C = op.y.last();
  with_team(C, [&](auto team) {
    with_element({&op.y, &op.dy, &op.dx}, [&](auto element) {
      using T = decltype(team);
      launch_rows<T>("softmax_backward", softmax_backward_kernel<T, decltype(element)>, rows,
                     rows_of(op.y), rows_of(op.dy), rows_of(op.dx), rows, C, op.log);
    });
  });
}

}  // namespace tilewright::cuda
