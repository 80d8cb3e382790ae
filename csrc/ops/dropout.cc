// dropout: the argument rules.
#include "cpu/dropout.h"

#include "core/check.h"
#include "core/device.h"
#include "core/dtype.h"
#include "core/trace.h"
#include "cpu/isa.h"
#include "cuda/kernels.h"

namespace tilewright {
namespace {

const Check check{"dropout", Check::on_gpu_too};

}  // namespace

void run(const Dropout& op) {
  check.dtype("x", op.x, kFloats);
  if (!(op.p >= 0.0 && op.p <= 1.0)) {
    check.shape_error("p must be in [0, 1], a probability, got " + std::to_string(op.p));
  }
  check.output("out", op.y, kFloats);
  check.same_shape("out", op.y, op.x, "x");
  check.no_overlap("out", op.y, "x", op.x, true);
  if (op.x.size() == 0) return;
  const KernelTable& table = kernels();
  const Trace trace("dropout", level_of(op.x, table.isa), [&] { return format_shape(op.x); });
  if constexpr (kHasGpu) {
    if (on_gpu(op.x)) return cuda::dropout(op);
  }
  dropout(op, table);
}

}  // namespace tilewright
