// Activations and their gradients, elementwise:
//
//     y = activation(x)                      dx = dy activation'(x)
//
// x, y, dy, dx: (...), any strides and float dtypes. A thread takes an element; neighbouring lanes
// take neighbours, so a warp reads whole sectors. Bound by memory, 2 or 3 elements each.
//
// Numerics: float32, one rounding at the end; the functions and their errors are those of
// csrc/simd/activation.h.
#include "cuda/activation.h"
#include "cuda/each.h"
#include "cuda/kernels.h"

namespace tilewright::cuda {
namespace {

// e^-|x| / (1 + e^-|x|) and 1 / (1 + e^-|x|): of sigmoid(x) and 1 - sigmoid(x) one each.
struct Logistic {
  float small, larger;
};
__device__ inline Logistic logistic(float x) {
  const float e = exp_exact(-fabsf(x)), larger = 1.0f / (1.0f + e);
  return {e * larger, larger};
}

// Phi(x) + x phi(x), one Gaussian for both.
__device__ inline float gelu_slope(float x) {
  const float magnitude = fabsf(x), a = magnitude > 15.0f ? 15.0f : magnitude;
  const float tail = times_gaussian(1.0f, a) * fmaf(a, -0.39894228f, mills_ratio(a));
  return x > 0.0f ? 1.0f - tail : tail;
}

// s + x s (1 - s) z', where s = sigmoid(z), z = 2 sqrt(2/pi) (x + 0.044715 x^3).
__device__ inline float gelu_tanh_slope(float x) {
  const float z = 1.59576912f * (x * fmaf(x * x, 0.044715f, 1.0f));
  const Logistic l = logistic(z);
  const float steep = 1.59576912f * x * fmaf(x * x, 3 * 0.044715f, 1.0f);
  return fmaf(steep * l.small, l.larger, z < 0.0f ? l.small : l.larger);
}

__device__ inline float sigmoid_slope(float x) {
  const Logistic l = logistic(x);
  return l.small * l.larger;
}

__device__ inline float silu_slope(float x) {
  const Logistic l = logistic(x);
  return fmaf(x * l.small, l.larger, x < 0.0f ? l.small : l.larger);
}

__device__ inline float slope(Activation kind, float x) {
  switch (kind) {
    case Activation::relu:
      return x > 0.0f ? 1.0f : 0.0f;
    case Activation::gelu:
      return gelu_slope(x);
    case Activation::gelu_tanh:
      return gelu_tanh_slope(x);
    case Activation::silu:
      return silu_slope(x);
    case Activation::tanh:
      return 4.0f * sigmoid_slope(2.0f * x);
    case Activation::sigmoid:
      return sigmoid_slope(x);
    default:
      return 1.0f;
  }
}

template <class Element>
__global__ void activation_forward_kernel(Array x, Array y, std::int64_t n, Activation kind) {
  const std::int64_t i = each_index();
  if (i >= n) return;
  y.store<Element>(y.offset(i), activate(kind, x.load<Element>(x.offset(i))));
}

template <class Element>
__global__ void activation_backward_kernel(Array x, Array dy, Array dx, std::int64_t n,
                                           Activation kind) {
  const std::int64_t i = each_index();
  if (i >= n) return;
  const float d = dy.load<Element>(dy.offset(i));
  dx.store<Element>(dx.offset(i), d * slope(kind, x.load<Element>(x.offset(i))));
}

}  // namespace

void activation_forward(const ActivationForward& op) {
  with_element({&op.x, &op.y}, [&](auto element) {
    launch_each("activation_forward", activation_forward_kernel<decltype(element)>, op.x.size(),
                array_of(op.x), array_of(op.y), op.x.size(), op.activation);
  });
}

void activation_backward(const ActivationBackward& op) {
  with_element({&op.x, &op.dy, &op.dx}, [&](auto element) {
    launch_each("activation_backward", activation_backward_kernel<decltype(element)>, op.x.size(),
                array_of(op.x), array_of(op.dy), array_of(op.dx), op.x.size(), op.activation);
  });
}

}  // namespace tilewright::cuda
