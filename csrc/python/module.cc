#include "python/module.h"

#include "core/check.h"
#include "core/device.h"
#include "python/arrays.h"
#include "python/gpu/arrays.h"

namespace py = pybind11;
using namespace tilewright;

namespace {

// The unwinder that is linked in sets itself up at the first exception. What pthread_exit unwinds by
// is the system's, which asks ours about our frames (context.h, NoGil): unprepared, it aborts.
void prepare_unwinder() {
  try {
    throw 0;
  } catch (int) {
  }
}

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  prepare_unwinder();
  m.doc() =
      "tilewright's compiled kernels: thin functions over libtilewright, called by the op files.";
  python::import_numpy();
  py::register_exception<ShapeError>(m, "ShapeError", PyExc_ValueError);
  py::register_exception<DtypeError>(m, "DtypeError", PyExc_TypeError);
  py::register_exception<DeviceError>(m, "DeviceError", PyExc_RuntimeError);
  py::register_exception<UnsupportedError>(m, "UnsupportedError", PyExc_NotImplementedError);
  py::register_exception_translator([](std::exception_ptr e) {
    try {
      if (e) std::rethrow_exception(e);
    } catch (const Interrupted&) {
      // The signal handler has already set the Python exception.
      if (!PyErr_Occurred()) PyErr_SetNone(PyExc_KeyboardInterrupt);
    }
  });
  python::register_arrays(m);
  python::register_dlpack(m);
  python::register_runtime(m);
  python::register_context(m);
  python::register_matmul(m);
  python::register_rowops(m);
  python::register_qgemm(m);
  python::register_kvcache(m);
  python::register_attention(m);
  python::register_optim(m);
  python::register_program(m);
  python::register_roofline(m);
  if constexpr (kHasGpu) python::register_gpu(m);
}
