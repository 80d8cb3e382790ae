// Packing into words that are pairs of neighbours along K: bytes widened to 16 bits, bytes as they are
// (words of 16 bits), or bfloat16.
//
//   panel (kc, width)   word [k][i] = (x[i][2 k], x[i][2 k + 1])
//
// As in pack.h a panel of A and one of B differ in which stride runs along a line.
#pragma once
#include "simd/dot_s8.h"
#include "simd/pack.h"

namespace tilewright::ISA {
namespace {

// 2 kWidth elements of 16 bits as they are.
TW_INLINE VecP load_pairs(const uint16_t* p) {
  VecP pairs;
  memcpy(&pairs, p, sizeof pairs);  // 16-bit elements may lie at any even address
  return pairs;
}

TW_INLINE void put(uint32_t* words, VecP pairs) {
  memcpy(words, &pairs, sizeof pairs);
}
TW_INLINE void put(uint16_t* words, VecP pairs) {
  const VecB bytes = __builtin_convertvector(pairs, VecB);
  memcpy(words, &bytes, sizeof bytes);
}
TW_INLINE void put_one(uint32_t* word, int first, int second) {
  *word = uint32_t(uint16_t(first)) | uint32_t(second) << 16;
}
TW_INLINE void put_one(uint16_t* word, int first, int second) {
  *word = uint16_t(uint8_t(first) | uint16_t(second) << 8);
}

// Neighbours along the panel are contiguous: two rows of K, interleaved. Returns how many words of
// the line were written.
template <class T, class Word>
TW_INLINE int pack_line(const T* first, const T* second, int count, Word* words) {
  typedef T VecT __attribute__((vector_size(kWidth)));
  int i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    VecT lo, hi = {};
    memcpy(&lo, first + i, sizeof lo);
    if (second) memcpy(&hi, second + i, sizeof hi);
    const VecI low = __builtin_convertvector(lo, VecI), high = __builtin_convertvector(hi, VecI);
    put(words + i, (VecP)((low & 0xffff) | high << 16));
  }
  for (; i < count; ++i) put_one(words + i, first[i], second ? second[i] : 0);
  return count;
}

// The same for pairs of bytes: interleaved as they are.
template <class T>
TW_INLINE int pack_line(const T* first, const T* second, int count, uint16_t* words) {
  typedef int8_t Bytes __attribute__((vector_size(kWidth)));
  Bytes low_half, high_half;
  for (int i = 0; i < kWidth / 2; ++i) {
    low_half[2 * i] = int8_t(i), low_half[2 * i + 1] = int8_t(kWidth + i);
    high_half[2 * i] = int8_t(kWidth / 2 + i),
                  high_half[2 * i + 1] = int8_t(kWidth + kWidth / 2 + i);
  }
  int i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    Bytes lo, hi = {};
    memcpy(&lo, first + i, sizeof lo);
    if (second) memcpy(&hi, second + i, sizeof hi);
    const Bytes left = __builtin_shuffle(lo, hi, low_half);
    const Bytes right = __builtin_shuffle(lo, hi, high_half);
    memcpy(words + i, &left, sizeof left);
    memcpy(words + i + kWidth / 2, &right, sizeof right);
  }
  for (; i < count; ++i) put_one(words + i, first[i], second ? second[i] : 0);
  return count;
}

// Pairs of 16 bits.
TW_INLINE int pack_line(const uint16_t* first, const uint16_t* second, int count, uint32_t* words) {
  int i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    VecH low, high = {};
    memcpy(&low, first + i, sizeof low);
    if (second) memcpy(&high, second + i, sizeof high);
    put(words + i,
        (VecP)(__builtin_convertvector(low, VecU) | __builtin_convertvector(high, VecU) << 16));
  }
  for (; i < count; ++i) put_one(words + i, first[i], second ? second[i] : 0);
  return count;
}

// K is contiguous: kWidth words of up to kWidth lines, transposed. Writes kWidth words a line.
template <class T, class Word>
TW_INLINE void pack_block(const T* src, int64_t line, int count, Word* words, int width) {
  Vec r[kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) r[i] = i < count ? (Vec)load_pairs(src + i * line) : Vec{};
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) put(words + i * width, (VecP)r[i]);
}

// kc lines of `width` words, the first `count` of each from the matrix, the others zero. `left` is
// how many elements of K there are from src on: the last pair may be half a pair.
template <class T, class Word>
void pack_words(const T* src, int64_t line, int64_t step, int width, int count, int64_t kc,
                int64_t left, Word* panel) {
  const int64_t whole = left / 2 < kc ? left / 2 : kc;  // words of which both elements exist
  int64_t k = 0;
  if (step == 1 && line != 1) {
    for (; k + kWidth <= whole; k += kWidth) {
      for (int i = 0; i < width; i += kWidth) {
        const int n = count - i < 0 ? 0 : count - i < kWidth ? count - i : kWidth;
        pack_block(src + i * line + 2 * k, line, n, panel + k * width + i, width);
      }
    }
  }
  for (; k < kc; ++k) {
    const T* first = src + 2 * k * step;
    const T* second = k < whole ? first + step : nullptr;
    Word* words = panel + k * width;
    int i = 0;
    if (line == 1) {
      i = pack_line(first, second, count, words);
    } else {
      for (; i < count; ++i) put_one(words + i, first[i * line], second ? second[i * line] : 0);
    }
    for (; i < width; ++i) words[i] = 0;
  }
}

}  // namespace
}  // namespace tilewright::ISA
