// NumPy arrays as views: the pybind11 type caster that lets a binding name View in its signature.
//
//     None -> an absent view; numpy.ndarray -> pointer, dtype, shape, strides. Anything else
//     becomes a view without dtype whose note says what came, so that the op's own check words the
//     error, with the argument's name.
#pragma once
#include <pybind11/pybind11.h>

#include "tilewright/view.h"

namespace tilewright::python {

void import_numpy();
int bfloat16_type();  // NumPy's number for ml_dtypes.bfloat16
bool is_array(PyObject* object);
View to_view(PyObject* object);
// Fills what a view has besides its memory, from strides in bytes; or says in `note` why no kernel
// takes the array.
void describe(View& view, pybind11::handle dtype, int rank, const int64_t* shape,
              const int64_t* strides, bool aligned);
// A float dtype from what np.dtype() accepts, for the argument `arg` of `op`.
DType float_dtype(const char* op, const char* arg, PyObject* dtype);
PyObject* new_array(const int64_t* shape, int rank, DType dtype);

}  // namespace tilewright::python

namespace pybind11::detail {
template <>
struct type_caster<tilewright::View> {
  PYBIND11_TYPE_CASTER(tilewright::View, const_name("numpy.ndarray | None"));
  bool load(handle source, bool) {
    value = tilewright::python::to_view(source.ptr());
    return true;
  }
};
}  // namespace pybind11::detail
