// loss = (x - y)^2, for each element or reduced, and its gradient dx = scale dloss (x - y).
//
// x, y, dx: (...), any strides and float dtypes; dloss: () or (...), which is read on the device.
//
//     elements  | kRun a block | kRun a block | ..      a block adds its run in double, and one
//     sums      |      s0      |      s1      | ..      block then adds the sums of all
//
// Bound by memory, 2 elements each.
//
// Numerics: x - y and its square are float32, sums double in one fixed order: no atomics. One
// rounding at the end.
#include "cuda/kernels.h"
#include "cuda/sums.h"

namespace tilewright::cuda {
namespace {

template <class Element>
__device__ float difference(const Array& x, const Array& y, std::int64_t i) {
  return x.load<Element>(x.offset(i)) - y.load<Element>(y.offset(i));
}

template <class Element>
__global__ void mse_squares_kernel(Array x, Array y, Array loss, std::int64_t n) {
  const std::int64_t i = each_index();
  if (i >= n) return;
  const float d = difference<Element>(x, y, i);
  loss.store<float>(loss.offset(i), d * d);
}

template <class Element>
__global__ void mse_sum_kernel(Array x, Array y, double* sums, std::int64_t n) {
  double sum = 0;
  for_run(blockIdx.x, n, [&](std::int64_t i) {
    const float d = difference<Element>(x, y, i);
    sum += static_cast<double>(d * d);
  });
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ void mse_total_kernel(const double* sums, std::int64_t count, float* loss,
                                 double divisor) {
  const double sum = block_sum(thread_sum(sums, count));
  if (threadIdx.x == 0) *loss = static_cast<float>(sum / divisor);  // 0 / 0: the mean of nothing
}

template <class Element>
__global__ void mse_backward_kernel(Array x, Array y, Array dloss, Array dx, float scale,
                                    std::int64_t n) {
  const std::int64_t i = each_index();
  if (i >= n) return;
  const float up = dloss.load<Element>(dloss.axes > 0 ? dloss.offset(i) : 0);
  dx.store<Element>(dx.offset(i), scale * up * difference<Element>(x, y, i));
}

}  // namespace

void mse_forward(const MseForward& op) {
  const std::int64_t n = op.x.size();
  with_element({&op.x, &op.y}, [&](auto element) {
    using Element = decltype(element);
    const Array x = array_of(op.x), y = array_of(op.y);
    if (op.reduction == Reduction::none) {
      launch_each("mse_squares", mse_squares_kernel<Element>, n, x, y, array_of(op.loss), n);
      return;
    }
    const std::int64_t blocks = runs_of(n);
    const gpu::Workspace sums(static_cast<std::size_t>(blocks) * sizeof(double));
    launch_sum("mse_sum", mse_sum_kernel<Element>, blocks, x, y, sums.as<double>(), n);
    const double divisor = op.reduction == Reduction::mean ? static_cast<double>(n) : 1.0;
    launch_sum("mse_total", mse_total_kernel, 1, sums.as<double>(), blocks, op.loss.ptr<float>(),
               divisor);
  });
}

void mse_backward(const MseBackward& op) {
  with_element({&op.x, &op.y, &op.dloss, &op.dx}, [&](auto element) {
    launch_each("mse_backward", mse_backward_kernel<decltype(element)>, op.x.size(), array_of(op.x),
                array_of(op.y), array_of(op.dloss), array_of(op.dx), op.scale, op.x.size());
  });
}

}  // namespace tilewright::cuda
