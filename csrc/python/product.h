// What the bindings of matrix products share: a right-hand side that may be packed, the shape of
// the result, the name of an activation.
#pragma once
#include "cpu/gemm.h"
#include "python/arrays.h"

namespace tilewright::python {

// b as a view, or as the packed matrix that stands for it.
void load_right(PyObject* b, View& view, const PackedMatrix*& packed);
// A fresh array for a @ b. Call check_operands first; what else must hold, run() checks.
PyObject* new_product(const View& a, const View& b, const PackedMatrix* packed, DType dtype);
Activation activation_of(const char* op, PyObject* name);

}  // namespace tilewright::python
