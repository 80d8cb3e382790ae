// What the binding files offer to module.cc.
#pragma once
#include <pybind11/pybind11.h>

namespace tilewright::python {

void register_arrays(pybind11::module_& m);
void register_context(pybind11::module_& m);
void register_dlpack(pybind11::module_& m);
void register_runtime(pybind11::module_& m);
void register_matmul(pybind11::module_& m);
void register_rowops(pybind11::module_& m);
void register_program(pybind11::module_& m);
void register_qgemm(pybind11::module_& m);
void register_attention(pybind11::module_& m);
void register_kvcache(pybind11::module_& m);
void register_optim(pybind11::module_& m);
void register_roofline(pybind11::module_& m);

}  // namespace tilewright::python
