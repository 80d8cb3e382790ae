// The int8 ops, and right-hand sides packed once (float too: one class serves both families).
#include "ops/qgemm.h"

#include "core/check.h"
#include "core/dtype.h"
#include "cpu/gemm.h"
#include "python/arrays.h"
#include "python/context.h"
#include "python/module.h"
#include "python/product.h"
#include "python/program.h"
#include "tilewright/pack.h"

namespace py = pybind11;

namespace tilewright::python {
namespace {

void quantize(const View& x, int axis, const View& data, const View& scale, const View& offset,
              int bits, int64_t group, int along) {
  call(Quantize{x, axis, data, scale, offset, bits, group, along});
}

void dequantize(const View& data, const View& scale, const View& offset, int axis, const View& out,
                int bits, int64_t group, int along) {
  call(Dequantize{data, scale, offset, axis, out, bits, group, along});
}

// `out`, or a fresh array for the product that `op` describes.
template <class Op>
py::object output_of(const Op& op, const py::object& out, DType dtype) {
  if (!out.is_none()) return out;
  check_operands(op);
  const auto made = py::reinterpret_steal<py::object>(new_product(op.a, op.b, op.packed, dtype));
  if (!made) throw py::error_already_set();
  return made;
}

py::object int8_matmul(const View& a, const py::object& b, const py::object& out) {
  Int8Matmul op;
  op.a = a;
  load_right(b.ptr(), op.b, op.packed);
  const py::object y = output_of(op, out, DType::s32);
  op.out = to_view(y.ptr());
  const KernelCall scope;
  call(op);
  return y;
}

// qb: a PackedMatrix, or (data, scale, offset, bits, K, group).
void load_weights(const py::object& qb, QuantizedView& view, const PackedMatrix*& packed) {
  if (!py::isinstance<py::tuple>(qb)) {
    if (RecordedProgram* r = recording()) r->hold(qb.ptr());
    packed = py::cast<const PackedMatrix*>(qb);
    return;
  }
  const auto parts = py::cast<py::tuple>(qb);
  const auto object = [&](size_t i) { return py::object(parts[i]).ptr(); };
  view.data = to_view(object(0)), view.scale = to_view(object(1)), view.offset = to_view(object(2));
  view.bits = py::cast<int>(parts[3]);
  view.K = py::cast<int64_t>(parts[4]);
  view.group = py::cast<int64_t>(parts[5]);
}

py::object qmatmul(const View& a, const View& scale_a, const View& offset_a, const py::object& qb,
                   const View& bias, const py::object& activation, const View& residual,
                   bool floats, const py::object& out) {
  QuantizedMatmul op;
  op.a = a;
  op.scale_a = scale_a;
  op.offset_a = offset_a;
  load_weights(qb, op.b, op.packed);
  op.compute = floats ? Compute::floats : Compute::integers;
  op.bias = bias;
  op.residual = residual;
  op.activation = activation_of("qmatmul", activation.ptr());
  py::object y = out;
  if (out.is_none()) {
    check_operands(op);
    const DType dtype = is_float(a.dtype) ? a.dtype : DType::f32;
    y = py::reinterpret_steal<py::object>(new_product(op.a, op.b.data, op.packed, dtype));
    if (!y) throw py::error_already_set();
  }
  op.out = to_view(y.ptr());
  const KernelCall scope;
  call(op);
  return y;
}

// b (K, N): float or int8.
PackedMatrix pack(const View& b, bool latency) {
  const KernelCall scope;
  return packed_matrix(b, latency ? Prefer::latency : Prefer::throughput);
}

PackedMatrix pack_quantized(const py::object& qb) {
  QuantizedView b;
  const PackedMatrix* packed = nullptr;
  load_weights(qb, b, packed);
  const KernelCall scope;
  return packed_matrix(b);
}

// The floats (K, N) that a packed quantized matrix stands for.
void unpack_floats(const PackedMatrix& b, const View& out) {
  unpack(b, out);
}

}  // namespace

void register_qgemm(py::module_& m) {
  py::class_<PackedMatrix>(m, "PackedMatrix",
                           "A right-hand side (K, N) in the panels of one ISA level")
      .def_property_readonly("shape",
                             [](const PackedMatrix& p) { return py::make_tuple(p.K, p.N); })
      .def_property_readonly("dtype", [](const PackedMatrix& p) { return dtype_name(p.dtype); })
      .def_readonly("isa", &PackedMatrix::isa)
      .def_readonly("bits", &PackedMatrix::bits, "of a quantized matrix: 8 or 4; of others 0")
      // It never changes: a copy of what holds it may share it.
      .def("__copy__", [](const py::object& self) { return self; })
      .def("__deepcopy__", [](const py::object& self, const py::object&) { return self; })
      .def_property_readonly("nbytes", &PackedMatrix::nbytes);
  m.def("pack", &pack, py::arg("b"), py::arg("latency") = false);
  m.def("pack_quantized", &pack_quantized, py::arg("qb"));
  const auto nogil = py::call_guard<KernelCall>();
  m.def("unpack_floats", &unpack_floats, nogil, py::arg("b"), py::arg("out"));
  m.def("quantize", &quantize, nogil, py::arg("x"), py::arg("axis"), py::arg("data"),
        py::arg("scale"), py::arg("offset") = py::none(), py::arg("bits") = 8, py::arg("group") = 0,
        py::arg("along") = -1);
  m.def("dequantize", &dequantize, nogil, py::arg("data"), py::arg("scale"), py::arg("offset"),
        py::arg("axis"), py::arg("out"), py::arg("bits") = 8, py::arg("group") = 0,
        py::arg("along") = -1);
  m.def("int8_matmul", &int8_matmul, py::arg("a"), py::arg("b"), py::arg("out"));
  m.def("qmatmul", &qmatmul, py::arg("a"), py::arg("scale_a"), py::arg("offset_a"), py::arg("qb"),
        py::arg("bias"), py::arg("activation"), py::arg("residual"), py::arg("floats"),
        py::arg("out"));
}

}  // namespace tilewright::python
