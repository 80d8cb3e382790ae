// Optimizer steps over lists of tensors, their scaling, and the sum of their squares. The formulas
// are those of simd/optim.cc, operation for operation:
//
//     adam      m, v, largest, p                sgd       velocity, p
//     rmsprop   square, mean, velocity, p       scale     x = factor x
//                                               clip      x = min(1, most / norm) x
//
//     tensors   | t0 t0 t0 | t1 | t2 t2 |      a launch takes many tensors without gaps: a table of
//     blocks    |  0  1  2 |  3 |  4  5 |      them in its parameters says where the blocks of each
//                                              begin. A tensor with gaps has a launch of its own.
//
// Parameter      bounded by
// kMostTensors   the 4096 bytes that the parameters of a kernel may have
// kRun           sums.h: elements of a block
//
// Bound by memory: every operand is read once and written once, adam moves 7 arrays.
// Numerics: float32, IEEE division and root: the bits are the CPU's. The sum of squares is double,
// in an order that follows from the list alone.
#include <cmath>

#include "cuda/elements.h"
#include "cuda/kernels.h"
#include "cuda/sums.h"

namespace tilewright::cuda {
namespace {

constexpr int kMostLists = 5;  // that a step walks
constexpr int kMostTensors = 56;

// --- tensors of a launch; lists of which a tensor has no part are absent there

// For the elements of this block: f(element), where element.load(k) and element.store(k, value) are
// those of list k.
struct ManyTensors {
  struct Tensor {
    void* data[kMostLists];
    std::int64_t size;
    std::int32_t first_block;
    DType dtype[kMostLists];
  };
  struct Element {
    const Tensor& of;
    std::int64_t i;
    __device__ bool has(int k) const { return of.data[k] != nullptr; }
    __device__ float load(int k) const { return get_float(of.data[k], i, of.dtype[k]); }
    __device__ void store(int k, float x) const { put_float(of.data[k], i, of.dtype[k], x); }
  };

  int count = 0;
  Tensor tensors[kMostTensors];

  template <class F>
  __device__ void for_elements(const F& f) const {
    const int block = static_cast<int>(blockIdx.x);
    int t = 0;
    while (t + 1 < count && block >= tensors[t + 1].first_block) ++t;
    const Tensor& tensor = tensors[t];
    for_run(block - tensor.first_block, tensor.size,
            [&](std::int64_t i) { f(Element{tensor, i}); });
  }
};

struct OneTensor {
  struct Element {
    const OneTensor& of;
    std::int64_t i;
    __device__ bool has(int k) const { return static_cast<bool>(of.lists[k]); }
    __device__ float load(int k) const { return of.lists[k].load<Mixed>(of.lists[k].offset(i)); }
    __device__ void store(int k, float x) const {
      of.lists[k].store<Mixed>(of.lists[k].offset(i), x);
    }
  };

  std::int64_t size;
  Array lists[kMostLists];

  template <class F>
  __device__ void for_elements(const F& f) const {
    for_run(blockIdx.x, size, [&](std::int64_t i) { f(Element{*this, i}); });
  }
};

// launch(tensors, their blocks, blocks before them) until all tensors of the lists are done.
template <class Launch>
void for_tensors(std::initializer_list<const ViewList*> lists, const Launch& launch) {
  ManyTensors many;
  std::int64_t before = 0, blocks = 0;
  const auto flush = [&] {
    if (many.count > 0) launch(many, blocks, before);
    before += blocks;
    blocks = many.count = 0;
  };
  for (std::int64_t i = 0; i < (*lists.begin())->size; ++i) {
    const std::int64_t size = (**lists.begin())[i].size(), own = runs_of(size);
    if (size == 0) continue;
    OneTensor one;
    ManyTensors::Tensor tensor{};
    bool dense = true;
    int k = 0;
    for (const ViewList* list : lists) {
      const View v = list->size > 0 ? (*list)[i] : View{};
      dense = dense && (!v || v.contiguous());
      one.lists[k] = array_of(v);
      tensor.data[k] = v.data, tensor.dtype[k++] = v.dtype;
    }
    if (!dense) {
      flush();
      one.size = size;
      launch(one, own, before);
      before += own;
      continue;
    }
    if (many.count == kMostTensors || blocks + own > INT32_MAX) flush();
    tensor.size = size, tensor.first_block = static_cast<std::int32_t>(blocks);
    many.tensors[many.count++] = tensor;
    blocks += own;
  }
  flush();
}

// Without decay p is not touched: an infinite parameter must not spoil the gradient.
__device__ inline float with_decay(float grad, float decay, float p) {
  return decay == 0 ? grad : fmaf(p, decay, grad);
}

// --- steps: a functor for an element of the lists

// Of params, m, v, largest, grads.
struct AdamStep {
  float grad_scale, beta1, rest1, beta2, rest2, keep, decay, rate, root, eps;

  template <class Element>
  __device__ void operator()(const Element& e) const {
    const float old = e.load(0);
    const float grad = with_decay(e.load(4) * grad_scale, decay, old);
    const float mean = fmaf(e.load(1), beta1, rest1 * grad);
    const float square = fmaf(e.load(2), beta2, rest2 * grad * grad);
    float below = square;
    if (e.has(3)) {
      below = larger(e.load(3), square);
      e.store(3, below);
    }
    const float step = mean / fmaf(sqrtf(below), root, eps);
    e.store(1, mean);
    e.store(2, square);
    e.store(0, fmaf(step, -rate, keep * old));
  }
};

// Of params, velocity, grads.
struct SgdStep {
  float lr, momentum, rest, decay, grad_scale;
  bool nesterov;

  template <class Element>
  __device__ void operator()(const Element& e) const {
    const float old = e.load(0);
    const float grad = with_decay(e.load(2) * grad_scale, decay, old);
    float step = grad;
    if (e.has(1)) {
      step = fmaf(e.load(1), momentum, rest * grad);
      e.store(1, step);
      if (nesterov) step = fmaf(step, momentum, grad);
    }
    e.store(0, fmaf(step, -lr, old));
  }
};

// Of params, square, mean, velocity, grads.
struct RmspropStep {
  float lr, alpha, rest, eps, decay, momentum, grad_scale;

  template <class Element>
  __device__ void operator()(const Element& e) const {
    const float old = e.load(0);
    const float grad = with_decay(e.load(4) * grad_scale, decay, old);
    float below = fmaf(e.load(1), alpha, rest * grad * grad);
    e.store(1, below);
    if (e.has(2)) {
      const float average = fmaf(e.load(2), alpha, rest * grad);
      e.store(2, average);
      below = larger(fmaf(-average, average, below), 0);
    }
    float step = grad / (sqrtf(below) + eps);
    if (e.has(3)) {
      step = fmaf(e.load(3), momentum, step);
      e.store(3, step);
    }
    e.store(0, fmaf(step, -lr, old));
  }
};

struct Scale {
  float factor;

  template <class Element>
  __device__ void operator()(const Element& e) const {
    e.store(0, e.load(0) * factor);
  }
};

// By a norm that only the device knows.
struct ScaleToNorm {
  const double* norm;
  double most;

  template <class Element>
  __device__ void operator()(const Element& e) const {
    const double factor = most / (*norm + 1e-6);
    if (!(factor >= 1)) e.store(0, e.load(0) * static_cast<float>(factor));
  }
};

template <class Tensors, class Step>
__global__ void step_kernel(const __grid_constant__ Tensors tensors, Step step) {
  tensors.for_elements([&](auto element) { step(element); });
}

template <class Step>
void launch_step(const char* name, std::initializer_list<const ViewList*> lists, Step step) {
  static_assert(sizeof(ManyTensors) + sizeof(Step) <= gpu::kMaxParameterBytes);
  for_tensors(lists, [&]<class T>(const T& tensors, std::int64_t blocks, std::int64_t) {
    gpu::launch(name, step_kernel<T, Step>, dim3(static_cast<unsigned>(blocks)), dim3(kEachBlock),
                0, gpu::current_stream(), tensors, step);
  });
}

// sums[block] = the sum of squares of a block's elements.
template <class Tensors>
__global__ void squares_kernel(const __grid_constant__ Tensors tensors, double* sums) {
  double sum = 0;
  tensors.for_elements([&](auto element) {
    const auto x = static_cast<double>(element.load(0));
    sum += x * x;
  });
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ void squares_total_kernel(const double* sums, std::int64_t count, double* total) {
  const double sum = block_sum(thread_sum(sums, count));
  if (threadIdx.x == 0) *total = sum;
}

__global__ void norm_kernel(const double* total, double* norm) {
  *norm = sqrt(*total);
}

// The sum of the squares of all elements, on the device, for as long as this lives.
class SquaresOf {
 public:
  explicit SquaresOf(const ViewList& list)
      : blocks_(blocks_of(list)), room_(static_cast<std::size_t>(blocks_ + 1) * sizeof(double)) {
    double* const sums = room_.as<double>() + 1;
    for_tensors({&list}, [&]<class T>(const T& tensors, std::int64_t blocks, std::int64_t from) {
      launch_sum("sum_squares", squares_kernel<T>, blocks, tensors, sums + from);
    });
    launch_sum("sum_squares_total", squares_total_kernel, 1, sums, blocks_, room_.as<double>());
  }
  const double* total() const { return room_.as<double>(); }

 private:
  static std::int64_t blocks_of(const ViewList& list) {
    std::int64_t all = 0;
    for (std::int64_t i = 0; i < list.size; ++i) all += runs_of(list[i].size());
    return all;
  }

  const std::int64_t blocks_;
  const gpu::Workspace room_;
};

float rounded(double x) {
  return static_cast<float>(x);
}

}  // namespace

void adam_step(const Adam& op) {
  const double correction1 = 1 - std::pow(op.beta1, static_cast<double>(op.step));
  const double correction2 = 1 - std::pow(op.beta2, static_cast<double>(op.step));
  launch_step(
      "adam_step", {&op.params, &op.m, &op.v, &op.largest, &op.grads},
      AdamStep{rounded(op.grad_scale), rounded(op.beta1), rounded(1 - op.beta1), rounded(op.beta2),
               rounded(1 - op.beta2), rounded(op.decoupled ? 1 - op.lr * op.weight_decay : 1.0),
               rounded(op.decoupled ? 0.0 : op.weight_decay), rounded(op.lr / correction1),
               rounded(1 / std::sqrt(correction2)), rounded(op.eps)});
}

void sgd_step(const Sgd& op) {
  launch_step("sgd_step", {&op.params, &op.velocity, &op.grads},
              SgdStep{rounded(op.lr), rounded(op.momentum), rounded(1 - op.dampening),
                      rounded(op.weight_decay), rounded(op.grad_scale), op.nesterov});
}

void rmsprop_step(const Rmsprop& op) {
  launch_step("rmsprop_step", {&op.params, &op.square, &op.mean, &op.velocity, &op.grads},
              RmspropStep{rounded(op.lr), rounded(op.alpha), rounded(1 - op.alpha), rounded(op.eps),
                          rounded(op.weight_decay), rounded(op.momentum), rounded(op.grad_scale)});
}

void scale_tensors(const ScaleTensors& op) {
  launch_step("scale_tensors", {&op.tensors}, Scale{rounded(op.factor)});
}

double sum_squares(const SumSquares& op) {
  return gpu::read_number(SquaresOf(op.tensors).total());
}

void clip_norm(const ClipNorm& op) {
  const SquaresOf squares(op.tensors);
  auto* const norm = op.norm.ptr<double>();
  gpu::launch("norm", norm_kernel, dim3(1), dim3(1), 0, gpu::current_stream(), squares.total(),
              norm);
  launch_step("clip_norm", {&op.tensors}, ScaleToNorm{norm, op.max_norm});
}

}  // namespace tilewright::cuda
