// layernorm and rmsnorm: the argument rules.
#include "cpu/layernorm.h"

#include "core/check.h"
#include "core/device.h"
#include "core/dtype.h"
#include "core/trace.h"
#include "cpu/isa.h"
#include "cuda/kernels.h"

namespace tilewright {
namespace {

void check_vector(const Check& check, const char* arg, const View& v, const View& x) {
  if (!v) return;
  check.dtype(arg, v, kFloats);
  check.shape(arg, v, {x.last()}, "to match the last axis of x", &x);
}

void check_like_x(const Check& check, const char* arg, const View& v, const View& x) {
  check.dtype(arg, v, kFloats);
  check.same_shape(arg, v, x, "x");
}

// One float32 for each row, contiguous: made by the op file.
void check_statistic(const Check& check, const char* arg, const View& v, const View& x) {
  check.dtype(arg, v, {DType::f32});
  const int64_t rows = x.last() > 0 ? x.size() / x.last() : 0;
  if (rows > 0 && (v.size() != rows || !v.contiguous())) {
    check.shape_error(std::string(arg) + " must be a contiguous array of one element for each of " +
                      std::to_string(rows) + " rows, got shape " + format_shape(v));
  }
}

void check_result(const Check& check, const char* arg, const View& v, const LayernormForward& op) {
  check.output(arg, v, kFloats);
  check.same_shape(arg, v, op.x, "x");
  check.no_overlap(arg, v, "x", op.x, true);
  check.no_overlap(arg, v, "residual", op.residual, true);
  check.no_overlap(arg, v, "gamma", op.gamma);
  check.no_overlap(arg, v, "beta", op.beta);
}

}  // namespace

void run(const LayernormForward& op) {
  const Check check{op.centred ? "layernorm" : "rmsnorm", Check::on_gpu_too};
  check.dtype("x", op.x, kFloats);
  check.rank("x", op.x, 1, "the last of which is normalised");
  check_vector(check, "gamma", op.gamma, op.x);
  check_vector(check, "beta", op.beta, op.x);
  if (!(op.eps >= 0)) {
    check.shape_error("eps must not be negative, got " + std::to_string(op.eps));
  }
  check_result(check, "out", op.y, op);
  if (op.residual) {
    check_like_x(check, "residual", op.residual, op.x);
    check_result(check, "out[1]", op.s, op);
    check.no_overlap("out[0]", op.y, "out[1]", op.s);
  }
  if (op.mean) check_statistic(check, "mean", op.mean, op.x);
  if (op.rstd) check_statistic(check, "rstd", op.rstd, op.x);
  if (op.x.size() == 0) return;
  const KernelTable& table = kernels();
  const Trace trace(check.op, level_of(op.x, table.isa), [&] { return format_shape(op.x); });
  if constexpr (kHasGpu) {
    if (on_gpu(op.x)) return cuda::layernorm_forward(op);
  }
  layernorm_forward(op, table);
}

void run(const LayernormBackward& op) {
  const Check check{op.mean ? "layernorm" : "rmsnorm", Check::on_gpu_too};
  check.dtype("x", op.s, kFloats);
  check.rank("x", op.s, 1, "the last of which is normalised");
  check_vector(check, "gamma", op.gamma, op.s);
  check_vector(check, "dgamma", op.dgamma, op.s);
  check_vector(check, "dbeta", op.dbeta, op.s);
  if (op.mean) check_statistic(check, "mean", op.mean, op.s);
  check_statistic(check, "rstd", op.rstd, op.s);
  check_like_x(check, "dy", op.dy, op.s);
  if (op.ds) check_like_x(check, "ds", op.ds, op.s);
  check.output("dx", op.dx, kFloats);
  check.same_shape("dx", op.dx, op.s, "x");
  check.no_overlap("dx", op.dx, "x", op.s, true);
  check.no_overlap("dx", op.dx, "dy", op.dy, true);
  if (op.s.last() == 0) return;
  const KernelTable& table = kernels();
  const Trace trace(op.mean ? "layernorm_backward" : "rmsnorm_backward", level_of(op.s, table.isa),
                    [&] { return format_shape(op.s); });
  if constexpr (kHasGpu) {
    if (on_gpu(op.s)) return cuda::layernorm_backward(op);
  }
  layernorm_backward(op, table);
}

}  // namespace tilewright
