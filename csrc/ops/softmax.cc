// softmax and log_softmax: the argument rules.
#include "cpu/softmax.h"

#include "core/check.h"
#include "core/device.h"
#include "core/dtype.h"
#include "core/trace.h"
#include "cpu/isa.h"
#include "cuda/kernels.h"

namespace tilewright {
namespace {

Check check_of(bool log) {
  return Check{log ? "log_softmax" : "softmax", Check::on_gpu_too};
}

}  // namespace

void run(const SoftmaxForward& op) {
  const Check check = check_of(op.log);
  check.dtype("x", op.x, kFloats);
  check.rank("x", op.x, 1, "one of which sums to one");
  check.output("out", op.y, kFloats);
  check.same_shape("out", op.y, op.x, "x");
  check.no_overlap("out", op.y, "x", op.x, true);
  if (op.x.size() == 0) return;
  const KernelTable& table = kernels();
  const Trace trace(check.op, level_of(op.x, table.isa), [&] { return format_shape(op.x); });
  if constexpr (kHasGpu) {
    if (on_gpu(op.x)) return cuda::softmax_forward(op);
  }
  softmax_forward(op, table);
}

void run(const SoftmaxBackward& op) {
  const Check check = check_of(op.log);
  check.dtype("y", op.y, kFloats);
  check.rank("y", op.y, 1, "one of which sums to one");
  check.dtype("dy", op.dy, kFloats);
  check.same_shape("dy", op.dy, op.y, "y");
  check.output("dx", op.dx, kFloats);
  check.same_shape("dx", op.dx, op.y, "y");
  check.no_overlap("dx", op.dx, "y", op.y, true);
  check.no_overlap("dx", op.dx, "dy", op.dy, true);
  if (op.y.size() == 0) return;
  const KernelTable& table = kernels();
  const Trace trace(op.log ? "log_softmax_backward" : "softmax_backward", level_of(op.y, table.isa),
                    [&] { return format_shape(op.y); });
  if constexpr (kHasGpu) {
    if (on_gpu(op.y)) return cuda::softmax_backward(op);
  }
  softmax_backward(op, table);
}

}  // namespace tilewright
