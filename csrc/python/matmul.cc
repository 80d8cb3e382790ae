// matmul's binding is written against the C API: it is the op whose call overhead users compare
// with NumPy's (0.6 us), and pybind11's argument parsing alone costs half of that.
#include "core/check.h"
#include "core/dtype.h"
#include "cpu/gemm.h"
#include "python/arrays.h"
#include "python/context.h"
#include "python/module.h"
#include "python/product.h"
#include "python/program.h"

namespace py = pybind11;

namespace tilewright::python {
namespace {

// matmul(a, b, bias, activation, residual, alpha, out, out_dtype) -> out; NotImplemented where a
// or b is a vector: that is the caller's to arrange.
PyObject* matmul_unchecked(PyObject* const* args) {
  Matmul op;
  op.a = to_view(args[0]);
  load_right(args[1], op.b, op.packed);
  if (op.a.rank == 1 || (!op.packed && op.b.rank == 1)) Py_RETURN_NOTIMPLEMENTED;
  op.bias = to_view(args[2]);
  op.activation = activation_of("matmul", args[3]);
  op.residual = to_view(args[4]);
  op.alpha = float(PyFloat_AsDouble(args[5]));
  if (op.alpha == -1.0f && PyErr_Occurred()) throw py::error_already_set();
  py::object out;
  if (args[6] != Py_None) {
    out = py::reinterpret_borrow<py::object>(args[6]);
  } else {
    const DType b = op.packed ? op.packed->dtype : op.b.dtype;
    check_operands(op);
    const DType dtype =
        args[7] == Py_None ? promote(op.a.dtype, b) : float_dtype("matmul", "out_dtype", args[7]);
    out = py::reinterpret_steal<py::object>(new_product(op.a, op.b, op.packed, dtype));
    if (!out) throw py::error_already_set();
  }
  op.out = to_view(out.ptr());
  {
    const KernelCall scope;
    call(op);
  }
  return out.release().ptr();
}

PyObject* matmul(PyObject*, PyObject* const* args, Py_ssize_t count) {
  try {
    if (count != 8) throw ShapeError("_core.matmul takes 8 arguments");
    return matmul_unchecked(args);
  } catch (const py::error_already_set& e) {
    const_cast<py::error_already_set&>(e).restore();
  } catch (...) {
    py::detail::try_translate_exceptions();
  }
  return nullptr;
}

PyMethodDef kMatmul = {
    "matmul", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(matmul)), METH_FASTCALL,
    "matmul(a, b, bias, activation, residual, alpha, out, out_dtype)"};

}  // namespace

void register_matmul(py::module_& m) {
  m.add_object("matmul", PyCFunction_NewEx(&kMatmul, nullptr, m.attr("__name__").ptr()));
}

}  // namespace tilewright::python
