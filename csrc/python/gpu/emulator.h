#pragma once
#include <pybind11/pybind11.h>

namespace tilewright::python {

void register_emulator(pybind11::module_& m);

}  // namespace tilewright::python
