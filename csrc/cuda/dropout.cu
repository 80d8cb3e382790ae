// y = x scale where the element is kept, else 0: element n, in row-major order, is kept where its
// word of Philox4x32-10 (philox.h) is at least round(p 2^32). scale = 1 / (1 - p).
//
// x, y: (...), any strides and float dtypes.
//
//     thread i   | 4i  4i+1  4i+2  4i+3 |     the four elements whose words one block holds: ten
//                                             rounds for four elements. Lanes are 16 bytes apart;
//                                             the four accesses share sectors through the cache
//
// Bound by memory, 2 elements each, or by the integer products of the rounds: 5 an element.
// Numerics: one product, one rounding. What is dropped is 0 even where x is NaN.
#include "cuda/each.h"
#include "cuda/kernels.h"
#include "cuda/philox.h"

namespace tilewright::cuda {
namespace {

constexpr int kBlockWords = 4;

template <class Element>
__global__ void dropout_kernel(Array x, Array y, std::int64_t n, Dropping rule) {
  Philox philox(rule);
  const std::int64_t first = each_index() * kBlockWords;
  for (std::int64_t i = first; i < min(n, first + kBlockWords); ++i) {
    const bool kept = philox.keeps(static_cast<std::uint64_t>(i));
    const float value = kept ? x.load<Element>(x.offset(i)) * rule.scale : 0.0f;
    y.store<Element>(y.offset(i), value);
  }
}

}  // namespace

void dropout(const Dropout& op) {
  const std::int64_t n = op.x.size();
  with_element({&op.x, &op.y}, [&](auto element) {
    launch_each("dropout", dropout_kernel<decltype(element)>, (n + kBlockWords - 1) / kBlockWords,
                array_of(op.x), array_of(op.y), n, dropping(op.p, op.seed));
  });
}

}  // namespace tilewright::cuda
