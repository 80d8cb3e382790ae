// layernorm and rmsnorm over the last axis, and their gradients:
//
//     s = x + residual, rounded to the dtype it is kept in
//     mean = sum(s) / C     rstd = 1 / sqrt(sum((s - mean)^2) / C + eps)     xhat = (s - mean) rstd
//     y = xhat gamma + beta                  rmsnorm: mean = 0 instead, beta = 0
//
//     g = dy gamma     c1 = sum(g) / C     c2 = sum(g xhat) / C
//     dx = rstd (g - c1 - xhat c2) + ds      rmsnorm: c1 = 0 instead
//     dgamma = sum over rows of dy xhat      dbeta = sum over rows of dy
//
// x, s, y, dy, dx: (rows, C), any strides and float dtypes; gamma, beta: (C,).
//
//     rows      |<-- a team of threads (team.h) -->|     sum, squares, result: the first pass brings
//               |<-- another                    -->|     the row from memory, the others find it in
//                                                        the cache
//     columns   | | | | |  a thread takes a column of kSumHeight rows; these sums are rows,
//               v v v v v  which sum_rows.cu adds up
//
// Bound by memory: forward 2 C elements a row (4 C with residual); backward dy and s twice, for rows
// and for columns, and dx. The columns go first, since dx may be dy or s itself.
//
// Numerics: float32, two passes for mean and variance (never E[s^2] - mean^2), one rounding at the
// end; a row's bits depend on that row alone, and sums over rows have one order, without atomics.
//
// Source: Ba, Kiros & Hinton, "Layer Normalization" (2016); Zhang & Sennrich, "Root Mean Square
// Layer Normalization" (2019).
#include "cuda/each.h"
#include "cuda/kernels.h"
#include "cuda/team.h"
#include "cuda/workspace.h"

namespace tilewright::cuda {
namespace {

struct Forward {
  Rows x, residual, y, s;
  Rows gamma, beta;  // (C,): rows of which there is one
  float* mean;       // (rows,) or nullptr
  float* rstd;
  std::int64_t rows, C;
  float eps;
  bool centred;
};

template <class Team, class Element>
__global__ void layernorm_forward_kernel(Forward p) {
  Team team;
  const std::int64_t r = Team::row();
  if (r >= p.rows) return;
  const std::int64_t first = Team::thread(), C = p.C;

  // --- s, which later passes read instead of x: each thread what it wrote itself
  if (p.residual) {
    const std::int64_t at_x = p.x.row(r), at_residual = p.residual.row(r), to = p.s.row(r);
    for (std::int64_t c = first; c < C; c += Team::kThreads) {
      p.s.template store<Element>(
          to + c * p.s.step,
          p.x.template load<Element>(at_x + c * p.x.step) +
              p.residual.template load<Element>(at_residual + c * p.residual.step));
    }
  }
  const Rows& s = p.residual ? p.s : p.x;
  const std::int64_t from = s.row(r);

  // --- mean and deviation
  float mean = 0;
  if (p.centred) {
    float sum = 0;
    for (std::int64_t c = first; c < C; c += Team::kThreads) {
      sum += s.template load<Element>(from + c * s.step);
    }
    mean = team.sum(sum) / static_cast<float>(C);
  }
  float squares = 0;
  for (std::int64_t c = first; c < C; c += Team::kThreads) {
    const float d = s.template load<Element>(from + c * s.step) - mean;
    squares = fmaf(d, d, squares);
  }
  const float rstd = 1.0f / sqrtf(team.sum(squares) / static_cast<float>(C) + p.eps);
  if (first == 0 && p.mean) p.mean[r] = mean;
  if (first == 0 && p.rstd) p.rstd[r] = rstd;

  // --- result
  const std::int64_t to = p.y.row(r);
  for (std::int64_t c = first; c < C; c += Team::kThreads) {
    const float xhat = (s.template load<Element>(from + c * s.step) - mean) * rstd;
    const float gamma = p.gamma ? p.gamma.template load<Element>(c * p.gamma.step) : 1.0f;
    const float beta = p.beta ? p.beta.template load<Element>(c * p.beta.step) : 0.0f;
    p.y.template store<Element>(to + c * p.y.step, p.beta ? fmaf(xhat, gamma, beta) : xhat * gamma);
  }
}

struct Backward {
  Rows s, gamma, dy, ds, dx;
  const float* mean;  // (rows,); nullptr for rmsnorm
  const float* rstd;
  std::int64_t rows, C;
};

template <class Team, class Element>
__global__ void layernorm_backward_rows_kernel(Backward p) {
  Team team;
  const std::int64_t r = Team::row();
  if (r >= p.rows) return;
  const std::int64_t at_s = p.s.row(r), at_dy = p.dy.row(r), to = p.dx.row(r);
  const std::int64_t at_ds = p.ds ? p.ds.row(r) : 0;
  const float mean = p.mean ? p.mean[r] : 0.0f, rstd = p.rstd[r];
  const auto g_of = [&](std::int64_t c) {
    const float gamma = p.gamma ? p.gamma.template load<Element>(c * p.gamma.step) : 1.0f;
    return p.dy.template load<Element>(at_dy + c * p.dy.step) * gamma;
  };
  const auto xhat_of = [&](std::int64_t c) {
    return (p.s.template load<Element>(at_s + c * p.s.step) - mean) * rstd;
  };

  float c1 = 0, c2 = 0;
  for (std::int64_t c = Team::thread(); c < p.C; c += Team::kThreads) {
    const float g = g_of(c);
    c1 += g;
    c2 = fmaf(g, xhat_of(c), c2);
  }
  c1 = p.mean ? team.sum(c1) / static_cast<float>(p.C) : 0.0f;
  c2 = team.sum(c2) / static_cast<float>(p.C);
  for (std::int64_t c = Team::thread(); c < p.C; c += Team::kThreads) {
    const float g = g_of(c) - c1;  // rounded as c1 was: for C = 1 it vanishes
    float dx = fmaf(xhat_of(c), -c2, g) * rstd;
    if (p.ds) dx += p.ds.template load<Element>(at_ds + c * p.ds.step);
    p.dx.template store<Element>(to + c * p.dx.step, dx);
  }
}

// Row i of dgamma and dbeta (blocks, C): the sums over kSumHeight rows from the i-th block of them.
template <class Element>
__global__ void layernorm_backward_columns_kernel(Backward p, float* dgamma, float* dbeta,
                                                  std::int64_t blocks) {
  const std::int64_t i = each_index();
  if (i >= blocks * p.C) return;
  const std::int64_t c = i % p.C, start = i / p.C * kSumHeight;
  const std::int64_t end = min(p.rows, start + kSumHeight);
  float by_xhat = 0, alone = 0;
  for (std::int64_t r = start; r < end; ++r) {
    const float dy = p.dy.template load<Element>(p.dy.row(r) + c * p.dy.step);
    const float s = p.s.template load<Element>(p.s.row(r) + c * p.s.step);
    by_xhat = fmaf(dy, (s - (p.mean ? p.mean[r] : 0.0f)) * p.rstd[r], by_xhat);
    alone += dy;
  }
  dgamma[i] = by_xhat;
  dbeta[i] = alone;
}

}  // namespace

void layernorm_forward(const LayernormForward& op) {
  const Forward p{rows_of(op.x),
                  rows_of(op.residual),
                  rows_of(op.y),
                  rows_of(op.s),
                  rows_of(op.gamma),
                  rows_of(op.beta),
                  op.mean.ptr<float>(),
                  op.rstd.ptr<float>(),
                  row_count(op.x),
                  op.x.last(),
                  op.eps,
                  op.centred};
  with_team(p.C, [&](auto team) {
    with_element({&op.x, &op.residual, &op.y, &op.s, &op.gamma, &op.beta}, [&](auto element) {
      using T = decltype(team);
      launch_rows<T>("layernorm_forward", layernorm_forward_kernel<T, decltype(element)>, p.rows,
                     p);
    });
  });
}

void layernorm_backward(const LayernormBackward& op) {
  const Backward p{rows_of(op.s),        rows_of(op.gamma), rows_of(op.dy),
                   rows_of(op.ds),       rows_of(op.dx),    op.mean.ptr<float>(),
                   op.rstd.ptr<float>(), row_count(op.s),   op.s.last()};
  with_element({&op.s, &op.gamma, &op.dy, &op.ds, &op.dx}, [&](auto element) {
    using Element = decltype(element);
    if (op.dgamma || op.dbeta) {
      const std::int64_t blocks = sum_blocks_of(p.rows);
      const Matrix dgamma(blocks, p.C), dbeta(blocks, p.C);
      if (blocks > 0) {
        launch_each("layernorm_backward_columns", layernorm_backward_columns_kernel<Element>,
                    blocks * p.C, p, dgamma.data(), dbeta.data(), blocks);
      }
      if (op.dgamma) sum_rows({dgamma.view(), op.dgamma});
      if (op.dbeta) sum_rows({dbeta.view(), op.dbeta});
    }
    if (p.rows == 0) return;
    with_team(p.C, [&](auto team) {
      using T = decltype(team);
      launch_rows<T>("layernorm_backward_rows", layernorm_backward_rows_kernel<T, Element>, p.rows,
                     p);
    });
  });
}

}  // namespace tilewright::cuda
