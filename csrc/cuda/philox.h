// Dropout's random words on the GPU: Philox4x32-10, the same numbers as simd/philox.h.
//
//     block n / 4 of the counter, key = seed  ->  4 words; element n has word n % 4
//
// A thread keeps the block that it made last: neighbouring elements cost one.
//
// Source: Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011).
#pragma once
#include <cmath>

#include "cuda/gpu/gpu.h"

namespace tilewright::cuda {

// Element n is kept, and multiplied by `scale`, where its word is at least `threshold`.
struct Dropping {
  std::uint64_t seed = 0;
  std::uint32_t threshold = 0;  // round(p * 2^32); 0: everything is kept
  float scale = 1.0f;           // 1 / (1 - p); 0 where nothing is kept

  __host__ __device__ explicit operator bool() const { return threshold > 0; }
};

inline Dropping dropping(double p, std::uint64_t seed) {
  const double threshold = std::nearbyint(p * 4294967296.0);
  if (threshold > 4294967295.0) return {seed, UINT32_MAX, 0.0f};
  return {seed, static_cast<std::uint32_t>(threshold), static_cast<float>(1.0 / (1.0 - p))};
}

class Philox {
 public:
  __device__ explicit Philox(const Dropping& rule) : rule_(rule) {}

  __device__ bool keeps(std::uint64_t n) {
    if (!made_ || n / 4 != block_) make(n / 4);
    const int i = static_cast<int>(n % 4);
    const std::uint32_t word =
        i < 2 ? (i == 0 ? words_[0] : words_[1]) : (i == 2 ? words_[2] : words_[3]);
    return word >= rule_.threshold && rule_.scale > 0.0f;
  }

 private:
  __device__ void make(std::uint64_t block) {
    std::uint32_t c[4] = {static_cast<std::uint32_t>(block),
                          static_cast<std::uint32_t>(block >> 32), 0, 0};
    std::uint32_t k0 = static_cast<std::uint32_t>(rule_.seed);
    std::uint32_t k1 = static_cast<std::uint32_t>(rule_.seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const std::uint32_t a = c[0], b = c[2];
      c[0] = __umulhi(0xCD9E8D57u, b) ^ c[1] ^ k0;
      c[2] = __umulhi(0xD2511F53u, a) ^ c[3] ^ k1;
      c[1] = 0xCD9E8D57u * b;
      c[3] = 0xD2511F53u * a;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < 4; ++i) words_[i] = c[i];
    block_ = block, made_ = true;
  }

  Dropping rule_;
  bool made_ = false;
  std::uint64_t block_ = 0;
  std::uint32_t words_[4] = {};
};

}  // namespace tilewright::cuda
