// Optimizer steps: the argument rules.
#include "cpu/optim.h"

#include <cmath>

#include "core/check.h"
#include "core/device.h"
#include "core/dtype.h"
#include "core/trace.h"
#include "cpu/isa.h"
#include "cuda/kernels.h"

namespace tilewright {
namespace {

std::string item(const char* list, int64_t i) {
  return std::string(list) + "[" + std::to_string(i) + "]";
}

void check_list(const Check& check, const char* name, const ViewList& list, const ViewList& params,
                std::initializer_list<DType> dtypes, bool written) {
  if (list.size != params.size) {
    check.shape_error(std::string(name) + " must have " + std::to_string(params.size) +
                      " tensors to match params, got " + std::to_string(list.size));
  }
  for (int64_t i = 0; i < list.size; ++i) {
    const std::string arg = item(name, i);
    check.dtype(arg.c_str(), list[i], dtypes);
    if (written) check.output(arg.c_str(), list[i], dtypes);
    check.same_shape(arg.c_str(), list[i], params[i], item("params", i).c_str());
    if (list[i].device != params[0].device) {
      throw DeviceError(std::string(check.op) + ": " + arg +
                        " must be in the memory of the first tensor, the GPU's or the CPU's");
    }
  }
}

std::string tensors(const ViewList& list) {
  return std::to_string(list.size) + " tensors";
}

bool on_gpu(const ViewList& list) {
  return list.size > 0 && on_gpu(list[0]);
}
const char* level_of(const ViewList& list, const char* isa) {
  return on_gpu(list) ? kGpuLevel : isa;
}

// State beside the parameters: float32, written; absent where the list may be.
void check_state(const Check& check, const char* name, const ViewList& list, const ViewList& params,
                 bool optional = false) {
  if (list.size || !optional) check_list(check, name, list, params, {DType::f32}, true);
}

void check_params(const Check& check, const ViewList& params, const ViewList& grads) {
  check_list(check, "params", params, params, kFloats, true);
  check_list(check, "grads", grads, params, kFloats, false);
}

}  // namespace

void run(const Adam& op) {
  const Check check{"adam_step", Check::on_gpu_too};
  check_params(check, op.params, op.grads);
  check_state(check, "m", op.m, op.params);
  check_state(check, "v", op.v, op.params);
  check_state(check, "largest", op.largest, op.params, true);
  if (op.step < 1) {
    check.shape_error("step must be at least 1, got " + std::to_string(op.step));
  }
  const KernelTable& table = kernels();
  const Trace trace(check.op, level_of(op.params, table.isa), [&] { return tensors(op.params); });
  if constexpr (kHasGpu) {
    if (on_gpu(op.params)) return cuda::adam_step(op);
  }
  adam_step(op, table);
}

void run(const Sgd& op) {
  const Check check{"sgd_step", Check::on_gpu_too};
  check_params(check, op.params, op.grads);
  check_state(check, "velocity", op.velocity, op.params, op.momentum == 0);
  const KernelTable& table = kernels();
  const Trace trace(check.op, level_of(op.params, table.isa), [&] { return tensors(op.params); });
  if constexpr (kHasGpu) {
    if (on_gpu(op.params)) return cuda::sgd_step(op);
  }
  sgd_step(op, table);
}

void run(const Rmsprop& op) {
  const Check check{"rmsprop_step", Check::on_gpu_too};
  check_params(check, op.params, op.grads);
  check_state(check, "square", op.square, op.params);
  check_state(check, "mean", op.mean, op.params, true);
  check_state(check, "velocity", op.velocity, op.params, op.momentum == 0);
  const KernelTable& table = kernels();
  const Trace trace(check.op, level_of(op.params, table.isa), [&] { return tensors(op.params); });
  if constexpr (kHasGpu) {
    if (on_gpu(op.params)) return cuda::rmsprop_step(op);
  }
  rmsprop_step(op, table);
}

void run(const ScaleTensors& op) {
  const Check check{"scale_tensors", Check::on_gpu_too};
  check_list(check, "tensors", op.tensors, op.tensors, kFloats, true);
  const KernelTable& table = kernels();
  const Trace trace(check.op, level_of(op.tensors, table.isa), [&] { return tensors(op.tensors); });
  if constexpr (kHasGpu) {
    if (on_gpu(op.tensors)) return cuda::scale_tensors(op);
  }
  scale_tensors(op, table);
}

double run(const SumSquares& op) {
  const Check check{"sum_squares", Check::on_gpu_too};
  check_list(check, "tensors", op.tensors, op.tensors, kFloats, false);
  const KernelTable& table = kernels();
  const Trace trace(check.op, level_of(op.tensors, table.isa), [&] { return tensors(op.tensors); });
  if constexpr (kHasGpu) {
    if (on_gpu(op.tensors)) return cuda::sum_squares(op);
  }
  return sum_squares(op, table);
}

void run(const ClipNorm& op) {
  const Check check{"clip_grad_norm_", Check::on_gpu_too};
  check.output("norm", op.norm, {DType::f64});
  check.shape("norm", op.norm, {}, "for one number");
  if constexpr (kHasGpu) {
    if (on_gpu(op.norm)) {
      check_list(check, "tensors", op.tensors, op.tensors, kFloats, true);
      if (op.tensors.size > 0 && !on_gpu(op.tensors)) {
        throw DeviceError("clip_grad_norm_: norm must be in the CPU's memory, as tensors are");
      }
      const Trace trace(check.op, kGpuLevel, [&] { return tensors(op.tensors); });
      return cuda::clip_norm(op);
    }
  }
  const double norm = std::sqrt(run(SumSquares{op.tensors}));
  *op.norm.ptr<double>() = norm;
  const double scale = op.max_norm / (norm + 1e-6);
  if (!(scale >= 1.0)) run(ScaleTensors{op.tensors, scale});
}

}  // namespace tilewright
