// Softmax rows, forward and backward, and the parts of cross entropy that run along a row:
//
//   forward       y = e^(x - max) / sum(e^(x - max))         rows (rows, C), or log softmax:
//                 y = (x - max) - log(sum(e^(x - max)))
//   backward      dx = y (dy - sum(y dy))
//   log_backward  dx = dy - e^y sum(dy)
//   max_and_sum   max, sum(e^(x - max)): what log-sum-exp needs, streaming
//   scaled_exp    dx = scale e^(x - lse)
//   soft_targets  q = weight (keep target + spread), what a class counts, and sum(q)
//   soft_loss     sum(q ((max - x) + log_sum))
//   soft_gradient dx = scale (total e^(x - lse) - q)
//
//   forward: three rows in one pass, which stay     max_and_sum: one pass over memory, kChunk elements
//   in L1 or L2; of each row                        at a time: their max, then their sum; the sum so
//                                                   far is scaled when the max grows
//     row - 1 |-- scaled ---->|  y = y / sum, or the logarithm
//     row     |-- exp, sum -->|  y = e^(x - max)
//     row + 1 |-- max ------->|
//
// Parameter   bounded by
// kSums       latency of an addition (4 cycles), and of a maximum
// kChunk      L1: 4 KiB of x, read twice; above it the rescaling (one exp) is nothing
// kAhead      elements of the longest rows of which forward asks for the one after the next, and for
//             where the next one goes. Longer ones the hardware finds by itself: 15 % slower at 3072,
//             where 768 are 7 % faster (12 MB in L3)
//
// Row by row, each pass would wait for the number that the one before ends with: 1.3 times the time
// at C = 768. The max of the next row also brings it into L1; chunks of max_and_sum are asked for.
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
constexpr int64_t kAhead = 2048;
constexpr float kInfinity = __builtin_inff();

// The largest element that is not NaN; of none, -inf. In parts, so that a row's can be found while
// something else is made.
struct RowMax {
  Vec part[kSums];
  TW_INLINE RowMax() {
    for (Vec& m : part) m = broadcast(-kInfinity);
  }
  TW_INLINE void take(int v, const float* x, int64_t n) {
    part[v] = larger(keep_first(load_n(x, n), n, -kInfinity), part[v]);
  }
  TW_INLINE float result() const {
    return reduce_max(larger(larger(part[0], part[1]), larger(part[2], part[3])));
  }
};

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

float row_max(const float* x, int64_t C) {
  RowMax max;
  for_row(C, [&](int v, int64_t i, int64_t n) { max.take(v, x + i, n); });
  return max.result();
}

// The sum of e^(x - shift); Store: y takes the terms. also(v, i, n): what else is to be done there.
template <bool Store, class Also>
TW_INLINE float exp_sum(const float* x, int64_t C, float shift, float* y, const Also& also) {
  Vec sum[kSums] = {};
  const auto term = [&](int v, int64_t i, int64_t n) {
    also(v, i, n);
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
    for (int v = 0; v < kSums; ++v) e[v] = term(v, i + v * kWidth, kWidth);
#pragma GCC unroll 4
    for (int v = 0; v < kSums; ++v) take(v, i + v * kWidth, kWidth, e[v]);
  }
  for (; i + kWidth <= C; i += kWidth) take(0, i, kWidth, term(0, i, kWidth));
  if (i < C) take(1, i, C - i, term(1, i, C - i));
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// The last pass over a row: the terms scaled, or the logarithms made.
template <bool Log>
struct Finish {
  const float* x;
  float *y, max, rest;  // 1 / sum, or log(sum)
  TW_INLINE void operator()(int64_t i, int64_t n) const {
    const Vec result = Log ? (load_n(x + i, n) - max) - rest : load_n(y + i, n) * broadcast(rest);
    store_n(y + i, result, n);
  }
};

template <bool Log>
void forward_rows(int64_t rows, int64_t C, const float* x, int64_t ldx, float* y, int64_t ldy) {
  Finish<Log> last{};
  const bool short_rows = C <= kAhead;
  float max = row_max(x, C);
  for (int64_t r = 0; r < rows; ++r, x += ldx, y += ldy) {
    RowMax next;
    const float* const next_x = r + 1 < rows ? x + ldx : x;  // the last one's is not used
    const auto find_next = [&](int v, int64_t i, int64_t n) {
      next.take(v, next_x + i, n);
      __builtin_prefetch(next_x + (short_rows ? ldx : 0) + i);
      __builtin_prefetch(y + (short_rows ? ldy : 0) + i, 1);
    };
    const auto and_finish_last = [&](int v, int64_t i, int64_t n) {
      find_next(v, i, n);
      last(i, n);
    };
    const float sum =
        r ? exp_sum<!Log>(x, C, max, y, and_finish_last) : exp_sum<!Log>(x, C, max, y, find_next);
    last = {x, y, max, Log ? __builtin_logf(sum) : 1.0f / sum};
    max = next.result();
  }
  for_row(C, [&](int, int64_t i, int64_t n) { last(i, n); });
}

void forward(bool log, int64_t rows, int64_t C, const float* x, int64_t ldx, float* y,
             int64_t ldy) {
  log ? forward_rows<true>(rows, C, x, ldx, y, ldy) : forward_rows<false>(rows, C, x, ldx, y, ldy);
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
    sum += exp_sum<false>(x + i, n, m == -kInfinity ? 0.0f : m, nullptr,
                          [&](int, int64_t j, int64_t) { __builtin_prefetch(x + i + kChunk + j); });
  }
  *row_maximum = m;
  *row_sum = sum;
}

void scaled_exp(const float* x, int64_t C, float lse, float factor, float* dx) {
  fill(dx, C, [=](int64_t i, int64_t n) { return factor * exp_to_zero(load_n(x + i, n) - lse); });
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
  table.softmax = {forward,    backward,     log_backward, max_and_sum,
                   scaled_exp, soft_targets, soft_loss,    soft_gradient};
}

}  // namespace tilewright::ISA
