// The bench's own kernels: the limits of the machine, and a kernel's time without Python around it.
#include "cpu/roofline.h"

#include "python/arrays.h"
#include "python/context.h"
#include "python/module.h"

namespace py = pybind11;

namespace tilewright::python {

void register_roofline(py::module_& m) {
  using nogil = py::call_guard<KernelCall>;
  m.def("roofline_multiply_add", &roofline_multiply_add, py::arg("tasks"), py::arg("steps"),
        nogil(), "floating-point operations done");
  m.def("roofline_multiply_add_int8", &roofline_multiply_add_int8, py::arg("tasks"),
        py::arg("steps"), nogil(), "integer operations done");
  m.def("roofline_multiply_add_bf16", &roofline_multiply_add_bf16, py::arg("tasks"),
        py::arg("steps"), nogil(),
        "floating-point operations done; 0 without instructions for them");
  m.def("roofline_read", &roofline_read, py::arg("x"), py::arg("tasks"), py::arg("repeats"),
        nogil(), "bytes read");
  m.def("roofline_copy", &roofline_copy, py::arg("x"), py::arg("y"), py::arg("tasks"),
        py::arg("repeats"), nogil(), "bytes read and written");
  m.def("roofline_copy_streaming", &roofline_copy_streaming, py::arg("x"), py::arg("y"),
        py::arg("tasks"), py::arg("repeats"), nogil(), "bytes read and written");
  m.def("time_gemm", &time_gemm, py::arg("a"), py::arg("b"), py::arg("out"), py::arg("repeats"),
        nogil(), "seconds of one a @ b by the kernel alone");
}

}  // namespace tilewright::python
