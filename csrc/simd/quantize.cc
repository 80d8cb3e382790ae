// Quantization:  q(i, j) = clamp(rne((x(i, j) - offset[i]) / scale[i]), low, high),
// y(i, j) = scale[i] * q(i, j) + offset[i]       x, q, y (rows, cols) of any strides, scale (rows,)
// amax[i] = max_j |x(i, j)|, low[i] = min_j x(i, j), high[i] = max_j x(i, j)
//
//   columns contiguous            rows contiguous            Lanes run along whichever axis is
//     lanes -> one scale            lanes -> a scale each    contiguous; `line` is the other one.
//   +----------------------+      +----------------------+   With neither contiguous, lanes are
//   | line                 |      | line                 |   gathered one by one.
//
// Bound by memory (float32 in, a byte out); the division costs about as much as the load.
// Numerics: IEEE division, rounding to nearest even by adding 1.5 * 2^23; the same bits everywhere.
// Not handled: groups (the caller passes them one by one), two integers in a byte.
#include "cpu/kernel_table.h"
#include "simd/elements.h"

namespace tilewright::ISA {
namespace {

typedef int8_t VecS8 __attribute__((vector_size(kWidth)));

template <class T>
TW_INLINE Vec load_bytes(const T* p, int64_t stride, int n) {
  if (stride == 1 && n == kWidth) return to_float(widen(p));
  T q[kWidth] = {};
  for (int i = 0; i < n; ++i) q[i] = p[i * stride];
  return to_float(widen(q));
}
TW_INLINE Vec load_strided(const int8_t* p, int64_t stride, int n) {
  return load_bytes(p, stride, n);
}
TW_INLINE Vec load_strided(const uint8_t* p, int64_t stride, int n) {
  return load_bytes(p, stride, n);
}

// The low byte of each lane: int8 or uint8.
TW_INLINE void store_strided(int8_t* p, int64_t stride, int n, VecI v) {
  const VecS8 q = __builtin_convertvector(v, VecS8);
  if (stride == 1) {
    if (n == kWidth) {
      memcpy(p, &q, sizeof q);
    } else {
      memcpy(p, &q, size_t(n));
    }
  } else {
    for (int i = 0; i < n; ++i) p[i * stride] = q[i];
  }
}

TW_INLINE Vec load_first(const float* p, int n) {
  return n == kWidth ? load(p) : load_partial(p, n);
}

// A matrix as lines of lanes.
struct Lines {
  int64_t lines, lanes;
  bool scale_per_lane;  // the lanes are rows
};

TW_INLINE Lines lines_of(const Matrix& x, int64_t rows, int64_t cols) {
  const bool across = x.row == 1 && x.col != 1;
  return across ? Lines{cols, rows, true} : Lines{rows, cols, false};
}

// The matrix's stride from line to line, and from lane to lane.
TW_INLINE int64_t line_stride(const Matrix& m, const Lines& l) {
  return l.scale_per_lane ? m.col : m.row;
}
TW_INLINE int64_t lane_stride(const Matrix& m, const Lines& l) {
  return l.scale_per_lane ? m.row : m.col;
}

// body(line, lane, n): n <= kWidth lanes from `lane` on.
template <class Body>
TW_INLINE void for_vectors(const Lines& l, const Body& body) {
  for (int64_t line = 0; line < l.lines; ++line) {
    int64_t lane = 0;
    for (; lane + kWidth <= l.lanes; lane += kWidth) body(line, lane, kWidth);
    if (lane < l.lanes) body(line, lane, int(l.lanes - lane));
  }
}

TW_INLINE Vec scale_of(const float* scale, const Lines& l, int64_t line, int64_t lane, int n) {
  return l.scale_per_lane ? load_first(scale + lane, n) : broadcast(scale[line]);
}

// Folds every row of x into found[row], which holds a start: fold(found, values of x).
template <class T, class Fold>
void fold_rows(const T* src, const Matrix& x, const Lines& l, float* found, const Fold& fold) {
  const int64_t step = line_stride(x, l), stride = lane_stride(x, l);
  if (l.scale_per_lane) {
    for_vectors(l, [&](int64_t line, int64_t lane, int n) {
      const Vec v = load_strided(src + line * step + lane * stride, stride, n);
      store_n(found + lane, fold(load_first(found + lane, n), v), n);
    });
    return;
  }
  for (int64_t line = 0; line < l.lines; ++line) {
    Vec m = broadcast(found[line]);
    for_vectors({1, l.lanes, false}, [&](int64_t, int64_t lane, int n) {
      const Vec next = fold(m, load_strided(src + line * step + lane * stride, stride, n));
      m = n == kWidth ? next : select(lane_numbers() < n, next, m);
    });
#pragma GCC unroll 4
    for (int half = kWidth / 2; half > 0; half /= 2) {
      m = fold(m, __builtin_shuffle(m, lane_numbers() ^ half));
    }
    found[line] = m[0];
  }
}

struct Largest {
  TW_INLINE Vec operator()(Vec m, Vec v) const { return max(m, v); }
};
struct LargestMagnitude {
  TW_INLINE Vec operator()(Vec m, Vec v) const { return max(m, abs(v)); }
};
struct Smallest {
  TW_INLINE Vec operator()(Vec m, Vec v) const { return min(m, v); }
};

template <class Fold>
void fold(const Matrix& x, int64_t rows, int64_t cols, float* found) {
  const Lines l = lines_of(x, rows, cols);
  with_type(x, [&](const auto* p) { fold_rows(p, x, l, found, Fold()); });
}

void amax(const Matrix& x, int64_t rows, int64_t cols, float* amax) {
  fold<LargestMagnitude>(x, rows, cols, amax);
}
void low(const Matrix& x, int64_t rows, int64_t cols, float* low) {
  fold<Smallest>(x, rows, cols, low);
}
void high(const Matrix& x, int64_t rows, int64_t cols, float* high) {
  fold<Largest>(x, rows, cols, high);
}

// x / scale may be infinite where the scale is subnormal, and is clamped; a scale that isn't finite
// gives 0.
TW_INLINE VecI round_to_level(Vec x, Vec scale, Levels levels) {
  const Vec clamped = min(max(x / scale, broadcast(levels.low)), broadcast(levels.high));
  const VecI q = as_int(clamped + 12582912.0f) - 0x4b400000;
  return scale - scale == 0.0f ? q : VecI{};
}

template <class T>
void quantize_lines(const T* src, const Matrix& x, const Lines& l, const float* scale,
                    const float* offset, Levels levels, const Matrix& q) {
  const auto dst = static_cast<int8_t*>(const_cast<void*>(q.data));
  const int64_t x_step = line_stride(x, l), x_stride = lane_stride(x, l);
  const int64_t q_step = line_stride(q, l), q_stride = lane_stride(q, l);
  for_vectors(l, [&](int64_t line, int64_t lane, int n) {
    Vec v = load_strided(src + line * x_step + lane * x_stride, x_stride, n);
    if (offset) v = v - scale_of(offset, l, line, lane, n);
    const VecI rounded = round_to_level(v, scale_of(scale, l, line, lane, n), levels);
    store_strided(dst + line * q_step + lane * q_stride, q_stride, n, rounded);
  });
}

void quantize(const Matrix& x, int64_t rows, int64_t cols, const float* scale, const float* offset,
              Levels levels, const Matrix& q) {
  const Lines l = lines_of(x, rows, cols);
  with_type(x, [&](const auto* p) { quantize_lines(p, x, l, scale, offset, levels, q); });
}

template <class Q, class T>
void dequantize_lines(const Q* src, const Matrix& q, const Lines& l, const float* scale,
                      const float* offset, T* dst, const Matrix& y) {
  const int64_t q_step = line_stride(q, l), q_stride = lane_stride(q, l);
  const int64_t y_step = line_stride(y, l), y_stride = lane_stride(y, l);
  for_vectors(l, [&](int64_t line, int64_t lane, int n) {
    const Vec v = load_strided(src + line * q_step + lane * q_stride, q_stride, n);
    const Vec s = scale_of(scale, l, line, lane, n);
    const Vec value = offset ? fma_once(s, v, scale_of(offset, l, line, lane, n)) : s * v;
    store_strided(dst + line * y_step + lane * y_stride, y_stride, n, value);
  });
}

void dequantize(const Matrix& q, int64_t rows, int64_t cols, const float* scale,
                const float* offset, const Matrix& y) {
  const Lines l = lines_of(q, rows, cols);
  with_type(y, [&](auto* p) {
    if (q.dtype == DType::s8) {
      dequantize_lines(static_cast<const int8_t*>(q.data), q, l, scale, offset, p, y);
    } else {
      dequantize_lines(static_cast<const uint8_t*>(q.data), q, l, scale, offset, p, y);
    }
  });
}

}  // namespace

void fill_quantize(KernelTable& table) {
  table.quantize = {amax, low, high, quantize, dequantize};
}

}  // namespace tilewright::ISA
