// Elementwise kernels and the sum of rows:
//
//   activate            y = f(x)                 f: of simd/activation.h
//   activate_backward   dx = dy * f'(x)
//   widen, narrow       a 16-bit float <-> float32, to nearest even
//   add                 sum += x
//   sum_rows            sum[j] = x[0][j] + x[1][j] + …
//
//       x (rows, C)   | v v v v | v v v v | …     sum_rows keeps kSums vectors of sums in registers
//                     | v v v v | v v v v |       and runs down the rows: a row is read once, sums
//                          down      down         are stored once.
//
// Parameter   bounded by
// kSums       below: the latency of an addition (4 cycles, 1–2 a cycle); above: nothing gained
// kAhead      elements asked for ahead. Below: what memory delivers while a line is waited for, and pages
//             of 4 KiB, at whose ends the hardware stops asking (relu of 64 MB at 512: 14 % slower,
//             without 12 to 68 %); above: L2. relu of less asks for nothing: its loads run ahead by
//             themselves, and what is asked for takes their place (6 MB in L3: 5 %, 13 MB: 20 %)
//
// Numerics: each element on its own; a tail runs the same instructions on a partial vector. A
// column of sum_rows is one chain, row after row: the caller bounds its length. Bounds of f in
// activation.h. Not handled: dtypes and strides (cpu/rowwise.h).
#include "cpu/kernel_table.h"
#include "simd/activation.h"
#include "simd/elements.h"
#include "simd/fill.h"

namespace tilewright::ISA {
namespace {

constexpr int kSums = 4;
constexpr int kAhead = 2048;

template <class From, class To>
TW_INLINE void convert(const From* x, To* y, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(y + i, load(x + i));
  if (i < n) store_partial(y + i, load_partial(x + i, n - i), n - i);
}

void widen(DType from, const void* x, float* y, int64_t n) {
  with_type({x, from, 0, 1}, [&](const auto* p) { convert(p, y, n); });
}

void narrow(DType to, const float* x, void* y, int64_t n) {
  with_type({y, to, 0, 1}, [&](auto* p) { convert(x, p, n); });
}

template <Activation Kind>
struct Constant {
  static constexpr Activation value = Kind;
};

// body(k), k.value == kind a constant: one loop of straight-line code for each.
template <class Body>
TW_INLINE void with_constant(Activation kind, const Body& body) {
  switch (kind) {
    case Activation::relu:
      return body(Constant<Activation::relu>{});
    case Activation::gelu:
      return body(Constant<Activation::gelu>{});
    case Activation::gelu_tanh:
      return body(Constant<Activation::gelu_tanh>{});
    case Activation::silu:
      return body(Constant<Activation::silu>{});
    case Activation::tanh:
      return body(Constant<Activation::tanh>{});
    case Activation::sigmoid:
      return body(Constant<Activation::sigmoid>{});
    case Activation::none:
      return body(Constant<Activation::none>{});
  }
}

// Whether to ask ahead: where each element is a chain of instructions that fills the CPU's window, and
// where results go past the caches.
TW_INLINE bool asks(Activation kind, bool past_caches) {
  return kind != Activation::relu || past_caches;
}

void activate_all(Activation kind, const float* x, float* y, int64_t n, bool past_caches) {
  with_constant(kind, [&](auto k) {
    const bool ask = asks(k.value, past_caches);
    const auto f = [=](int64_t i, int64_t m) {
      if (ask) __builtin_prefetch(x + i + kAhead);
      return activate(k.value, load_n(x + i, m));
    };
    fill(y, n, f, past_caches);
  });
}

void activate_backward(Activation kind, const float* x, const float* dy, float* dx, int64_t n,
                       bool past_caches) {
  with_constant(kind, [&](auto k) {
    const bool ask = asks(k.value, past_caches);
    const auto f = [=](int64_t i, int64_t m) {
      if (ask) {
        __builtin_prefetch(x + i + kAhead);
        __builtin_prefetch(dy + i + kAhead);
      }
      return load_n(dy + i, m) * slope(k.value, load_n(x + i, m));
    };
    fill(dx, n, f, past_caches);
  });
}

void add(const float* x, float* sum, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(sum + i, load(sum + i) + load(x + i));
  if (i < n)
    store_partial(sum + i, load_partial(sum + i, n - i) + load_partial(x + i, n - i), n - i);
}

void sum_rows(const float* x, int64_t ld, int64_t rows, int64_t C, float* sum) {
  int64_t j = 0;
  for (; j + kSums * kWidth <= C; j += kSums * kWidth) {
    Vec s[kSums] = {};
    for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kSums; ++v) s[v] = s[v] + load(x + i * ld + j + v * kWidth);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kSums; ++v) store(sum + j + v * kWidth, s[v]);
  }
  for (; j < C; j += kWidth) {
    const int64_t n = C - j < kWidth ? C - j : kWidth;
    Vec s = {};
    for (int64_t i = 0; i < rows; ++i) s = s + load_partial(x + i * ld + j, n);
    store_partial(sum + j, s, n);
  }
}

}  // namespace

void fill_elementwise(KernelTable& table) {
  table.element = {widen, narrow, activate_all, activate_backward, add, sum_rows};
}

}  // namespace tilewright::ISA
