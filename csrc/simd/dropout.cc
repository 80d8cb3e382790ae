// Dropout:  y[i] = word(first + i) >= threshold ? x[i] * scale : 0          (n,) contiguous
//
//     words  |-- kBuffer --|-- kBuffer --| …      made into a buffer in L1, then compared
//     x, y   |-- kBuffer --|-- kBuffer --| …
//
// Parameter   bounded by
// kBuffer     above: L1, beside x and y; below: the ragged ends of a range of words
//
// Bound by the generator: about 12 instructions an element on the lanes of the level.
// Numerics: one product; an element that is dropped is 0 even where x is not finite. Not handled:
// dtypes and strides (cpu/rowwise.h).
//
// Source: Srivastava, Hinton, Krizhevsky, Sutskever & Salakhutdinov (2014), scaled while training.
#include "cpu/kernel_table.h"
#include "simd/philox.h"

namespace tilewright::ISA {
namespace {

constexpr int64_t kBuffer = 512;

void apply(const DropoutRule& rule, uint64_t first, const float* x, float* y, int64_t n) {
  uint32_t words[kBuffer];
  for (int64_t i = 0; i < n; i += kBuffer) {
    const int64_t count = n - i < kBuffer ? n - i : kBuffer;
    philox_words(rule.seed, first + uint64_t(i), count, words);
    for (int64_t j = 0; j < count; j += kWidth) {  // words beyond count are of no lane that counts
      const int64_t lanes = count - j < kWidth ? count - j : kWidth;
      VecU w;
      memcpy(&w, words + j, sizeof w);
      store_n(y + i + j, keep(rule, w, load_n(x + i + j, lanes)), lanes);
    }
  }
}

}  // namespace

void fill_dropout(KernelTable& table) {
  table.dropout = {apply};
}

}  // namespace tilewright::ISA
