// Optimizer steps over n elements, in place, with g' = grad_scale g + decay p in all of them:
//
//   adam      m = beta1 m + (1 - beta1) g'               sgd   u = momentum u + (1 - dampening) g'
//             v = beta2 v + (1 - beta2) g'^2                   d = g' + momentum u (nesterov),
//             w = v, or largest = max(largest, v)                  else u
//             p = p keep                                       p = p - lr d
//               - lr / c1 * m / (sqrt(w / c2) + eps)
//             c1 = 1 - beta1^step, c2 = 1 - beta2^step
//             adamw: keep = 1 - lr weight_decay, decay = 0;  adam: keep = 1, decay = weight_decay
//
//   rmsprop   s = alpha s + (1 - alpha) g'^2             centered:  a = alpha a + (1 - alpha) g'
//             d = g' / (sqrt(w) + eps)                              w = max(s - a^2, 0), else w = s
//             momentum:  u = momentum u + d,  p = p - lr u,  else p = p - lr d
//
//   scale        x = factor x
//   sum_squares  sum(x^2): simd/squares.h
//
// Every operand is read once and written once: adam moves 7 arrays, so memory bounds it from n
// beyond the caches; what comes kAhead elements later is asked for, over the ends of pages, where the
// hardware stops (15 % of adam's time with one thread). Elementwise: no element's bits depend on its
// neighbours. s - a^2 is never negative but for rounding, which the maximum takes away: without it, a
// constant gradient ends in sqrt of a negative number.
// Not handled: dtypes and strides (cpu/rowwise.h); a list of tensors (cpu/optim.cc).
//
// Source: Kingma & Ba, "Adam" (2015); Reddi, Kale & Kumar, "On the convergence of Adam and beyond"
// (2018), for `largest`; Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (2019),
// algorithm 2; Sutskever et al., "On the importance of initialization and momentum" (2013), for
// nesterov; Tieleman & Hinton, lecture 6.5 (2012), and Graves, "Generating sequences with recurrent
// neural networks" (2013), for rmsprop and its centered form.
#include "cpu/kernel_table.h"
#include "simd/squares.h"

namespace tilewright::ISA {
namespace {

constexpr int kAhead = 1024;

// Without decay p is not touched: an infinite parameter must not spoil the gradient.
TW_INLINE Vec with_decay(Vec grad, float decay, Vec p) {
  return decay == 0 ? grad : fma(p, broadcast(decay), grad);
}

template <bool HasLargest>
TW_INLINE void adam_all(const AdamStep& s, int64_t n, float* p, const float* g, float* m, float* v,
                        float* largest) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t count = n - i < kWidth ? n - i : kWidth;
    __builtin_prefetch(p + i + kAhead, 1);
    __builtin_prefetch(g + i + kAhead);
    __builtin_prefetch(m + i + kAhead, 1);
    __builtin_prefetch(v + i + kAhead, 1);
    const Vec old = load_n(p + i, count);
    const Vec grad = with_decay(load_n(g + i, count) * s.grad_scale, s.decay, old);
    const Vec mean = fma(load_n(m + i, count), broadcast(s.beta1), s.rest1 * grad);
    const Vec square = fma(load_n(v + i, count), broadcast(s.beta2), s.rest2 * grad * grad);
    Vec below = square;
    if (HasLargest) {
      below = max(load_n(largest + i, count), square);
      store_n(largest + i, below, count);
    }
    const Vec step = mean / fma(sqrt(below), broadcast(s.root), broadcast(s.eps));
    store_n(m + i, mean, count);
    store_n(v + i, square, count);
    store_n(p + i, fma(step, broadcast(-s.rate), s.keep * old), count);
  }
}

void adam(const AdamStep& s, int64_t n, float* p, const float* g, float* m, float* v,
          float* largest) {
  largest ? adam_all<true>(s, n, p, g, m, v, largest) : adam_all<false>(s, n, p, g, m, v, nullptr);
}

template <bool HasVelocity>
TW_INLINE void sgd_all(const SgdStep& s, int64_t n, float* p, const float* g, float* velocity) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t count = n - i < kWidth ? n - i : kWidth;
    const Vec old = load_n(p + i, count);
    const Vec grad = with_decay(load_n(g + i, count) * s.grad_scale, s.decay, old);
    Vec step = grad;
    if (HasVelocity) {
      step = fma(load_n(velocity + i, count), broadcast(s.momentum), s.rest * grad);
      store_n(velocity + i, step, count);
      if (s.nesterov) step = fma(step, broadcast(s.momentum), grad);
    }
    store_n(p + i, fma(step, broadcast(-s.lr), old), count);
  }
}

void sgd(const SgdStep& s, int64_t n, float* p, const float* g, float* velocity) {
  velocity ? sgd_all<true>(s, n, p, g, velocity) : sgd_all<false>(s, n, p, g, nullptr);
}

template <bool HasMean, bool HasVelocity>
TW_INLINE void rmsprop_all(const RmspropStep& s, int64_t n, float* p, const float* g, float* square,
                           float* mean, float* velocity) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t count = n - i < kWidth ? n - i : kWidth;
    const Vec old = load_n(p + i, count);
    const Vec grad = with_decay(load_n(g + i, count) * s.grad_scale, s.decay, old);
    Vec below = fma(load_n(square + i, count), broadcast(s.alpha), s.rest * grad * grad);
    store_n(square + i, below, count);
    if (HasMean) {
      const Vec average = fma(load_n(mean + i, count), broadcast(s.alpha), s.rest * grad);
      store_n(mean + i, average, count);
      below = max(fma(-average, average, below), Vec{});
    }
    Vec step = grad / (sqrt(below) + s.eps);
    if (HasVelocity) {
      step = fma(load_n(velocity + i, count), broadcast(s.momentum), step);
      store_n(velocity + i, step, count);
    }
    store_n(p + i, fma(step, broadcast(-s.lr), old), count);
  }
}

void rmsprop(const RmspropStep& s, int64_t n, float* p, const float* g, float* square, float* mean,
             float* velocity) {
  if (mean) {
    velocity ? rmsprop_all<true, true>(s, n, p, g, square, mean, velocity)
             : rmsprop_all<true, false>(s, n, p, g, square, mean, nullptr);
  } else {
    velocity ? rmsprop_all<false, true>(s, n, p, g, square, nullptr, velocity)
             : rmsprop_all<false, false>(s, n, p, g, square, nullptr, nullptr);
  }
}

void scale(float factor, int64_t n, float* x) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t count = n - i < kWidth ? n - i : kWidth;
    store_n(x + i, load_n(x + i, count) * factor, count);
  }
}

double sum_squares(const float* x, int64_t n) {
  return sum_of_squares(n, [=](int64_t i, int64_t count) { return load_n(x + i, count); });
}

}  // namespace

void fill_optim(KernelTable& table) {
  table.optim = {adam, sgd, rmsprop, scale, sum_squares};
}

}  // namespace tilewright::ISA
