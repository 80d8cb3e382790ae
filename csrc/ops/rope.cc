// rope: the argument rules.
#include "cpu/rope.h"

#include "core/check.h"
#include "core/device.h"
#include "core/dtype.h"
#include "core/trace.h"
#include "cpu/isa.h"
#include "cuda/kernels.h"

namespace tilewright {
namespace {

const Check check{"rope", Check::on_gpu_too};

// (T, R/2), or (B, T, R/2) for x (B, ..., T, D), R <= D.
void check_table(const char* arg, const View& table, const View& x) {
  check.dtype(arg, table, kFloats);
  const int64_t T = x.shape[x.rank - 2], D = x.last(), half = table.last();
  const bool batched = table.rank == 3 && x.rank >= 3;
  const bool fits = (table.rank == 2 || batched) && table.shape[table.rank - 2] == T &&
                    2 * half <= D && (!batched || table.shape[0] == x.shape[0]);
  if (fits) return;
  check.shape_error(std::string(arg) +
                    " must have shape (T, R/2) or (B, T, R/2) with R <= D, for x " +
                    "(B, ..., T, D) " + format_shape(x) + ", got " + format_shape(table));
}

}  // namespace

void run(const Rope& op) {
  check.dtype("x", op.x, kFloats);
  check.rank("x", op.x, 2, "(..., T, D)");
  check_table("cos", op.cos, op.x);
  check_table("sin", op.sin, op.x);
  check.same_shape("sin", op.sin, op.cos, "cos");
  check.output("out", op.y, kFloats);
  check.same_shape("out", op.y, op.x, "x");
  check.no_overlap("out", op.y, "x", op.x, true);
  check.no_overlap("out", op.y, "cos", op.cos);
  check.no_overlap("out", op.y, "sin", op.sin);
  if (op.x.size() == 0) return;
  const KernelTable& table = kernels();
  const Trace trace("rope", level_of(op.x, table.isa), [&] { return format_shape(op.x); });
  if constexpr (kHasGpu) {
    if (on_gpu(op.x)) return cuda::rope(op);
  }
  rope(op, table);
}

}  // namespace tilewright
