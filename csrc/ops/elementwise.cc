// Activations and row sums: the argument rules.
#include "cpu/elementwise.h"

#include "core/check.h"
#include "core/device.h"
#include "core/dtype.h"
#include "core/scratch.h"
#include "core/trace.h"
#include "cpu/isa.h"
#include "cuda/kernels.h"

namespace tilewright {
namespace {

const char* name(Activation kind) {
  switch (kind) {
    case Activation::relu:
      return "relu";
    case Activation::gelu:
      return "gelu";
    case Activation::gelu_tanh:
      return "gelu_tanh";
    case Activation::silu:
      return "silu";
    case Activation::tanh:
      return "tanh";
    case Activation::sigmoid:
      return "sigmoid";
    default:
      return "activation";
  }
}

}  // namespace

void run(const ActivationForward& op) {
  const Check check{name(op.activation), Check::on_gpu_too};
  check.dtype("x", op.x, kFloats);
  check.output("out", op.y, kFloats);
  check.same_shape("out", op.y, op.x, "x");
  check.no_overlap("out", op.y, "x", op.x, true);
  if (op.x.size() == 0) return;
  const KernelTable& table = kernels();
  const Trace trace(check.op, level_of(op.x, table.isa), [&] { return format_shape(op.x); });
  if constexpr (kHasGpu) {
    if (on_gpu(op.x)) return cuda::activation_forward(op);
  }
  activation_forward(op, table);
}

void run(const ActivationBackward& op) {
  const Check check{name(op.activation), Check::on_gpu_too};
  check.dtype("x", op.x, kFloats);
  check.dtype("dy", op.dy, kFloats);
  check.same_shape("dy", op.dy, op.x, "x");
  check.output("dx", op.dx, kFloats);
  check.same_shape("dx", op.dx, op.x, "x");
  check.no_overlap("dx", op.dx, "x", op.x, true);
  check.no_overlap("dx", op.dx, "dy", op.dy, true);
  if (op.x.size() == 0) return;
  const KernelTable& table = kernels();
  const Trace trace(check.op, level_of(op.x, table.isa), [&] { return format_shape(op.x); });
  if constexpr (kHasGpu) {
    if (on_gpu(op.x)) return cuda::activation_backward(op);
  }
  activation_backward(op, table);
}

void run(const SumRows& op) {
  const Check check{"sum_rows", Check::on_gpu_too};
  check.dtype("x", op.x, kFloats);
  if (op.x.rank != 2) check.shape_error("x must have 2 axes, (rows, C), got " + format_shape(op.x));
  check.output("out", op.out, kFloats);
  check.shape("out", op.out, {op.x.shape[1]}, "to match the last axis of x", &op.x);
  check.no_overlap("out", op.out, "x", op.x);
  const int64_t C = op.x.shape[1];
  if (C == 0) return;
  const KernelTable& table = kernels();
  const Trace trace("sum_rows", level_of(op.x, table.isa), [&] { return format_shape(op.x); });
  if constexpr (kHasGpu) {
    if (on_gpu(op.x)) return cuda::sum_rows(op);
  }
  const Rows out(op.out, table.element);
  const Block all{0, 1, 0, C};
  const Scratch room(out.room(1, C));
  const FloatRows sums = out.open(all, room.as<float>());
  sum_rows(Rows(op.x, table.element), sums.data, table);
  out.close(all, sums);
}

void run(const Sum& op) {
  const Check check{"sum", Check::on_gpu_too};
  check.dtype("a", op.a, kFloats);
  check.output("out", op.out, kFloats);
  check.same_shape("out", op.out, op.a, "a");
  check.no_overlap("out", op.out, "a", op.a, true);
  if (op.b) {
    check.dtype("b", op.b, kFloats);
    check.same_shape("b", op.b, op.a, "a");
    check.no_overlap("out", op.out, "b", op.b, true);
  }
  if (op.a.size() == 0) return;
  const KernelTable& table = kernels();
  const Trace trace("sum", level_of(op.a, table.isa), [&] { return format_shape(op.a); });
  if constexpr (kHasGpu) {
    if (on_gpu(op.a)) return cuda::sum(op);
  }
  sum(op, table);
}

}  // namespace tilewright
