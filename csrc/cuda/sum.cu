// Sums of two arrays, and copies:
//
//     out = a + b                            out = a
//
// a, b, out: (...), any strides and float dtypes; out may be a or b. A thread takes an element;
// neighbouring lanes take neighbours, so a warp reads whole sectors. Bound by memory, 3 or 2 elements
// each.
//
// Numerics: float32, one rounding at the end: the bits are the CPU's.
#include "cuda/each.h"
#include "cuda/kernels.h"

namespace tilewright::cuda {
namespace {

template <class Element>
__global__ void sum_kernel(Array a, Array b, Array out, std::int64_t n) {
  const std::int64_t i = each_index();
  if (i >= n) return;
  float x = a.load<Element>(a.offset(i));
  if (b) x += b.load<Element>(b.offset(i));
  out.store<Element>(out.offset(i), x);
}

}  // namespace

void sum(const Sum& op) {
  with_element({&op.a, &op.b, &op.out}, [&](auto element) {
    launch_each("sum", sum_kernel<decltype(element)>, op.a.size(), array_of(op.a), array_of(op.b),
                array_of(op.out), op.a.size());
  });
}

}  // namespace tilewright::cuda
