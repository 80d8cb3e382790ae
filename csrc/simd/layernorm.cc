// Layernorm and rmsnorm rows, forward and backward:
//
//   s = x + residual                  (rows, C); rounded to the dtype s is kept in
//   mean = sum(s) / C     rstd = 1 / sqrt(sum((s - mean)^2) / C + eps)     xhat = (s - mean) rstd
//   y = xhat gamma + beta             rmsnorm: mean = 0 instead, beta = 0
//
//   g = dy gamma     c1 = sum(g) / C     c2 = sum(g xhat) / C
//   dx = rstd (g - c1 - xhat c2) + ds     dgamma = sum of dy xhat over rows     dbeta = sum of dy
//                                         rmsnorm: c1 = 0 instead
//
//   forward: row by row, three passes      backward: kRows rows at a time, which stay in L1. c1 and c2
//   over a row that stays in L1            of each; then kColumns vectors of columns at a time down
//                                          the rows, dgamma and dbeta in registers meanwhile
//       row |-- sum --->|                      | v v | v v | ...   mean, rstd, c1, c2 of a row are
//           |-- sum sq >|  (rmsnorm: one)      | v v | v v |       broadcast from memory
//           |-- write ->|
//
// Parameter   bounded by
// kSums       latency of an addition: 4 cycles, up to 2 a cycle
// kColumns    registers: gamma, dgamma, dbeta for each vector, and about 8 more
// kRows       below: loads and stores of dgamma and dbeta, once a group; above: L1, 3 arrays of so many
//             rows. All rows of the block at once, from L2: 1.15 times the time at C = 768
// kRowsAhead  below: what memory delivers during a group; above: L2
//
// Rows come from memory and go there: the lines to be written are asked for (prefetch) while the row
// is summed, or each first write would wait for its line: 8 % of forward and backward at 4096 x 768.
// Forward asks for the next row while it writes one, so does backward for later groups, and for what
// only its second pass reads while it sums: 10 to 25 %. What lies behind the last row, if anything, is
// most often this thread's next block.
//
// Numerics: float32; a row is summed in kSums vectors of lanes, added up in one fixed order, two
// passes for mean and variance (never E[s^2] - mean^2). A row's bits depend on that row alone;
// dgamma and dbeta are chains over the rows of the block, whose size the caller fixes.
// Not handled: dtypes and strides (cpu/rowwise.h); C = 0.
//
// Source: Ba, Kiros & Hinton, "Layer Normalization" (2016); Zhang & Sennrich, "Root Mean Square
// Layer Normalization" (2019).
#include "cpu/kernel_table.h"
#include "simd/fill.h"

namespace tilewright::ISA {
namespace {

constexpr int kSums = 4;
constexpr int kRows = 2;
constexpr int kRowsAhead = 4;
constexpr int kColumns = kWidth == 16 ? 4 : 2;

// The sum over i < C of f(i, n), a vector of n elements with zeros beyond.
template <class F>
TW_INLINE float sum_over(int64_t C, F f) {
  Vec sum[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kWidth <= C; i += kSums * kWidth) {
#pragma GCC unroll 4
    for (int v = 0; v < kSums; ++v) sum[v] = sum[v] + f(i + v * kWidth, kWidth);
  }
  for (; i + kWidth <= C; i += kWidth) sum[0] = sum[0] + f(i, kWidth);
  if (i < C) sum[1] = sum[1] + f(i, C - i);
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <bool Centred>
void forward_rows(const LayernormForwardRows& p) {
  const int64_t C = p.C;
  const float *gamma = p.gamma, *beta = p.beta;
  for (int64_t r = 0; r < p.rows; ++r) {
    const float *const x = p.x + r * p.ldx, *s = x;
    float* y = p.y + r * p.ldy;
    const auto ask_for_y = [&](int64_t i) {
      if (!p.past_caches) __builtin_prefetch(y + i, 1);
    };
    const auto term = [&](Vec v, int64_t i) {  // rmsnorm has no second pass
      if (!Centred) ask_for_y(i);
      return Centred ? v : v * v;
    };
    float sum;
    if (p.residual) {
      const float* residual = p.residual + r * p.ldr;
      float* kept = p.s + r * p.lds;
      sum = sum_over(C, [&](int64_t i, int64_t n) {
        Vec v = load_n(x + i, n) + load_n(residual + i, n);
        v = rounded_to(p.s_dtype, v);
        store_n(kept + i, v, n);
        return term(v, i);
      });
      s = kept;
    } else {
      sum = sum_over(C, [&](int64_t i, int64_t n) { return term(load_n(s + i, n), i); });
    }
    const float mean = Centred ? sum / float(C) : 0.0f;
    const float squares = !Centred ? sum : sum_over(C, [&](int64_t i, int64_t n) {
      ask_for_y(i);
      const Vec d = keep_first(load_n(s + i, n) - mean, n, 0.0f);
      return d * d;
    });
    const float rstd = 1.0f / __builtin_sqrtf(squares / float(C) + p.eps);
    p.mean[r] = mean;
    p.rstd[r] = rstd;
    const float *next = x + p.ldx,
                *next_residual = p.residual ? p.residual + (r + 1) * p.ldr : next;
    const auto normalised = [=](int64_t i, int64_t n) {
      __builtin_prefetch(next + i);
      __builtin_prefetch(next_residual + i);
      const Vec v = load_n(s + i, n), g = load_n(gamma + i, n);
      return Centred ? fma((v - mean) * rstd, g, load_n(beta + i, n)) : v * rstd * g;
    };
    fill(y, C, normalised, p.past_caches);
  }
}

void forward(const LayernormForwardRows& p) {
  p.centred ? forward_rows<true>(p) : forward_rows<false>(p);
}

// What a row of the backward pass needs beside its elements.
struct RowScalars {
  float mean, rstd, c1, c2;
};

RowScalars row_scalars(const LayernormBackwardRows& p, int64_t r) {
  const float *s = p.s + r * p.lds, *dy = p.dy + r * p.ldy, *gamma = p.gamma,
              *dx = p.dx + r * p.ldx, *ds = p.ds ? p.ds + r * p.ldds : dx;
  const float mean = p.mean ? p.mean[r] : 0.0f, rstd = p.rstd[r];
  Vec c1[kSums] = {}, c2[kSums] = {};
  const auto add = [&](int v, int64_t i, int64_t n) {
    const Vec g = load_n(dy + i, n) * load_n(gamma + i, n);
    c1[v] = c1[v] + g;
    c2[v] = fma(g, (load_n(s + i, n) - mean) * rstd, c2[v]);
  };
  int64_t i = 0;
  for (; i + kSums * kWidth <= p.C; i += kSums * kWidth) {
#pragma GCC unroll 4
    for (int v = 0; v < kSums; ++v) {
      add(v, i + v * kWidth, kWidth);
      __builtin_prefetch(dx + i + v * kWidth, 1);
      __builtin_prefetch(ds + i + v * kWidth);
    }
  }
  for (; i + kWidth <= p.C; i += kWidth) add(0, i, kWidth);
  if (i < p.C) add(1, i, p.C - i);
  const float C = float(p.C);
  return {mean, rstd, p.mean ? reduce_add((c1[0] + c1[1]) + (c1[2] + c1[3])) / C : 0.0f,
          reduce_add((c2[0] + c2[1]) + (c2[2] + c2[3])) / C};
}

// Columns [j, j + Vectors * kWidth), or only the first n of one vector.
template <int Vectors, bool HasDs>
TW_INLINE void backward_columns(const LayernormBackwardRows& p, const RowScalars* rows, int64_t j,
                                int64_t n) {
  Vec gamma[Vectors], dgamma[Vectors], dbeta[Vectors];
  for (int v = 0; v < Vectors; ++v) {
    const int64_t at = j + v * kWidth;
    gamma[v] = load_n(p.gamma + at, n);
    dgamma[v] = load_n(p.dgamma + at, n);
    dbeta[v] = load_n(p.dbeta + at, n);
  }
  for (int64_t r = 0; r < p.rows; ++r) {
    const RowScalars row = rows[r];
    const float *next_s = p.s + (r + kRowsAhead) * p.lds,
                *next_dy = p.dy + (r + kRowsAhead) * p.ldy;
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const int64_t at = j + v * kWidth;
      __builtin_prefetch(next_s + at, 0, 2);
      __builtin_prefetch(next_dy + at, 0, 2);
      const Vec dy = load_n(p.dy + r * p.ldy + at, n);
      const Vec xhat = (load_n(p.s + r * p.lds + at, n) - row.mean) * row.rstd;
      dgamma[v] = fma(dy, xhat, dgamma[v]);
      dbeta[v] = dbeta[v] + dy;
      const Vec g = dy * gamma[v] - row.c1;  // rounded as c1 was: for C = 1 it vanishes
      Vec dx = fma(xhat, broadcast(-row.c2), g) * row.rstd;
      if (HasDs) dx = dx + load_n(p.ds + r * p.ldds + at, n);
      store_n(p.dx + r * p.ldx + at, dx, n);
    }
  }
  for (int v = 0; v < Vectors; ++v) {
    store_n(p.dgamma + j + v * kWidth, dgamma[v], n);
    store_n(p.dbeta + j + v * kWidth, dbeta[v], n);
  }
}

template <bool HasDs>
void backward_all_columns(const LayernormBackwardRows& p, const RowScalars* rows) {
  int64_t j = 0;
  for (; j + kColumns * kWidth <= p.C; j += kColumns * kWidth) {
    backward_columns<kColumns, HasDs>(p, rows, j, kWidth);
  }
  for (; j + kWidth <= p.C; j += kWidth) backward_columns<1, HasDs>(p, rows, j, kWidth);
  if (j < p.C) backward_columns<1, HasDs>(p, rows, j, p.C - j);
}

void backward(const LayernormBackwardRows& p) {
  memset(p.dgamma, 0, size_t(p.C) * sizeof(float));
  memset(p.dbeta, 0, size_t(p.C) * sizeof(float));
  for (int64_t r = 0; r < p.rows; r += kRows) {
    LayernormBackwardRows group = p;
    group.rows = p.rows - r < kRows ? p.rows - r : kRows;
    group.s += r * p.lds, group.dy += r * p.ldy, group.dx += r * p.ldx, group.rstd += r;
    if (p.mean) group.mean += r;
    if (p.ds) group.ds += r * p.ldds;
    RowScalars rows[kRows];
    for (int64_t i = 0; i < group.rows; ++i) rows[i] = row_scalars(group, i);
    p.ds ? backward_all_columns<true>(group, rows) : backward_all_columns<false>(group, rows);
  }
}

}  // namespace

void fill_layernorm(KernelTable& table) {
  table.layernorm = {forward, backward};
}

}  // namespace tilewright::ISA
