// DLPack capsules as NumPy arrays and back, zero copy. NumPy's own reader refuses bfloat16, and its
// writer bfloat16 too, so both directions are here.
#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
#define NO_IMPORT_ARRAY
#define PY_ARRAY_UNIQUE_SYMBOL tilewright_numpy
#include "python/dlpack.h"

#include <numpy/arrayobject.h>

#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "core/check.h"
#include "python/arrays.h"
#include "python/module.h"

namespace py = pybind11;

namespace tilewright::python {
namespace {

using dlpack::DataType;
using dlpack::Managed;
using dlpack::ManagedVersioned;

// NumPy's number of a dtype, or -1.
int numpy_type(DataType t) {
  const auto is = [&](uint8_t code, int bits) { return t.code == code && t.bits == bits; };
  if (t.lanes != 1) return -1;
  if (is(dlpack::kFloat, 32)) return NPY_FLOAT32;
  if (is(dlpack::kBfloat, 16)) return bfloat16_type();
  if (is(dlpack::kFloat, 16)) return NPY_FLOAT16;
  if (is(dlpack::kFloat, 64)) return NPY_FLOAT64;
  if (is(dlpack::kBool, 8)) return NPY_BOOL;
  if (is(dlpack::kComplex, 64)) return NPY_COMPLEX64;
  if (is(dlpack::kComplex, 128)) return NPY_COMPLEX128;
  constexpr int kSigned[] = {NPY_INT8, NPY_INT16, NPY_INT32, NPY_INT64};
  constexpr int kUnsigned[] = {NPY_UINT8, NPY_UINT16, NPY_UINT32, NPY_UINT64};
  for (int i = 0; i < 4; ++i) {
    if (is(dlpack::kInt, 8 << i)) return kSigned[i];
    if (is(dlpack::kUInt, 8 << i)) return kUnsigned[i];
  }
  return -1;
}

// The DLPack dtype of an array, or lanes 0.
DataType dlpack_type(PyArrayObject* array) {
  const int size = int(PyArray_ITEMSIZE(array)), type = PyArray_TYPE(array);
  const auto made = [&](uint8_t code) { return DataType{code, uint8_t(8 * size), 1}; };
  if (!PyArray_ISNOTSWAPPED(array)) return {0, 0, 0};
  if (type == bfloat16_type()) return made(dlpack::kBfloat);
  if (type == NPY_BOOL) return made(dlpack::kBool);
  if (PyTypeNum_ISSIGNED(type)) return made(dlpack::kInt);
  if (PyTypeNum_ISUNSIGNED(type)) return made(dlpack::kUInt);
  if (type == NPY_HALF || type == NPY_FLOAT || type == NPY_DOUBLE) return made(dlpack::kFloat);
  if (type == NPY_CFLOAT || type == NPY_CDOUBLE) return made(dlpack::kComplex);
  return {0, 0, 0};
}

template <class M>
void call_deleter(M* managed) {
  if (managed->deleter) managed->deleter(managed);
}

// Reading ------------------------------------------------------------------------------------

constexpr int kMaxAxes = 32;  // what every NumPy takes

// Everything that can be wrong, before the capsule is touched.
int check_tensor(const dlpack::Tensor& t, const std::string& what) {
  const auto device = t.device.type;
  if (device != dlpack::kCpu && device != dlpack::kCudaHost && device != dlpack::kRocmHost) {
    throw DeviceError(what + " must be in the CPU's memory, got DLPack device type " +
                      std::to_string(device));
  }
  if (t.ndim < 0 || t.ndim > kMaxAxes) {
    throw ShapeError(what + " must have at most 32 axes, got " + std::to_string(t.ndim));
  }
  int64_t items = 1;
  for (int d = 0; d < t.ndim; ++d) {
    if (t.shape[d] < 0) {
      throw ShapeError(what + " must have no negative extent, got " +
                       format_shape(t.shape, t.ndim));
    }
    items *= t.shape[d];
  }
  if (items > 0 && !t.data) throw ShapeError(what + " must have memory, got a null pointer");
  const int type = numpy_type(t.dtype);
  if (type < 0) {
    throw DtypeError(what + " must have a dtype that NumPy has, got DLPack type code " +
                     std::to_string(t.dtype.code) + " of " + std::to_string(t.dtype.bits) +
                     " bits and " + std::to_string(t.dtype.lanes) + " lanes");
  }
  return type;
}

// An array over the tensor's memory, without an owner yet.
py::object array_over(const dlpack::Tensor& t, int type, bool writable) {
  static char nothing[16];  // an empty tensor may have no memory, an array has
  PyArray_Descr* descr = PyArray_DescrFromType(type);
  const npy_intp size = PyDataType_ELSIZE(descr);
  npy_intp shape[kMaxAxes], strides[kMaxAxes];
  npy_intp contiguous = size;
  for (int d = t.ndim - 1; d >= 0; --d) {
    shape[d] = t.shape[d];
    strides[d] = t.strides ? t.strides[d] * size : contiguous;
    contiguous *= shape[d];
  }
  char* data = t.data ? static_cast<char*>(t.data) + t.byte_offset : nothing;
  const int flags = writable ? NPY_ARRAY_WRITEABLE : 0;
  PyObject* array =
      PyArray_NewFromDescr(&PyArray_Type, descr, t.ndim, shape, strides, data, flags, nullptr);
  if (!array) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(array);
}

// The array's base: calls the deleter when the last view of the memory goes.
template <class M>
py::object owner_of(M* managed) {
  PyObject* owner = PyCapsule_New(managed, "tilewright_dlpack", [](PyObject* self) {
    const py::error_scope keep;  // a deleter may clear or set the pending exception
    call_deleter(static_cast<M*>(PyCapsule_GetPointer(self, "tilewright_dlpack")));
  });
  if (!owner) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(owner);
}

template <class M>
py::object consume(PyObject* capsule, bool writable, const std::string& what) {
  auto* managed = static_cast<M*>(PyCapsule_GetPointer(capsule, M::kName));
  const int type = check_tensor(managed->tensor, what);
  py::object array = array_over(managed->tensor, type, writable);
  py::object owner = owner_of(managed);
  PyCapsule_SetName(capsule, M::kUsedName);  // from here on the owner calls the deleter
  if (PyArray_SetBaseObject(reinterpret_cast<PyArrayObject*>(array.ptr()), owner.release().ptr()) <
      0) {
    throw py::error_already_set();
  }
  return array;
}

// A capsule as an array; `what` ("matmul: a") starts every message.
py::object from_dlpack(const py::object& object, const std::string& what) {
  PyObject* capsule = object.ptr();
  if (PyCapsule_IsValid(capsule, ManagedVersioned::kName)) {
    const auto* managed =
        static_cast<ManagedVersioned*>(PyCapsule_GetPointer(capsule, ManagedVersioned::kName));
    if (managed->version.major > 1) {  // only the version is certain to be where it is
      throw UnsupportedError(what + " must be of DLPack version 1, got version " +
                             std::to_string(managed->version.major));
    }
    return consume<ManagedVersioned>(capsule, !(managed->flags & dlpack::kReadOnly), what);
  }
  if (PyCapsule_IsValid(capsule, Managed::kName)) return consume<Managed>(capsule, true, what);
  throw DtypeError(what + " must give a DLPack capsule that nobody has read yet, got " +
                   std::string(py::str(py::repr(object))));
}

// Writing ------------------------------------------------------------------------------------

// What the capsule points to, and what it needs: freed by the deleter, from any thread.
template <class M>
struct Export {
  M managed{};
  std::vector<int64_t> shape, strides;
  PyObject* owner = nullptr;

  static void free(M* managed) {
    auto* self = static_cast<Export*>(managed->manager);
    if (Py_IsInitialized()) {
      const PyGILState_STATE state = PyGILState_Ensure();
      Py_DECREF(self->owner);
      PyGILState_Release(state);
    }
    delete self;
  }
};

template <class M>
void free_unread(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, M::kName)) return;  // its reader calls the deleter
  const py::error_scope keep;
  call_deleter(static_cast<M*>(PyCapsule_GetPointer(capsule, M::kName)));
}

template <class M>
py::object produce(PyArrayObject* array, DataType dtype, uint64_t flags) {
  auto made = std::make_unique<Export<M>>();
  const int ndim = PyArray_NDIM(array);
  for (int d = 0; d < ndim; ++d) {
    made->shape.push_back(PyArray_DIM(array, d));
    made->strides.push_back(PyArray_STRIDE(array, d) / PyArray_ITEMSIZE(array));
  }
  void* data = PyArray_SIZE(array) ? PyArray_DATA(array) : nullptr;
  made->managed.tensor = {
      data, {dlpack::kCpu, 0}, ndim, dtype, made->shape.data(), made->strides.data(), 0};
  made->managed.manager = made.get();
  made->managed.deleter = Export<M>::free;
  if constexpr (std::is_same_v<M, ManagedVersioned>) {
    made->managed.version = {1, 0};
    made->managed.flags = flags;
  }
  PyObject* capsule = PyCapsule_New(&made->managed, M::kName, free_unread<M>);
  if (!capsule) throw py::error_already_set();
  made->owner = Py_NewRef(reinterpret_cast<PyObject*>(array));
  made.release();
  return py::reinterpret_steal<py::object>(capsule);
}

// An array as a capsule. What DLPack can't say raises BufferError, as the protocol wants it.
py::object to_dlpack(const py::object& object, bool versioned, bool copied) {
  if (!is_array(object.ptr())) throw DtypeError("to_dlpack: x must be an array");
  auto* array = reinterpret_cast<PyArrayObject*>(object.ptr());
  const DataType dtype = dlpack_type(array);
  if (dtype.lanes == 0) {
    throw py::buffer_error("DLPack has no dtype for " + std::string(py::str(object.attr("dtype"))));
  }
  for (int d = 0; d < PyArray_NDIM(array); ++d) {
    if (PyArray_DIM(array, d) > 1 && PyArray_STRIDE(array, d) % PyArray_ITEMSIZE(array) != 0)
      throw py::buffer_error("DLPack has no strides that are no multiples of the element size");
  }
  const bool writable = PyArray_ISWRITEABLE(array);
  if (versioned) {
    const uint64_t flags = dlpack::kReadOnly * !writable | dlpack::kCopied * copied;
    return produce<ManagedVersioned>(array, dtype, flags);
  }
  if (!writable) {
    throw py::buffer_error("a read-only array needs max_version=(1, 0) or later to say so");
  }
  return produce<Managed>(array, dtype, 0);
}

}  // namespace

void register_dlpack(py::module_& m) {
  m.def("from_dlpack", &from_dlpack, py::arg("capsule"), py::arg("what"),
        "an array over a DLPack capsule's memory; `what` starts the messages");
  m.def("to_dlpack", &to_dlpack, py::arg("array"), py::arg("versioned"), py::arg("copied"),
        "a DLPack capsule of an array");
}

}  // namespace tilewright::python
