// quantize and dequantize: the shape rules.
#include "cpu/quantize.h"

#include <algorithm>
#include <string>

#include "core/check.h"
#include "core/device.h"
#include "core/dtype.h"
#include "core/trace.h"
#include "cpu/isa.h"
#include "cuda/kernels.h"
#include "tilewright/ops.h"

namespace tilewright {
namespace {

// What quantize and dequantize have in common: integers and scales of an array shaped like `like`.
struct Parts {
  const Check& check;
  const View& like;
  const char* like_name;
  int axis, along, bits;
  int64_t group;

  void check_axes() const {
    const auto axis_error = [&](const char* name, int got) {
      check.shape_error(std::string(name) + " must be below the " + std::to_string(like.rank) +
                        " axes of " + like_name + ", got " + std::to_string(got));
    };
    if (bits != 8 && bits != 4) {
      check.unsupported("bits must be 8 or 4, got " + std::to_string(bits));
    }
    if (axis >= like.rank) axis_error("axis", axis);
    if (group == 0 && bits == 8) return;
    if (along < 0 || along >= like.rank) axis_error("along", along);
    if (along == axis) {
      check.shape_error("along must be another axis than axis, got " + std::to_string(along) +
                        " for both");
    }
    if (group == 0) return;
    if (group < 0) check.shape_error("group must be positive, got " + std::to_string(group));
    if (like.rank == 1 ? axis >= 0 : like.rank != 2 || axis != 1 - along) {
      check.unsupported(
          "groups need an array of one axis, or of two and a scale for each index of "
          "the other one; got axis " +
          std::to_string(axis) + " of " + std::string(like_name) + " " + format_shape(like));
    }
  }
  void check_data(const View& data) const {
    int64_t want[kMaxRank];
    for (int d = 0; d < like.rank; ++d) {
      want[d] = bits == 4 && d == along ? (like.shape[d] + 1) / 2 : like.shape[d];
    }
    check.shape("data", data, want, like.rank,
                bits == 4 ? "for pairs of 4 bits to match x" : "to match x", &like);
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

  // body(part of floats, its integers) for the whole, whose rows are groups where memory allows it; else
  // for each group, one after the other: those of odd size share bytes of 4 bits.
  template <class Body>
  void for_each(const View& floats, const View& data, const View& scale, const View& offset,
                const Body& body) const {
    if (group == 0) {
      return body(floats, cpu::Integers{data, scale, offset, axis, bits, along, false});
    }
    const int64_t per_byte = bits == 4 ? 2 : 1;
    if (like.shape[along] % group == 0 && group % per_byte == 0 && runs_on(floats) &&
        runs_on(data) && runs_on(scale) && runs_on(offset)) {
      View scales = rows_of(scale, 1), offsets = rows_of(offset, 1);
      scales.rank = offsets.rank = 1;
      return body(rows_of(floats, group), cpu::Integers{rows_of(data, group / per_byte), scales,
                                                        offsets, 0, bits, 1, false});
    }
    for (int64_t g = 0; g < groups(); ++g) {
      const int64_t begin = g * group;
      View part = from(floats, begin);
      part.shape[along] = std::min(group, like.shape[along] - begin);
      body(part, cpu::Integers{from(data, begin / per_byte), scale_of(scale, g),
                               scale_of(offset, g), axis, bits, along, begin % per_byte != 0});
    }
  }

 private:
  // Whether v steps from the end of a channel to the next one as it does within it.
  bool runs_on(const View& v) const {
    return !v || axis < 0 || v.shape[axis] == 1 ||
           v.stride[axis] == v.shape[along] * v.stride[along];
  }
  // Such a v as rows of `size`.
  View rows_of(const View& v, int64_t size) const {
    View rows = v;
    rows.rank = 2;
    rows.shape[0] = v.size() / size, rows.shape[1] = size;
    rows.stride[0] = size * v.stride[along], rows.stride[1] = v.stride[along];
    return rows;
  }
  // v from an index of `along` on; the shape is left as it is.
  View from(const View& v, int64_t begin) const {
    View part = v;
    part.data = v.ptr<char>() + begin * v.stride[along] * dtype_size(v.dtype);
    return part;
  }
  // The scales or offsets of group g.
  View scale_of(const View& v, int64_t g) const {
    if (!v) return v;
    View part = from(v, g);
    part.rank = like.rank - 1;
    if (axis >= 0) part.shape[0] = v.shape[axis], part.stride[0] = v.stride[axis];
    return part;
  }
};

}  // namespace

void run(const Quantize& op) {
  const Check check{"quantize", Check::on_gpu_too};
  check.dtype("x", op.x, kFloats);
  const Parts parts{check, op.x, "x", op.axis, op.along, op.bits, op.group};
  parts.check_axes();
  check.output("data", op.data, {op.offset ? DType::u8 : DType::s8});
  parts.check_data(op.data);
  for (const View* v : {&op.scale, &op.offset}) {
    if (v == &op.offset && !*v) continue;
    const char* const name = v == &op.scale ? "scale" : "offset";
    parts.check_scale(name, *v);
    check.output(name, *v, {DType::f32});
    check.no_overlap(name, *v, "x", op.x);
  }
  check.no_overlap("data", op.data, "x", op.x);
  const KernelTable& table = kernels();
  const Trace trace("quantize", level_of(op.x, table.isa), [&] { return format_shape(op.x); });
  if constexpr (kHasGpu) {
    if (on_gpu(op.x)) return cuda::quantize(op);
  }
  parts.for_each(op.x, op.data, op.scale, op.offset, [&](const View& x, const cpu::Integers& q) {
    cpu::quantize(x, q, table.quantize);
  });
}

void run(const Dequantize& op) {
  const Check check{"dequantize", Check::on_gpu_too};
  check.dtype("data", op.data, {DType::s8, DType::u8});
  View whole = op.data;
  if (op.bits == 4 && op.along >= 0 && op.along < whole.rank) {
    int64_t& n = whole.shape[op.along];
    const bool odd = op.out.rank == whole.rank && op.out.shape[op.along] == 2 * n - 1;
    n = 2 * n - odd;
  }
  const Parts parts{check, whole, "data", op.axis, op.along, op.bits, op.group};
  parts.check_axes();
  parts.check_scale("scale", op.scale);
  if (op.offset) parts.check_scale("offset", op.offset);
  check.output("out", op.out, kFloats);
  check.same_shape("out", op.out, whole, "the quantized array");
  check.no_overlap("out", op.out, "data", op.data);
  check.no_overlap("out", op.out, "scale", op.scale);
  if (op.offset) check.no_overlap("out", op.out, "offset", op.offset);
  const KernelTable& table = kernels();
  const Trace trace("dequantize", level_of(op.data, table.isa),
                    [&] { return format_shape(op.out); });
  if constexpr (kHasGpu) {
    if (on_gpu(op.data)) return cuda::dequantize(op);
  }
  parts.for_each(
      op.out, op.data, op.scale, op.offset,
      [&](const View& out, const cpu::Integers& q) { cpu::dequantize(q, out, table.quantize); });
}

}  // namespace tilewright
