// Quantization:  q(i, j) = clamp(rne((x(i, j) - offset[i]) / scale[i]), low, high),
// y(i, j) = scale[i] * q(i, j) + offset[i]       x, q, y (rows, cols) of any strides, scale (rows,)
// amax[i] = max_j |x(i, j)|, low[i] = min_j x(i, j), high[i] = max_j x(i, j)
//
//   columns contiguous            rows contiguous            Lanes run along whichever axis is
//     lanes -> one scale            lanes -> a scale each    contiguous; `line` is the other one.
//   +----------------------+      +----------------------+   With neither contiguous, lanes are
//   | line                 |      | line                 |   gathered one by one.
//
// Nibbles: columns 2p and 2p + 1 in byte p, the first one low. Two vectors along a row are parted
// into even and odd lanes; where lanes are rows, two lines meet in one.
//
// Bound by memory (float32 in, a byte out); the division costs about as much as the load.
// Numerics: IEEE division, rounding to nearest even by adding 1.5 * 2^23; the same bits everywhere.
// Not handled: groups (the caller passes them one by one).
#include "cpu/kernel_table.h"
#include "simd/elements.h"

namespace tilewright::ISA {
namespace {

typedef int8_t VecS8 __attribute__((vector_size(kWidth)));

// T: int8_t or uint8_t.
template <class T>
TW_INLINE VecI load_bytes(const T* p, int64_t stride, int n) {
  if (stride == 1 && n == kWidth) return widen(p);
  T q[kWidth] = {};
  for (int i = 0; i < n; ++i) q[i] = p[i * stride];
  return widen(q);
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

constexpr int kUnrolled = 4;  // vectors: one chain alone would wait for itself

// As many as there are, kUnrolled at a time; `done` counts the lanes.
template <class T, class Fold>
TW_INLINE Vec fold_vectors(const T* src, int64_t lanes, Vec start, const Fold& fold,
                           int64_t& done) {
  Vec m[kUnrolled] = {start, start, start, start};
  for (; done + kUnrolled * kWidth <= lanes; done += kUnrolled * kWidth) {
#pragma GCC unroll 4
    for (int c = 0; c < kUnrolled; ++c) m[c] = fold(m[c], load(src + done + c * kWidth));
  }
  return fold(fold(m[0], m[1]), fold(m[2], m[3]));
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
    int64_t done = 0;
    Vec m = broadcast(found[line]);
    if (stride == 1) m = fold_vectors(src + line * step, l.lanes, m, fold, done);
    for_vectors({1, l.lanes - done, false}, [&](int64_t, int64_t rest, int n) {
      const int64_t lane = done + rest;
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
  // As integers: NaN is the largest, and one instruction compares.
  TW_INLINE Vec operator()(Vec m, Vec v) const {
    const VecI a = as_int(abs(m)), b = as_int(abs(v));
    return as_float(a > b ? a : b);
  }
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

// A matrix's values as integers: each row has its scale, and perhaps an offset.
template <class T>
struct Rounder {
  const T* src;
  int64_t step, stride;  // from line to line, from lane to lane
  Lines l;
  const float *scale, *offset;
  Levels levels;

  TW_INLINE VecI operator()(int64_t line, int64_t lane, int n) const {
    Vec v = load_strided(src + line * step + lane * stride, stride, n);
    if (offset) v = v - scale_of(offset, l, line, lane, n);
    return round_to_level(v, scale_of(scale, l, line, lane, n), levels);
  }
  // The same with 0 beyond n lanes, which may be none.
  TW_INLINE VecI padded(int64_t line, int64_t lane, int64_t n) const {
    if (n >= kWidth) return (*this)(line, lane, kWidth);
    if (n <= 0) return VecI{};
    const VecI v = (*this)(line, lane, int(n));
    return lane_numbers() < int32_t(n) ? v : VecI{};
  }
};

// The lanes [0, n) of a row, as far as there are kUnrolled vectors; returns how many. The same bits
// without a division: with r = 1 / scale, x r is within 3 * 2^-24 * 256 of x / scale rounded, so that
// both round to one integer unless x r is nearer to a tie than that. Then it divides.
template <class T>
int64_t quantize_row(const T* x, int64_t n, float scale, float offset, Levels levels, int8_t* q) {
  constexpr float kTie = 0.5f - 0x1p-13f, kRound = 12582912.0f;
  const float inverse = 1.0f / scale;
  if (!(inverse >= 0x1p-126f && inverse <= 0x1p126f)) return 0;  // subnormal, infinite or NaN
  int64_t at = 0;
  for (; at + kUnrolled * kWidth <= n; at += kUnrolled * kWidth) {
    VecI rounded[kUnrolled], unsure = {};
#pragma GCC unroll 4
    for (int c = 0; c < kUnrolled; ++c) {
      const Vec v = load(x + at + c * kWidth) - offset;
      const Vec y = clamp(v * inverse, levels.low, levels.high), shifted = y + kRound;
      rounded[c] = as_int(shifted) - as_int(broadcast(kRound));
      unsure |= ~(abs(y - (shifted - kRound)) < kTie);  // NaN too
    }
    if (any(unsure)) {
      for (int c = 0; c < kUnrolled; ++c) {
        const Vec v = load(x + at + c * kWidth) - offset;
        rounded[c] = round_to_level(v, broadcast(scale), levels);
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < kUnrolled; ++c) store_strided(q + at + c * kWidth, 1, kWidth, rounded[c]);
  }
  return at;
}

void quantize(const Matrix& x, int64_t rows, int64_t cols, const float* scale, const float* offset,
              Levels levels, const Matrix& q) {
  const Lines l = lines_of(x, rows, cols);
  const auto dst = static_cast<int8_t*>(const_cast<void*>(q.data));
  const int64_t step = line_stride(q, l), stride = lane_stride(q, l);
  with_type(x, [&](const auto* p) {
    const Rounder rounded{p, line_stride(x, l), lane_stride(x, l), l, scale, offset, levels};
    const bool rows_of_one_scale = !l.scale_per_lane && rounded.stride == 1 && stride == 1;
    for (int64_t line = 0; line < l.lines; ++line) {
      const int64_t done =
          rows_of_one_scale ? quantize_row(p + line * rounded.step, l.lanes, scale[line],
                                           offset ? offset[line] : 0.0f, levels, dst + line * step)
                            : 0;
      for_vectors({1, l.lanes - done, false}, [&](int64_t, int64_t rest, int n) {
        const int64_t lane = done + rest;
        store_strided(dst + line * step + lane * stride, stride, n, rounded(line, lane, n));
      });
    }
  });
}

// The bytes of a matrix of nibbles as lines of lanes.
TW_INLINE Lines byte_lines(const Lines& l) {
  const auto half = [](int64_t n) { return (n + 1) / 2; };
  return l.scale_per_lane ? Lines{half(l.lines), l.lanes, true}
                          : Lines{l.lines, half(l.lanes), false};
}

template <class T>
void quantize_pairs(const T* src, const Matrix& x, const Lines& l, const float* scale,
                    const float* offset, Levels levels, int8_t* dst, const Matrix& q) {
  const Rounder rounded{src, line_stride(x, l), lane_stride(x, l), l, scale, offset, levels};
  const int64_t step = line_stride(q, l), stride = lane_stride(q, l);
  for_vectors(byte_lines(l), [&](int64_t line, int64_t lane, int n) {
    VecI low, high;
    if (l.scale_per_lane) {
      low = rounded(2 * line, lane, n);
      high = 2 * line + 1 < l.lines ? rounded(2 * line + 1, lane, n) : VecI{};
    } else {
      const int64_t left = l.lanes - 2 * lane;
      const VecI first = rounded.padded(line, 2 * lane, left);
      const VecI second = rounded.padded(line, 2 * lane + kWidth, left - kWidth);
      low = __builtin_shuffle(first, second, 2 * lane_numbers());
      high = __builtin_shuffle(first, second, 2 * lane_numbers() + 1);
    }
    store_strided(dst + line * step + lane * stride, stride, n, (low & 15) | (high << 4));
  });
}

// Column 0 of x into the high nibbles of column 0 of q.
template <class T>
void quantize_high(const T* src, const Matrix& x, int64_t rows, const float* scale,
                   const float* offset, Levels levels, int8_t* dst, const Matrix& q) {
  const Lines column{1, rows, true};
  const Rounder rounded{
      src, line_stride(x, column), lane_stride(x, column), column, scale, offset, levels};
  for_vectors(column, [&](int64_t, int64_t lane, int n) {
    int8_t* const to = dst + lane * q.row;
    const VecI low = load_bytes(to, q.row, n) & 15;
    store_strided(to, q.row, n, low | (rounded(0, lane, n) << 4));
  });
}

void quantize_nibbles(const Matrix& x, int64_t rows, int64_t cols, const float* scale,
                      const float* offset, Levels levels, const Matrix& q, bool high_first) {
  with_type(x, [&](const auto* p) {
    auto to = static_cast<int8_t*>(const_cast<void*>(q.data));
    if (high_first) {
      quantize_high(p, x, rows, scale, offset, levels, to, q);
      p += x.col, to += q.col, --cols;
    }
    quantize_pairs(p, x, lines_of(x, rows, cols), scale, offset, levels, to, q);
  });
}

// Integers times scales to a matrix of floats, and perhaps offsets.
template <class T>
struct Scaler {
  T* dst;
  int64_t step, stride;
  Lines l;
  const float *scale, *offset;

  TW_INLINE void operator()(int64_t line, int64_t lane, int n, VecI q) const {
    const Vec v = to_float(q), s = scale_of(scale, l, line, lane, n);
    const Vec value = offset ? fma_once(s, v, scale_of(offset, l, line, lane, n)) : s * v;
    store_strided(dst + line * step + lane * stride, stride, n, value);
  }
};

// f(pointer to the first byte), signed or not.
template <class F>
TW_INLINE void with_bytes(const Matrix& q, const F& f) {
  q.dtype == DType::s8 ? f(static_cast<const int8_t*>(q.data))
                       : f(static_cast<const uint8_t*>(q.data));
}

void dequantize(const Matrix& q, int64_t rows, int64_t cols, const float* scale,
                const float* offset, const Matrix& y) {
  const Lines l = lines_of(q, rows, cols);
  const int64_t step = line_stride(q, l), stride = lane_stride(q, l);
  with_type(y, [&](auto* to) {
    const Scaler scaled{to, line_stride(y, l), lane_stride(y, l), l, scale, offset};
    with_bytes(q, [&](const auto* p) {
      for_vectors(l, [&](int64_t line, int64_t lane, int n) {
        scaled(line, lane, n, load_bytes(p + line * step + lane * stride, stride, n));
      });
    });
  });
}

TW_INLINE VecI low_nibble(VecI bytes, const int8_t*) {
  return (bytes << 28) >> 28;
}
TW_INLINE VecI low_nibble(VecI bytes, const uint8_t*) {
  return bytes & 15;
}

template <class Q, class T>
void dequantize_pairs(const Q* src, const Matrix& q, const Lines& l, const float* scale,
                      const float* offset, T* dst, const Matrix& y) {
  const Scaler scaled{dst, line_stride(y, l), lane_stride(y, l), l, scale, offset};
  const int64_t step = line_stride(q, l), stride = lane_stride(q, l);
  for_vectors(byte_lines(l), [&](int64_t line, int64_t lane, int n) {
    const VecI bytes = load_bytes(src + line * step + lane * stride, stride, n);
    const VecI low = low_nibble(bytes, src), high = bytes >> 4;  // copies the sign, if there is one
    if (l.scale_per_lane) {
      scaled(2 * line, lane, n, low);
      if (2 * line + 1 < l.lines) scaled(2 * line + 1, lane, n, high);
    } else {
      const int64_t left = l.lanes - 2 * lane;
      const VecI pair = lane_numbers() / 2 + (lane_numbers() & 1) * kWidth;
      scaled(line, 2 * lane, left < kWidth ? int(left) : kWidth,
             __builtin_shuffle(low, high, pair));
      if (left <= kWidth) return;
      const int more = left < 2 * kWidth ? int(left) - kWidth : kWidth;
      scaled(line, 2 * lane + kWidth, more, __builtin_shuffle(low, high, pair + kWidth / 2));
    }
  });
}

template <class Q, class T>
void dequantize_high(const Q* src, const Matrix& q, int64_t rows, const float* scale,
                     const float* offset, T* dst, const Matrix& y) {
  const Lines column{1, rows, true};
  const Scaler scaled{dst, line_stride(y, column), lane_stride(y, column), column, scale, offset};
  for_vectors(column, [&](int64_t, int64_t lane, int n) {
    scaled(0, lane, n, load_bytes(src + lane * q.row, q.row, n) >> 4);
  });
}

void dequantize_nibbles(const Matrix& q, int64_t rows, int64_t cols, const float* scale,
                        const float* offset, const Matrix& y, bool high_first) {
  with_type(y, [&](auto* to) {
    with_bytes(q, [&](const auto* p) {
      if (high_first) {
        dequantize_high(p, q, rows, scale, offset, to, y);
        p += q.col, to += y.col, --cols;
      }
      dequantize_pairs(p, q, lines_of(q, rows, cols), scale, offset, to, y);
    });
  });
}

}  // namespace

void fill_quantize(KernelTable& table) {
  table.quantize = {amax, low, high, quantize, quantize_nibbles, dequantize, dequantize_nibbles};
}

}  // namespace tilewright::ISA
