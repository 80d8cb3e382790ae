// Softmax rows, forward and backward, and the parts of cross entropy that run along a row:
//
//   forward       y = e^(x - max) / sum(e^(x - max))         rows (rows, C)
//   backward      dx = y (dy - sum(y dy))
//   subtract      y = (x - max) - log_sum                    log softmax, from max_and_sum
//   log_backward  dx = dy - e^y sum(dy)
//   max_and_sum   max, sum(e^(x - max)): what log-sum-exp needs, streaming
//   scaled_exp    dx = scale e^(x - lse)
//   soft_targets  q = weight (keep target + spread), what a class counts, and sum(q)
//   soft_loss     sum(q ((max - x) + log_sum))
//   soft_gradient dx = scale (total e^(x - lse) - q)
//
//   forward: three passes over a row         max_and_sum: one pass over memory, kChunk elements at a
//   that stays in L1 or L2                   time: their max, then their sum; the sum so far is scaled
//                                            when the max grows
//     row |-- max -->|
//         |-- exp, sum -->|  y = e^(x - max)
//         |-- scale -->|
//
// Parameter   bounded by
// kSums       latency of an addition (4 cycles), and of a maximum
// kChunk      L1: 4 KiB of x, read twice; above it the rescaling (one exp) is nothing
//
// The next row (chunk) is asked for while the terms of one are made, and what it is written to while one
// is scaled: the hardware begins only when they are touched, and softmax of rows in memory took 1.7
// times as long.
//
// Numerics: float32; sums in kSums vectors of lanes and chunks in order: a row's bits depend on
// that row alone. The largest element's term is exactly 1. A row of -inf, or with NaN or +inf, is
// NaN as its definition is; -inf beside finite elements gives 0. Not handled: dtypes and strides
// (cpu/rowwise.h); C = 0.
//
// Source: Milakov & Gimelshein, "Online normalizer calculation for softmax" (2018), for
// max_and_sum.
#include "cpu/kernel_table.h"
#include "simd/fill.h"

namespace tilewright::ISA {
namespace {

constexpr int kSums = 4;
constexpr int64_t kChunk = 1024;
constexpr float kInfinity = __builtin_inff();

// The largest element that is not NaN; of none, -inf.
float row_max(const float* x, int64_t C) {
  Vec m[kSums];
  for (int v = 0; v < kSums; ++v) m[v] = broadcast(-kInfinity);
  int64_t i = 0;
  for (; i + kSums * kWidth <= C; i += kSums * kWidth) {
#pragma GCC unroll 4
    for (int v = 0; v < kSums; ++v) m[v] = larger(load(x + i + v * kWidth), m[v]);
  }
  for (; i + kWidth <= C; i += kWidth) m[0] = larger(load(x + i), m[0]);
  if (i < C) m[1] = larger(keep_first(load_partial(x + i, C - i), C - i, -kInfinity), m[1]);
  return reduce_max(larger(larger(m[0], m[1]), larger(m[2], m[3])));
}

// The sum of e^(x - shift); Store: y takes the terms. `ahead`: elements to the next row or chunk.
template <bool Store>
TW_INLINE float exp_sum(const float* x, int64_t C, int64_t ahead, float shift, float* y) {
  Vec sum[kSums] = {};
  const auto term = [&](int64_t i, int64_t n) {
    __builtin_prefetch(x + i + ahead);
    return exp_to_zero(load_n(x + i, n) - shift);
  };
  const auto take = [&](int v, int64_t i, int64_t n, Vec e) {
    if (Store) store_n(y + i, e, n);
    sum[v] = sum[v] + keep_first(e, n, 0.0f);
  };
  int64_t i = 0;
  for (; i + kSums * kWidth <= C; i += kSums * kWidth) {
    Vec e[kSums];  // all before the first is stored: the compiler mixes their instructions
#pragma GCC unroll 4
    for (int v = 0; v < kSums; ++v) e[v] = term(i + v * kWidth, kWidth);
#pragma GCC unroll 4
    for (int v = 0; v < kSums; ++v) take(v, i + v * kWidth, kWidth, e[v]);
  }
  for (; i + kWidth <= C; i += kWidth) take(0, i, kWidth, term(i, kWidth));
  if (i < C) take(1, i, C - i, term(i, C - i));
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

void scale(float* y, int64_t C, int64_t ahead, float factor) {
  fill(y, C, [=](int64_t i, int64_t n) {
    __builtin_prefetch(y + i + ahead, 1);
    return load_n(y + i, n) * factor;
  });
}

void forward(int64_t rows, int64_t C, const float* x, int64_t ldx, float* y, int64_t ldy) {
  for (int64_t r = 0; r < rows; ++r, x += ldx, y += ldy) {
    const float sum = exp_sum<true>(x, C, ldx, row_max(x, C), y);
    scale(y, C, ldy, 1.0f / sum);
  }
}

float dot(const float* a, const float* b, int64_t C) {
  Vec sum[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kWidth <= C; i += kSums * kWidth) {
#pragma GCC unroll 4
    for (int v = 0; v < kSums; ++v) {
      sum[v] = fma(load(a + i + v * kWidth), load(b + i + v * kWidth), sum[v]);
    }
  }
  for (; i + kWidth <= C; i += kWidth) sum[0] = fma(load(a + i), load(b + i), sum[0]);
  if (i < C) sum[1] = fma(load_partial(a + i, C - i), load_partial(b + i, C - i), sum[1]);
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

void backward(int64_t rows, int64_t C, const float* y, int64_t ldy, const float* dy, int64_t lddy,
              float* dx, int64_t lddx) {
  for (int64_t r = 0; r < rows; ++r, y += ldy, dy += lddy, dx += lddx) {
    const float mean = dot(y, dy, C);
    fill(dx, C,
         [=](int64_t i, int64_t n) { return load_n(y + i, n) * (load_n(dy + i, n) - mean); });
  }
}

void max_and_sum(const float* x, int64_t C, float* row_maximum, float* row_sum) {
  float m = -kInfinity, sum = 0.0f;
  for (int64_t i = 0; i < C; i += kChunk) {
    const int64_t n = C - i < kChunk ? C - i : kChunk;
    const float chunk_max = row_max(x + i, n);
    if (chunk_max > m) {
      sum = m == -kInfinity ? sum : sum * exp_to_zero(broadcast(m - chunk_max))[0];
      m = chunk_max;
    }
    // What is -inf so far adds nothing (its difference with itself would be NaN), but a NaN does.
    sum += exp_sum<false>(x + i, n, kChunk, m == -kInfinity ? 0.0f : m, nullptr);
  }
  *row_maximum = m;
  *row_sum = sum;
}

void scaled_exp(const float* x, int64_t C, float lse, float factor, float* dx) {
  fill(dx, C, [=](int64_t i, int64_t n) { return factor * exp_to_zero(load_n(x + i, n) - lse); });
}

void subtract(const float* x, int64_t C, float max, float log_sum, float* y) {
  fill(y, C, [=](int64_t i, int64_t n) { return (load_n(x + i, n) - max) - log_sum; });
}

// f(v, i, n) over a row: sum v of kSums takes n elements from i on.
template <class F>
TW_INLINE void for_row(int64_t C, const F& f) {
  int64_t i = 0;
  for (; i + kSums * kWidth <= C; i += kSums * kWidth) {
#pragma GCC unroll 4
    for (int v = 0; v < kSums; ++v) f(v, i + v * kWidth, kWidth);
  }
  for (; i + kWidth <= C; i += kWidth) f(0, i, kWidth);
  if (i < C) f(1, i, C - i);
}

void log_backward(const float* y, const float* dy, int64_t C, float* dx) {
  Vec sum[kSums] = {};
  for_row(C, [&](int v, int64_t i, int64_t n) { sum[v] = sum[v] + load_n(dy + i, n); });
  const Vec total = broadcast(reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])));
  fill(dx, C,
       [=](int64_t i, int64_t n) { return fma(-exp(load_n(y + i, n)), total, load_n(dy + i, n)); });
}

float soft_targets(const float* target, const float* weight, int64_t C, float keep, float spread,
                   float* q) {
  Vec sum[kSums] = {};
  for_row(C, [&](int v, int64_t i, int64_t n) {
    Vec share = broadcast(spread);
    if (target) share = fma(load_n(target + i, n), broadcast(keep), share);
    if (weight) share = share * load_n(weight + i, n);
    store_n(q + i, share, n);
    sum[v] = sum[v] + keep_first(share, n, 0.0f);
  });
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

float soft_loss(const float* x, const float* q, int64_t C, float max, float log_sum) {
  Vec sum[kSums] = {};
  for_row(C, [&](int v, int64_t i, int64_t n) {
    const Vec nll = keep_first((max - load_n(x + i, n)) + log_sum, n, 0.0f);
    sum[v] = fma(load_n(q + i, n), nll, sum[v]);
  });
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

void soft_gradient(const float* x, const float* q, int64_t C, float lse, float total, float factor,
                   float* dx) {
  fill(dx, C, [=](int64_t i, int64_t n) {
    const Vec p = exp_to_zero(load_n(x + i, n) - lse);
    return factor * fma(p, broadcast(total), -load_n(q + i, n));
  });
}

}  // namespace

void fill_softmax(KernelTable& table) {
  table.softmax = {forward,    backward,     subtract,  log_backward, max_and_sum,
                   scaled_exp, soft_targets, soft_loss, soft_gradient};
}

}  // namespace tilewright::ISA
