// Sizes of memory, from extents that a caller chose: a broadcast view has as many elements as it
// likes, and a product that wraps around would be allocated and then written past.
#pragma once
#include <stdint.h>

#include <initializer_list>
#include <new>

namespace tilewright {

// More bytes than any address space has, and far from what wraps around: a size that is no larger
// may be added to and multiplied by small numbers.
constexpr int64_t kMostBytes = int64_t(1) << 56;

// The product of factors >= 0; std::bad_alloc (Python's MemoryError) above kMostBytes.
inline int64_t product_of(std::initializer_list<int64_t> factors) {
  int64_t n = 1;
  bool fits = true;
  for (const int64_t f : factors) {
    if (f == 0) return 0;
    fits = fits && !__builtin_mul_overflow(n, f, &n) && n <= kMostBytes;
  }
  if (!fits) throw std::bad_alloc();
  return n;
}

}  // namespace tilewright
