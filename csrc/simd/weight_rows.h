// Constant weights as they are kept, row by row as floats: integers of 8 or 4 bits with their scales, or
// floats of 16 bits. A line of words holds two rows of B (cpu/kernels_weights.h).
//
// Each struct has for_rows(): body(panel, odd, row) for the rows [k, end) of B in `Panels` panels side by
// side, each kVectors vectors of floats; rows of one line follow each other, and ahead a line is fetched
// for each line. in_order(): a vector of the columns' order, of one in the order that the rows came in.
#pragma once
#include "cpu/kernels_weights.h"
#include "simd/tile.h"

namespace tilewright::ISA {
namespace {

// --- integers: columns in two vectors, the even ones and the odd ones ----------------------------

// Every other column of NR, from the first or the second on; and back.
TW_INLINE Vec every_other(const float* p, int first) {
  return __builtin_shuffle(load(p), load(p + kWidth), lane_numbers() * 2 + first);
}
TW_INLINE Vec alternating(Vec even, Vec odd, int half) {
  const VecI lane = lane_numbers() + half * kWidth;
  return __builtin_shuffle(even, odd, (lane >> 1) + (lane & 1) * kWidth);
}

// A line of words, two columns in each lane.
template <int Bits>
TW_INLINE VecI load_line(const char* p) {
  if constexpr (Bits == 4) return widen(reinterpret_cast<const int16_t*>(p));
  VecI words;
  memcpy(&words, p, sizeof words);
  return words;
}

// The integers of a line of words as floats, of row k + odd and the columns of parity v: brought down,
// with their sign, and converted.
template <int Bits, bool Shifted, bool kByLogic = kWidth == 16>
struct Integers {
  Vec shift;

  TW_INLINE explicit Integers(int added) : shift(broadcast(float(added))) {}
  TW_INLINE Vec of(VecI words, int odd, int v) const {
    const Vec q = to_float(words << (32 - (2 * v + odd + 1) * Bits) >> (32 - Bits));
    return Shifted ? q + shift : q;
  }
};

// With logic of three operands it takes two instructions instead of three: in the mantissa of the power
// of two at which they count 1, their sign flipped, they are that power + half + q, exactly, and so is
// the difference q. Nibbles of even rows take one: a vector holds all there are.
template <int Bits, bool Shifted>
struct Integers<Bits, Shifted, true> {
  static constexpr int kHalf = 1 << (Bits - 1);
  Vec zero[2], table;

  TW_INLINE explicit Integers(int shift) {
    zero[0] = broadcast(float((1 << 23) + kHalf - shift));
    zero[1] = broadcast(float((1 << (23 - Bits)) + kHalf - shift));
    if constexpr (Bits == 4) table = to_float((lane_numbers() ^ kHalf) - kHalf + shift);
  }
  TW_INLINE Vec of(VecI words, int odd, int v) const {
    constexpr int kMask = (1 << Bits) - 1;
    const int at = odd * Bits, power = (127 + 23 - at) << 23;
    words = words >> (2 * v * Bits);
    if (Bits == 4 && !odd) return __builtin_shuffle(table, words);
    return as_float(and_xor(words, kMask << at, power | kHalf << at)) - zero[odd];
  }
};

// A group's scales and offsets of a panel: of even columns, of odd ones.
template <bool Offset>
struct Scales {
  Vec scale[kVectors], offset[kVectors];

  TW_INLINE void load_group(const WeightPanel& w, int64_t at, int64_t ahead) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      scale[v] = every_other(w.scale + at, v);
      if (Offset) offset[v] = w.offset ? every_other(w.offset + at, v) : Vec{};
      __builtin_prefetch(w.scale + at + v * kWidth + ahead);
      if (Offset && w.offset) __builtin_prefetch(w.offset + at + v * kWidth + ahead);
    }
  }
  TW_INLINE Vec times(Vec q, int v) const {
    return Offset ? fma_once(q, scale[v], offset[v]) : q * scale[v];
  }
};

template <int Bits, bool Offset>
struct Quantized {
  template <int Panels, class Body>
  static void for_rows(const WeightPanel& w, int64_t k, int64_t end, const WeightAhead& ahead,
                       const Body& body);
  TW_INLINE static Vec in_order(const Vec (&row)[kVectors], int v) {
    return alternating(row[0], row[1], v);
  }
};

template <int Bits, bool Offset>
template <int Panels, class Body>
TW_INLINE void Quantized<Bits, Offset>::for_rows(const WeightPanel& w, int64_t k, int64_t end,
                                                 const WeightAhead& ahead, const Body& body) {
  constexpr int64_t kLine = NR * Bits / 4;
  const int64_t panel = w.lines * kLine;
  const char* from = w.words + (k >> 1) * kLine;
  const Integers<Bits, Offset> integers(w.shift);
  Scales<Offset> scales[Panels];
  const auto rows = [&](bool even, bool odd) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) {
      const VecI words = load_line<Bits>(from + p * panel);
      __builtin_prefetch(from + p * panel + ahead.words);
      const auto row = [&](int r) __attribute__((always_inline)) {
        Vec line[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) line[v] = scales[p].times(integers.of(words, r, v), v);
        body(p, r, line);
      };
      if (even) row(0);
      if (odd) row(1);
    }
    if (odd) from += kLine;
  };
  for (int64_t group = k / w.group; k < end; ++group) {
    const int64_t next = (group + 1) * w.group, stop = next < end ? next : end;
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) {
      scales[p].load_group(w, group * w.ld + p * NR, ahead.scales);
    }
    if (k % 2) rows(false, true), ++k;
    for (; k + 1 < stop; k += 2) rows(true, true);
    if (k < stop) rows(true, false), ++k;
  }
}

// --- floats of 16 bits: columns in their order ---------------------------------------------------

// Two rows of a panel. bfloat16: a word is a pair along K, and each half of it the upper half of a float.
// float16: one row after the other, for the instruction that widens a vector of them.
template <class T>
struct Line;
template <>
struct Line<Bf16> {
  VecU words[kVectors];

  TW_INLINE explicit Line(const char* p) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) memcpy(&words[v], p + v * kWidth * 4, sizeof words[v]);
  }
  TW_INLINE Vec of(int odd, int v) const {
    return (Vec)(odd ? words[v] & 0xffff0000u : words[v] << 16);
  }
};
template <>
struct Line<F16> {
  const F16* rows;

  TW_INLINE explicit Line(const char* p) : rows(reinterpret_cast<const F16*>(p)) {}
  TW_INLINE Vec of(int odd, int v) const { return load(rows + odd * NR + v * kWidth); }
};

template <class T>
struct Halves {
  template <int Panels, class Body>
  static void for_rows(const WeightPanel& w, int64_t k, int64_t end, const WeightAhead& ahead,
                       const Body& body);
  TW_INLINE static Vec in_order(const Vec (&row)[kVectors], int v) { return row[v]; }
};

template <class T>
template <int Panels, class Body>
TW_INLINE void Halves<T>::for_rows(const WeightPanel& w, int64_t k, int64_t end,
                                   const WeightAhead& ahead, const Body& body) {
  constexpr int64_t kLine = NR * 4;
  const int64_t panel = w.lines * kLine;
  const char* from = w.words + (k >> 1) * kLine;
  const auto rows = [&](bool odd) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) {
      const char* const at = from + p * panel;
      const Line<T> line(at);
      // Into the second cache: the first would not keep it so long (it took 3 to 7 % longer).
      for (int64_t i = 0; i < kLine; i += 64) __builtin_prefetch(at + ahead.words + i, 0, 2);
      const auto row = [&](int r) __attribute__((always_inline)) {
        Vec floats[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) floats[v] = line.of(r, v);
        body(p, r, floats);
      };
      row(0);
      if (odd) row(1);
    }
  };
  for (; k + 1 < end; k += 2, from += kLine) rows(true);
  if (k < end) rows(false);
}

// f(how the panel's words are read).
template <class F>
TW_INLINE void with_words(const WeightPanel& w, const F& f) {
  const bool offset = w.offset || w.shift;
  if (w.bits == 16) return w.floats == DType::bf16 ? f(Halves<Bf16>{}) : f(Halves<F16>{});
  if (w.bits == 8) return offset ? f(Quantized<8, true>{}) : f(Quantized<8, false>{});
  return offset ? f(Quantized<4, true>{}) : f(Quantized<4, false>{});
}

}  // namespace
}  // namespace tilewright::ISA
