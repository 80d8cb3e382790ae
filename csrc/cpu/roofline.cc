#include "cpu/roofline.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "core/check.h"
#include "core/parallel.h"
#include "cpu/gemm.h"
#include "cpu/isa.h"

namespace tilewright {
namespace {

constexpr Check check{"roofline"};
constexpr double kParallel = 1e9;  // always worth waking the workers: that is what is measured

std::atomic<float> g_sink;  // results end here, so that no loop is optimised away

void check_buffer(const char* arg, const View& v) {
  check.dtype(arg, v, {DType::f32});
  if (!v.contiguous()) check.shape_error(std::string(arg) + " must be contiguous");
}

int64_t piece(int64_t size, int64_t tasks, int64_t t) {
  return size / tasks * t;
}

// Bytes that copying all of x to y took: reads and writes.
template <class Copy>
double copy_pieces(const View& x, const View& y, int64_t tasks, int64_t repeats, Copy copy) {
  check_buffer("x", x);
  check_buffer("y", y);
  check.same_shape("y", y, x, "x");
  const int64_t n = x.size() / tasks;
  parallel_for(tasks, kParallel, [&](int64_t t) {
    const int64_t at = piece(x.size(), tasks, t);
    for (int64_t r = 0; r < repeats; ++r) copy(x.ptr<float>() + at, y.ptr<float>() + at, n);
  });
  return double(tasks) * double(repeats) * double(n) * 8;
}

}  // namespace

double roofline_multiply_add(int64_t tasks, int64_t steps) {
  const RooflineKernels& k = kernels().roofline;
  parallel_for(tasks, kParallel, [&](int64_t) { g_sink = k.multiply_add(steps); });
  return double(tasks) * double(steps) * double(k.flops_per_step);
}

double roofline_multiply_add_int8(int64_t tasks, int64_t steps) {
  const RooflineKernels& k = kernels().roofline;
  parallel_for(tasks, kParallel, [&](int64_t) { g_sink = k.multiply_add_int8(steps); });
  return double(tasks) * double(steps) * double(k.int8_ops_per_step);
}

double roofline_multiply_add_bf16(int64_t tasks, int64_t steps) {
  const RooflineKernels& k = kernels().roofline;
  if (!k.multiply_add_bf16) return 0;
  parallel_for(tasks, kParallel, [&](int64_t) { g_sink = k.multiply_add_bf16(steps); });
  return double(tasks) * double(steps) * double(k.bf16_flops_per_step);
}

double roofline_read(const View& x, int64_t tasks, int64_t repeats) {
  check_buffer("x", x);
  const RooflineKernels& k = kernels().roofline;
  const int64_t n = x.size() / tasks;
  parallel_for(tasks, kParallel, [&](int64_t t) {
    for (int64_t r = 0; r < repeats; ++r)
      g_sink = k.read(x.ptr<float>() + piece(x.size(), tasks, t), n);
  });
  return double(tasks) * double(repeats) * double(n) * 4;
}

double roofline_copy(const View& x, const View& y, int64_t tasks, int64_t repeats) {
  return copy_pieces(x, y, tasks, repeats, kernels().roofline.copy);
}

double roofline_copy_streaming(const View& x, const View& y, int64_t tasks, int64_t repeats) {
  return copy_pieces(x, y, tasks, repeats, kernels().roofline.copy_streaming);
}

double time_gemm(const View& a, const View& b, const View& out, int64_t repeats) {
  check_buffer("a", a);
  check_buffer("b", b);
  check_buffer("out", out);
  check.rank("a", a, 2, "(M, K)");
  check.shape("b", b, {a.shape[1], b.last()}, "to multiply a", &a);
  check.shape("out", out, {a.shape[0], b.shape[1]}, "to hold a @ b");
  const auto matrix = [](const View& v) {
    return Matrix{v.data, v.dtype, v.stride[0], v.stride[1]};
  };
  Gemm p{a.shape[0], b.shape[1], a.shape[1], matrix(a), matrix(b), nullptr, {}};
  p.epilogue.out = matrix(out);
  const GemmKernels& g = kernels().gemm_f32;
  const auto start = std::chrono::steady_clock::now();
  for (int64_t r = 0; r < repeats; ++r) gemm(p, g);
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
  return taken.count() / double(std::max<int64_t>(repeats, 1));
}

}  // namespace tilewright
