// Arrays in a GPU's memory: CuPy's, or the emulator's stand-in for them.
#pragma once
#include <pybind11/pybind11.h>

#include "ops/program.h"
#include "tilewright/view.h"

namespace tilewright::python {

// Reads what has the CUDA array interface; false where an object has none.
bool read_gpu_array(PyObject* object, View& view);

// The bytes of an array of a GPU without gaps; nothing where the object is none.
Memory gpu_memory(PyObject* object);

// What this thread's results are made by: an object with empty(shape, dtype) and empty_like(x), while
// a call on arrays of a GPU runs; else nullptr, and NumPy makes them.
PyObject* gpu_maker();

void register_gpu(pybind11::module_& m);

}  // namespace tilewright::python
