// quantize and dequantize: the shape rules.
#include "cpu/quantize.h"

#include <algorithm>
#include <string>

#include "core/check.h"
#include "core/dtype.h"
#include "core/trace.h"
#include "cpu/isa.h"
#include "tilewright/ops.h"

namespace tilewright {
namespace {

// What quantize and dequantize have in common: `like` in integers beside its scales and offsets.
struct Parts {
  const Check& check;
  const View& like;
  const char* like_name;
  int axis, along;
  int64_t group;

  void check_axes() const {
    const auto axis_error = [&](const char* name, int got) {
      check.shape_error(std::string(name) + " must be below the " + std::to_string(like.rank) +
                        " axes of " + like_name + ", got " + std::to_string(got));
    };
    if (axis >= like.rank) axis_error("axis", axis);
    if (group == 0) return;
    if (along < 0 || along >= like.rank) axis_error("along", along);
    if (group < 0) check.shape_error("group must be positive, got " + std::to_string(group));
    if (like.rank == 1 ? axis >= 0 : like.rank != 2 || axis != 1 - along) {
      check.unsupported(
          "groups need an array of one axis, or of two and a scale for each index of "
          "the other one; got axis " +
          std::to_string(axis) + " of " + std::string(like_name) + " " + format_shape(like));
    }
  }
  // One number; one for each index of `axis`; with groups like the array, but groups along `along`.
  void check_scale(const char* name, const View& v) const {
    check.dtype(name, v, {DType::f32});
    if (group > 0) {
      int64_t want[kMaxRank];
      for (int d = 0; d < like.rank; ++d) want[d] = like.shape[d];
      want[along] = groups();
      return check.shape(name, v, want, like.rank, "for its groups");
    }
    if (axis < 0) return check.shape(name, v, {}, "for one scale");
    check.shape(name, v, {like.shape[axis]}, "for one scale an index of the kept axis");
  }
  int64_t groups() const { return (like.shape[along] + group - 1) / group; }

  // Group g of an array shaped like `like`.
  View slice(const View& v, int64_t g) const {
    View part = v;
    const int64_t begin = g * group;
    part.shape[along] = std::min(group, v.shape[along] - begin);
    part.data = v.ptr<char>() + begin * v.stride[along] * dtype_size(v.dtype);
    return part;
  }
  // Its scales or offsets.
  View slice_scale(const View& v, int64_t g) const {
    if (!v) return v;
    View part = v;
    part.data = v.ptr<float>() + g * v.stride[along];
    part.rank = like.rank - 1;
    if (axis >= 0) part.shape[0] = v.shape[axis], part.stride[0] = v.stride[axis];
    return part;
  }
};

}  // namespace

void run(const Quantize& op) {
  const Check check{"quantize"};
  check.dtype("x", op.x, kFloats);
  if (op.bits != 8 && op.bits != 4) {
    check.unsupported("bits must be 8 or 4, got " + std::to_string(op.bits));
  }
  check.output("data", op.data, {op.offset ? DType::u8 : DType::s8});
  check.same_shape("data", op.data, op.x, "x");
  const Parts parts{check, op.x, "x", op.axis, op.along, op.group};
  parts.check_axes();
  for (const View* v : {&op.scale, &op.offset}) {
    if (v == &op.offset && !*v) continue;
    const char* const name = v == &op.scale ? "scale" : "offset";
    parts.check_scale(name, *v);
    check.output(name, *v, {DType::f32});
    check.no_overlap(name, *v, "x", op.x);
  }
  check.no_overlap("data", op.data, "x", op.x);
  const KernelTable& table = kernels();
  const Trace trace("quantize", table.isa, [&] { return format_shape(op.x); });
  if (op.group == 0) {
    return cpu::quantize(op.x, op.axis, op.bits, op.data, op.scale, op.offset, table.quantize);
  }
  for (int64_t g = 0; g < parts.groups(); ++g) {
    cpu::quantize(parts.slice(op.x, g), op.axis, op.bits, parts.slice(op.data, g),
                  parts.slice_scale(op.scale, g), parts.slice_scale(op.offset, g), table.quantize);
  }
}

void run(const Dequantize& op) {
  const Check check{"dequantize"};
  check.dtype("data", op.data, {DType::s8, DType::u8});
  const Parts parts{check, op.data, "data", op.axis, op.along, op.group};
  parts.check_axes();
  parts.check_scale("scale", op.scale);
  if (op.offset) parts.check_scale("offset", op.offset);
  check.output("out", op.out, kFloats);
  check.same_shape("out", op.out, op.data, "the quantized array");
  check.no_overlap("out", op.out, "data", op.data);
  check.no_overlap("out", op.out, "scale", op.scale);
  if (op.offset) check.no_overlap("out", op.out, "offset", op.offset);
  const KernelTable& table = kernels();
  const Trace trace("dequantize", table.isa, [&] { return format_shape(op.data); });
  if (op.group == 0) {
    return cpu::dequantize(op.data, op.scale, op.offset, op.axis, op.out, table.quantize);
  }
  for (int64_t g = 0; g < parts.groups(); ++g) {
    cpu::dequantize(parts.slice(op.data, g), parts.slice_scale(op.scale, g),
                    parts.slice_scale(op.offset, g), op.axis, parts.slice(op.out, g),
                    table.quantize);
  }
}

}  // namespace tilewright
