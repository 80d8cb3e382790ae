#include "python/gpu/arrays.h"

#include <algorithm>
#include <utility>

#include "cuda/gpu/current.h"
#include "python/arrays.h"
#ifdef TILEWRIGHT_EMULATE
#include "python/gpu/emulator.h"
#endif

namespace py = pybind11;

namespace tilewright::python {
namespace {

thread_local PyObject* t_maker = nullptr;  // owned

// enter_gpu(maker, stream) -> what was there before, for leave_gpu
py::object enter_gpu(const py::object& maker, uintptr_t stream) {
  const auto before_stream = reinterpret_cast<uintptr_t>(gpu::t_stream);
  const auto before = py::reinterpret_steal<py::object>(t_maker);
  t_maker = maker.inc_ref().ptr();
  gpu::t_stream = reinterpret_cast<void*>(stream);
  return py::make_tuple(before ? before : py::none(), before_stream);
}

void leave_gpu(const py::tuple& before) {
  Py_XDECREF(t_maker);
  const py::object maker = before[0];
  t_maker = maker.is_none() ? nullptr : maker.inc_ref().ptr();
  gpu::t_stream = reinterpret_cast<void*>(before[1].cast<uintptr_t>());
}

int64_t number(PyObject* tuple, Py_ssize_t index) {
  return PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, index));
}

}  // namespace

PyObject* gpu_maker() {
  return t_maker;
}

bool read_gpu_array(PyObject* object, View& view) {
  const py::handle array(object);
  if (!py::hasattr(array, "__cuda_array_interface__")) return false;
  const py::dict interface = array.attr("__cuda_array_interface__");
  const py::tuple shape = interface["shape"], data = interface["data"];
  const py::object strides = interface.attr("get")("strides");
  const auto address = data[0].cast<uintptr_t>();
  view.device = Device::gpu;
  view.data = reinterpret_cast<void*>(address);
  view.writable = !data[1].cast<bool>();
  const auto size = array.attr("dtype").attr("itemsize").cast<int64_t>();
  const int rank = int(shape.size());
  int64_t extents[kMaxRank], steps[kMaxRank], next = size;
  bool aligned = address % size_t(std::max<int64_t>(size, 1)) == 0;
  for (int d = std::min(rank, kMaxRank) - 1; d >= 0; --d) {
    extents[d] = number(shape.ptr(), d);
    steps[d] = strides.is_none() ? next : number(strides.ptr(), d);
    next *= extents[d];
    aligned = aligned && (extents[d] <= 1 || steps[d] % size == 0);
  }
  describe(view, array.attr("dtype"), rank, extents, steps, aligned);
  return true;
}

Memory gpu_memory(PyObject* object) {
  View view;
  if (!read_gpu_array(object, view)) return {nullptr, 0};
  return {view.data, py::handle(object).attr("nbytes").cast<int64_t>(), Device::gpu};
}

void register_gpu(py::module_& m) {
  m.def("enter_gpu", &enter_gpu, py::arg("maker"), py::arg("stream"),
        "calls of this thread work for a GPU: results by maker.empty, launches on a stream");
  m.def("leave_gpu", &leave_gpu, py::arg("before"), "undo enter_gpu, which returned `before`");
#ifdef TILEWRIGHT_EMULATE
  register_emulator(m);
#endif
}

}  // namespace tilewright::python
