#include "python/product.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "core/check.h"
#include "python/program.h"

namespace py = pybind11;

namespace tilewright::python {

void load_right(PyObject* b, View& view, const PackedMatrix*& packed) {
  if (!is_array(b) && py::isinstance<PackedMatrix>(b)) {
    packed = py::cast<const PackedMatrix*>(b);
    if (RecordedProgram* r = recording()) r->hold(b);
  } else {
    view = to_view(b);
  }
}

Activation activation_of(const char* op, PyObject* name) {
  if (name == Py_None) return Activation::none;
  const char* text = PyUnicode_Check(name) ? PyUnicode_AsUTF8(name) : nullptr;
  if (text) {
    if (!std::strcmp(text, "relu")) return Activation::relu;
    if (!std::strcmp(text, "gelu")) return Activation::gelu;
    if (!std::strcmp(text, "gelu_tanh")) return Activation::gelu_tanh;
    if (!std::strcmp(text, "silu")) return Activation::silu;
  }
  throw UnsupportedError(std::string(op) +
                         ": activation must be None, 'relu', 'gelu', 'gelu_tanh' or 'silu', got " +
                         std::string(py::str(py::repr(name))));
}

PyObject* new_product(const View& a, const View& b, const PackedMatrix* packed, DType dtype) {
  const int b_rank = packed ? 2 : b.rank;
  const int rank = std::max(a.rank, b_rank);
  int64_t shape[kMaxRank];
  for (int d = 0; d < rank - 2; ++d) {
    const int da = d - (rank - a.rank), db = d - (rank - b_rank);
    const int64_t left = da >= 0 ? a.shape[da] : 1, right = db >= 0 ? b.shape[db] : 1;
    shape[d] = left == 1 ? right : left;
  }
  shape[rank - 2] = a.shape[a.rank - 2];
  shape[rank - 1] = packed ? packed->N : b.shape[b.rank - 1];
  return new_array(shape, rank, dtype);
}

}  // namespace tilewright::python
