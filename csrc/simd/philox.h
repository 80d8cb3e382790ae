// Philox4x32-10: random words as a function of a seed and a position, nothing kept between calls.
//
//   element n -> word n % 4 of the block with counter (n / 4 low, n / 4 high, 0, 0), key = seed
//
//   a round       (c0, c1, c2, c3) -> (hi(B c2) ^ c1 ^ k0, lo(B c2), hi(A c0) ^ c3 ^ k1, lo(A c0))
//                 k0 += W0, k1 += W1 after each of 10
//
//   lanes         c0 c1 c2 c3 | c0 c1 c2 c3 | …       kWidth / 4 blocks in a vector: its words come
//                                                     out in the order of the elements
//
// One product of even lanes gives lo and hi of A c0 and of B c2; a shuffle puts them in their
// places, a shift brings c1 and c3 to theirs: five instructions a round and vector.
//
// Parameter    bounded by
// kPhilox      below: latency, a round is a chain of about 8 cycles; above: registers (generic has
//              16, a block needs one and a temporary)
//
// The words are the same on every level, and for any split of a range. Not handled: counters whose
// upper 64 bits are not 0, but for tests.
//
// Source: Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011).
#pragma once
#include "cpu/kernels_dropout.h"
#include "simd/vec.h"

namespace tilewright::ISA {
namespace {

typedef uint64_t VecL __attribute__((vector_size(kWidth * 4)));

constexpr int kPhilox = 4;                      // vectors side by side
constexpr int kPhiloxWords = kPhilox * kWidth;  // made at a time

// Lanes a b c d a b c d …
TW_INLINE VecU repeat4(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const uint32_t four[] = {a, b, c, d};
  VecU v;
  for (int i = 0; i < kWidth; ++i) v[i] = four[i % 4];
  return v;
}

// Counters to words, in place.
TW_INLINE void philox(VecU (&c)[kPhilox], uint64_t seed) {
  const VecI factors = (VecI)repeat4(0xD2511F53, 0, 0xCD9E8D57, 0);
  const VecU step = repeat4(0x9E3779B9, 0, 0xBB67AE85, 0);
  VecU key = repeat4(uint32_t(seed), 0, uint32_t(seed >> 32), 0);
  for (int round = 0; round < 10; ++round, key += step) {
#pragma GCC unroll 4
    for (int v = 0; v < kPhilox; ++v) {
      const VecI products = multiply_even((VecI)c[v], factors);
      const VecU swapped = (VecU)__builtin_shuffle(products, lane_numbers() ^ 3);
      c[v] = swapped ^ (VecU)((VecL)c[v] >> 32) ^ key;
    }
  }
}

// The words of kPhilox vectors of blocks, from block number `block` on.
TW_INLINE void philox_blocks(uint64_t seed, uint64_t block, VecU (&words)[kPhilox]) {
  VecL lane;
  for (int i = 0; i < kWidth / 2; ++i) lane[i] = i % 2 ? 0 : uint64_t(i / 2);
  for (int v = 0; v < kPhilox; ++v) {
    const VecL first = VecL{} + (block + uint64_t(v * kWidth / 4));
    words[v] = (VecU)((first + lane) & (VecL)repeat4(~0u, ~0u, 0, 0));
  }
  philox(words, seed);
}

// words (n,): of elements first, first + 1, …
TW_INLINE void philox_words(uint64_t seed, uint64_t first, int64_t n, uint32_t* words) {
  uint64_t block = first / 4;
  for (int64_t i = -int64_t(first % 4); i < n; i += kPhiloxWords, block += kPhiloxWords / 4) {
    VecU made[kPhilox];
    philox_blocks(seed, block, made);
    if (i >= 0 && n - i >= kPhiloxWords) {
      memcpy(words + i, made, sizeof made);
    } else {
      const int64_t skip = i < 0 ? -i : 0;
      const int64_t end = n - i < kPhiloxWords ? n - i : kPhiloxWords;
      memcpy(words + i + skip, reinterpret_cast<const uint32_t*>(made) + skip,
             size_t(end - skip) * 4);
    }
  }
}

// v * scale where the lane's word says so, else 0, whatever v is.
TW_INLINE Vec keep(const DropoutRule& rule, VecU words, Vec v) {
  const VecI kept = (VecI)(words >= rule.threshold);
  return rule.scale > 0.0f ? select(kept, v * rule.scale, Vec{}) : Vec{};
}

}  // namespace
}  // namespace tilewright::ISA
