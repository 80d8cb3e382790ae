// cross_entropy: the argument rules.
#include "core/check.h"
#include "core/device.h"
#include "core/dtype.h"
#include "core/scratch.h"
#include "core/size.h"
#include "core/trace.h"
#include "cpu/cross_entropy.h"
#include "cpu/isa.h"
#include "cuda/kernels.h"
#include "ops/ids.h"

namespace tilewright {
namespace {

const Check check{"cross_entropy", Check::on_gpu_too};

// Class ids, shaped like logits without the last axis; or probabilities, like logits. The options
// are those of both passes.
template <class Op>
void check_arguments(const Op& op) {
  const View &logits = op.logits, &target = op.target;
  check.dtype("logits", logits, kFloats);
  check.rank("logits", logits, 1, "the last of which holds the classes");
  check.dtype("target", target, {DType::s32, DType::s64, DType::f32, DType::bf16, DType::f16});
  if (is_float(target.dtype)) {
    check.shape("target", target, logits.shape, logits.rank,
                "to match logits, as probabilities do,", &logits);
    if (op.ignore_index >= 0) {
      check.unsupported("ignore_index must be negative where target holds probabilities, got " +
                        std::to_string(op.ignore_index));
    }
  } else {
    check.shape("target", target, logits.shape, logits.rank - 1,
                "to match logits without the last axis", &logits);
  }
  if (op.weight) {
    check.dtype("weight", op.weight, kFloats);
    check.shape("weight", op.weight, {logits.last()}, "to match the classes of logits", &logits);
  }
  if (!(op.label_smoothing >= 0.0f && op.label_smoothing <= 1.0f)) {
    check.shape_error("label_smoothing must be in [0, 1], got " +
                      std::to_string(op.label_smoothing));
  }
}

// Also where there are no classes.
int64_t rows_of(const View& logits) {
  int64_t rows = 1;
  for (int d = 0; d < logits.rank - 1; ++d) rows *= logits.shape[d];
  return rows;
}

void check_lse(const View& lse, const View& logits) {
  check.dtype("lse", lse, {DType::f32});
  const int64_t rows = rows_of(logits);
  if (lse.size() != rows || (rows > 0 && !lse.contiguous())) {
    check.shape_error("lse must be a contiguous array of " + std::to_string(rows) +
                      " elements, got shape " + format_shape(lse));
  }
}

void check_scale(const View& scale) {
  check.dtype("scale", scale, {DType::f32});
  check.shape("scale", scale, {}, "for one number");
}

// Of ids that nobody reads before the kernel does, this is known: there is none without classes.
void check_classes(const View& target, int64_t C) {
  if (C > 0 || is_float(target.dtype) || target.size() == 0) return;
  check.shape_error("target must name classes of logits, got logits without classes");
}

// The ids in `room`; nullptr for probabilities.
const int64_t* read_targets(const View& target, int64_t C, int64_t ignore_index,
                            const Scratch& room) {
  if (is_float(target.dtype)) return nullptr;
  read_ids(check, "target", target, C, "the classes of logits, or ignore_index", &ignore_index,
           room.as<int64_t>());
  return room.as<int64_t>();
}

// A loss for each row: shaped like logits without the last axis.
void check_losses(const char* arg, const View& v, const View& logits) {
  check.shape(arg, v, logits.shape, logits.rank - 1, "to match logits without the last axis",
              &logits);
}

}  // namespace

void run(const CrossEntropyForward& op) {
  check_arguments(op);
  check.output("out", op.loss, {DType::f32});
  if (op.reduction == Reduction::none) {
    check_losses("out", op.loss, op.logits);
  } else {
    check.shape("out", op.loss, {}, "for one number");
  }
  check.no_overlap("out", op.loss, "logits", op.logits);
  check.no_overlap("out", op.loss, "target", op.target);
  check.no_overlap("out", op.loss, "weight", op.weight);
  if (op.lse) check_lse(op.lse, op.logits);
  if (op.scale) check_scale(op.scale);
  if (op.scale && op.reduction != Reduction::mean) check.unsupported("scale is that of a mean");
  if constexpr (kHasGpu) {
    if (on_gpu(op.logits)) {
      check_classes(op.target, op.logits.last());
      const Trace trace("cross_entropy", kGpuLevel, [&] { return format_shape(op.logits); });
      return cuda::cross_entropy_forward(op);
    }
  }
  const Scratch room(product_of({op.target.size(), 8}));
  const int64_t* targets = read_targets(op.target, op.logits.last(), op.ignore_index, room);
  const KernelTable& table = kernels();
  const Trace trace("cross_entropy", table.isa, [&] { return format_shape(op.logits); });
  cross_entropy_forward(op, targets, table);
}

void run(const CrossEntropyBackward& op) {
  check_arguments(op);
  check_lse(op.lse, op.logits);
  if (op.scale) check_scale(op.scale);
  check.dtype("dloss", op.dloss, kFloats);
  if (op.dloss.rank > 0) check_losses("dloss", op.dloss, op.logits);
  check.output("dlogits", op.dlogits, kFloats);
  check.same_shape("dlogits", op.dlogits, op.logits, "logits");
  check.no_overlap("dlogits", op.dlogits, "logits", op.logits, true);
  if (op.logits.size() == 0) return;
  if constexpr (kHasGpu) {
    if (on_gpu(op.logits)) {
      const Trace trace("cross_entropy_backward", kGpuLevel,
                        [&] { return format_shape(op.logits); });
      return cuda::cross_entropy_backward(op);
    }
  }
  const Scratch room(product_of({op.target.size(), 8}));
  const int64_t* targets = read_targets(op.target, op.logits.last(), op.ignore_index, room);
  const KernelTable& table = kernels();
  const Trace trace("cross_entropy_backward", table.isa, [&] { return format_shape(op.logits); });
  cross_entropy_backward(op, targets, table);
}

}  // namespace tilewright
