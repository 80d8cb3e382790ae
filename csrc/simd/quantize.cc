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
// Bound by memory (float32 in, a byte out) where rows are long; rows of one or two vectors, as groups
// are, by the fold across the lanes and what a row costs: 16 ns for 16 elements of 4 bits on avx512.
// Numerics: IEEE division (or what rounds to the same integer), rounding to nearest even by adding
// 1.5 * 2^23; the same bits everywhere.
// Not handled: groups (to the caller they are rows, or calls).
#include "cpu/kernel_table.h"
#include "simd/elements.h"

namespace tilewright::ISA {
namespace {

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
  if (stride == 1 && n == kWidth) return store_bytes(p, v);
  int8_t q[kWidth];
  store_bytes(q, v);
  if (stride == 1) {
    memcpy(p, q, size_t(n));
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

// body(lane, n): n <= kWidth of the lanes [lane, lanes).
template <class Body>
TW_INLINE void for_lanes(int64_t lane, int64_t lanes, const Body& body) {
  for (; lane + kWidth <= lanes; lane += kWidth) body(lane, kWidth);
  if (lane < lanes) body(lane, int(lanes - lane));
}

// body(line, lane, n), all lines.
template <class Body>
TW_INLINE void for_vectors(const Lines& l, const Body& body) {
  for (int64_t line = 0; line < l.lines; ++line) {
    for_lanes(0, l.lanes, [&](int64_t lane, int n) { body(line, lane, n); });
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
    for_lanes(done, l.lanes, [&](int64_t lane, int n) {
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

// Rounds the whole vectors of a row, put(at, vectors) by put(at, vectors); returns how many lanes. The
// same bits without a division: with r = 1 / scale, x r is within 3 * 2^-24 * 256 of x / scale
// rounded, so that both round to one integer unless x r is nearer to a tie than that. Then it divides.
template <class T>
struct RowRounder {
  static constexpr float kTie = 0.5f - 0x1p-13f, kRound = 12582912.0f;
  const T* x;
  float scale, offset;
  Levels levels;

  template <int Vectors>
  TW_INLINE void round(int64_t at, float inverse, VecI (&rounded)[Vectors]) const {
    VecI farthest = {};  // from the integer, as the bits of a float: NaN is above all
#pragma GCC unroll 4
    for (int c = 0; c < Vectors; ++c) {
      const Vec v = load(x + at + c * kWidth) - offset;
      const Vec y = clamp(v * inverse, levels.low, levels.high), shifted = y + kRound;
      rounded[c] = as_int(shifted) - as_int(broadcast(kRound));
      const VecI distance = as_int(abs(y - (shifted - kRound)));
      farthest = distance > farthest ? distance : farthest;
    }
    if (!any(farthest >= as_int(broadcast(kTie)))) return;
    for (int c = 0; c < Vectors; ++c) {
      const Vec v = load(x + at + c * kWidth) - offset;
      rounded[c] = round_to_level(v, broadcast(scale), levels);
    }
  }
  template <class Put>
  TW_INLINE int64_t operator()(int64_t n, const Put& put) const {
    const float inverse = 1.0f / scale;
    if (!(inverse >= 0x1p-126f && inverse <= 0x1p126f)) return 0;  // subnormal, infinite or NaN
    int64_t at = 0;
    for (; at + kUnrolled * kWidth <= n; at += kUnrolled * kWidth) {
      VecI rounded[kUnrolled];
      round(at, inverse, rounded);
      put(at, rounded);
    }
    for (; at + kWidth <= n; at += kWidth) {
      VecI rounded[1];
      round(at, inverse, rounded);
      put(at, rounded);
    }
    return at;
  }
};

struct PutBytes {
  int8_t* q;
  template <int Vectors>
  TW_INLINE void operator()(int64_t at, const VecI (&v)[Vectors]) const {
#pragma GCC unroll 4
    for (int c = 0; c < Vectors; ++c) store_bytes(q + at + c * kWidth, v[c]);
  }
};

// Neighbouring lanes of two vectors as bytes.
TW_INLINE VecI paired(VecI first, VecI second) {
  const VecI low = __builtin_shuffle(first, second, 2 * lane_numbers());
  const VecI high = __builtin_shuffle(first, second, 2 * lane_numbers() + 1);
  return (low & 15) | (high << 4);
}

struct PutNibbles {
  int8_t* q;
  template <int Vectors>
  TW_INLINE void operator()(int64_t at, const VecI (&v)[Vectors]) const {
#pragma GCC unroll 2
    for (int c = 0; c + 1 < Vectors; c += 2) {
      store_bytes(q + (at + c * kWidth) / 2, paired(v[c], v[c + 1]));
    }
    if (Vectors == 1) store_strided(q + at / 2, 1, kWidth / 2, paired(v[0], VecI{}));
  }
};

// The whole vectors of a line by Put, where the line is a row and lies side by side in both arrays;
// returns how many lanes.
template <class Put, class T>
TW_INLINE int64_t put_row(const Rounder<T>& r, int64_t line, int8_t* q, int64_t stride) {
  if (r.l.scale_per_lane || r.stride != 1 || stride != 1) return 0;
  const RowRounder<T> row{r.src + line * r.step, r.scale[line], r.offset ? r.offset[line] : 0.0f,
                          r.levels};
  return row(r.l.lanes, Put{q});
}

void quantize(const Matrix& x, int64_t rows, int64_t cols, const float* scale, const float* offset,
              Levels levels, const Matrix& q) {
  const Lines l = lines_of(x, rows, cols);
  const auto dst = static_cast<int8_t*>(const_cast<void*>(q.data));
  const int64_t step = line_stride(q, l), stride = lane_stride(q, l);
  with_type(x, [&](const auto* p) {
    const Rounder rounded{p, line_stride(x, l), lane_stride(x, l), l, scale, offset, levels};
    for (int64_t line = 0; line < l.lines; ++line) {
      int8_t* const to = dst + line * step;
      const int64_t done = put_row<PutBytes>(rounded, line, to, stride);
      for_lanes(done, l.lanes, [&](int64_t lane, int n) {
        store_strided(to + lane * stride, stride, n, rounded(line, lane, n));
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
  const Lines bytes = byte_lines(l);
  for (int64_t line = 0; line < bytes.lines; ++line) {
    int8_t* const to = dst + line * step;
    const int64_t done = put_row<PutNibbles>(rounded, line, to, stride) / 2;
    for_lanes(done, bytes.lanes, [&](int64_t lane, int n) {
      VecI both;
      if (l.scale_per_lane) {
        const VecI low = rounded(2 * line, lane, n);
        const VecI high = 2 * line + 1 < l.lines ? rounded(2 * line + 1, lane, n) : VecI{};
        both = (low & 15) | (high << 4);
      } else {
        const int64_t left = l.lanes - 2 * lane;
        both = paired(rounded.padded(line, 2 * lane, left),
                      rounded.padded(line, 2 * lane + kWidth, left - kWidth));
      }
      store_strided(to + lane * stride, stride, n, both);
    });
  }
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
