// mse: the argument rules.
#include "cpu/mse.h"

#include "core/check.h"
#include "core/device.h"
#include "core/dtype.h"
#include "core/trace.h"
#include "cpu/isa.h"
#include "cuda/kernels.h"

namespace tilewright {
namespace {

const Check check{"mse", Check::on_gpu_too};

void check_operands_of(const View& x, const View& y) {
  check.dtype("x", x, kFloats);
  check.dtype("y", y, kFloats);
  check.same_shape("y", y, x, "x");
}

}  // namespace

void run(const MseForward& op) {
  check_operands_of(op.x, op.y);
  check.output("out", op.loss, {DType::f32});
  if (op.reduction == Reduction::none) {
    check.same_shape("out", op.loss, op.x, "x");
  } else {
    check.shape("out", op.loss, {}, "for one number");
  }
  check.no_overlap("out", op.loss, "x", op.x, true);
  check.no_overlap("out", op.loss, "y", op.y, true);
  if (op.x.size() == 0 && op.reduction == Reduction::none) return;
  const KernelTable& table = kernels();
  const Trace trace("mse", level_of(op.x, table.isa), [&] { return format_shape(op.x); });
  if constexpr (kHasGpu) {
    if (on_gpu(op.x)) return cuda::mse_forward(op);
  }
  mse_forward(op, table);
}

void run(const MseBackward& op) {
  check_operands_of(op.x, op.y);
  check.dtype("dloss", op.dloss, kFloats);
  if (op.dloss.rank > 0) check.same_shape("dloss", op.dloss, op.x, "x");
  check.output("dx", op.dx, kFloats);
  check.same_shape("dx", op.dx, op.x, "x");
  check.no_overlap("dx", op.dx, "x", op.x, true);
  check.no_overlap("dx", op.dx, "y", op.y, true);
  if (op.x.size() == 0) return;
  const KernelTable& table = kernels();
  const Trace trace("mse_backward", level_of(op.x, table.isa), [&] { return format_shape(op.x); });
  if constexpr (kHasGpu) {
    if (on_gpu(op.x)) return cuda::mse_backward(op);
  }
  mse_backward(op, table);
}

}  // namespace tilewright
