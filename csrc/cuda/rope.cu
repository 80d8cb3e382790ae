// y = x with the first R elements of each row rotated by pairs; the others are passed on:
//
//     (a, b) -> (a cos - b sin, b cos + a sin)          inverse: sin changes its sign
//
//     halves        | a0 a1 a2 .. | b0 b1 b2 .. | rest |       pair j is j and R/2 + j
//     interleaved   | a0 b0 a1 b1 a2 b2 ..      | rest |       pair j is 2j and 2j + 1
//
// x, y: (..., T, D); cos, sin: (T, R/2), or (B, T, R/2) for x (B, ..., T, D); any strides and float
// dtypes. A thread takes a pair, or one element of the rest, so y may be x. Neighbouring lanes take
// neighbouring pairs: whole sectors. Bound by memory, 2 elements each; tables stay in the cache.
//
// Numerics: float32, one rounding at the end. Source: Su et al., "RoFormer" (2021).
#include "cuda/each.h"
#include "cuda/kernels.h"

namespace tilewright::cuda {
namespace {

struct Rotation {
  Rows x, y, cos, sin;            // the tables' rows: (B, T), or (T,)
  std::int64_t rows, T, D, half;  // half: R/2
  std::int64_t rows_per_table;    // of x, that share T rows of the tables
  bool interleaved;
  float sign;  // -1: inverse
};

template <class Element>
__global__ void rope_kernel(Rotation p) {
  const std::int64_t threads = p.D - p.half, i = each_index();  // of a row; this one
  if (i >= p.rows * threads) return;
  const std::int64_t r = i / threads, j = i % threads;
  const std::int64_t from = p.x.row(r), to = p.y.row(r);
  const auto x = [&](std::int64_t at) { return p.x.template load<Element>(from + at * p.x.step); };
  const auto write = [&](std::int64_t at, float value) {
    p.y.template store<Element>(to + at * p.y.step, value);
  };
  if (j >= p.half) return write(j + p.half, x(j + p.half));

  const std::int64_t line = r / p.rows_per_table * p.T + r % p.T;
  const float cos = p.cos.template load<Element>(p.cos.row(line) + j * p.cos.step);
  const float sin = p.sin.template load<Element>(p.sin.row(line) + j * p.sin.step) * p.sign;
  const std::int64_t first = p.interleaved ? 2 * j : j;
  const std::int64_t second = p.interleaved ? 2 * j + 1 : p.half + j;
  const float a = x(first), b = x(second);
  write(first, fmaf(a, cos, -(b * sin)));
  write(second, fmaf(b, cos, a * sin));
}

}  // namespace

void rope(const Rope& op) {
  const std::int64_t rows = row_count(op.x);
  const bool batched = op.cos.rank == 3;
  const Rotation p{rows_of(op.x),
                   rows_of(op.y),
                   rows_of(op.cos),
                   rows_of(op.sin),
                   rows,
                   op.x.shape[op.x.rank - 2],
                   op.x.last(),
                   op.cos.last(),
                   batched ? rows / op.x.shape[0] : rows,
                   op.interleaved,
                   op.inverse ? -1.0f : 1.0f};
  with_element({&op.x, &op.y, &op.cos, &op.sin}, [&](auto element) {
    launch_each("rope", rope_kernel<decltype(element)>, rows * (p.D - p.half), p);
  });
}

}  // namespace tilewright::cuda
