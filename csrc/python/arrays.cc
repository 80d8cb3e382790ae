#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL tilewright_numpy  // dlpack.cc uses the same table of functions
#include "python/arrays.h"

#include <numpy/arrayobject.h>

#include <cstring>

#include "core/check.h"
#include "core/device.h"
#include "core/dtype.h"
#include "core/overlap.h"
#include "core/recycle.h"
#include "python/gpu/arrays.h"
#include "python/module.h"
#include "python/program.h"

namespace tilewright::python {
namespace {

int g_bfloat16 = -1;  // NumPy's number for ml_dtypes.bfloat16

DType dtype_of(PyArray_Descr* descr) {
  const int type = descr->type_num;
  if (!PyArray_ISNBO(descr->byteorder)) return DType::other;
  switch (type) {
    case NPY_FLOAT:
      return DType::f32;
    case NPY_BYTE:
      return DType::s8;
    case NPY_UBYTE:
      return DType::u8;
    case NPY_BOOL:
      return DType::boolean;
    case NPY_HALF:
      return DType::f16;
    case NPY_DOUBLE:
      return DType::f64;
    default:
      break;
  }
  if (type == g_bfloat16) return DType::bf16;
  if (PyTypeNum_ISSIGNED(type)) {
    if (PyDataType_ELSIZE(descr) == 4) return DType::s32;
    if (PyDataType_ELSIZE(descr) == 8) return DType::s64;
  }
  return DType::other;
}

int type_number(DType dtype) {
  switch (dtype) {
    case DType::bf16:
      return g_bfloat16;
    case DType::f16:
      return NPY_HALF;
    case DType::s32:
      return NPY_INT;
    default:
      return NPY_FLOAT;
  }
}

}  // namespace

void import_numpy() {
  if (_import_array() < 0) throw pybind11::error_already_set();
  const auto bfloat16 = pybind11::module_::import("ml_dtypes").attr("bfloat16");
  PyArray_Descr* descr = nullptr;
  if (!PyArray_DescrConverter(bfloat16.ptr(), &descr)) throw pybind11::error_already_set();
  g_bfloat16 = descr->type_num;
  Py_DECREF(descr);
}

int bfloat16_type() {
  return g_bfloat16;
}

bool is_array(PyObject* object) {
  return PyArray_Check(object);
}

void describe(View& view, pybind11::handle dtype, int rank, const int64_t* shape,
              const int64_t* strides, bool aligned) {
  const auto descr = reinterpret_cast<PyArray_Descr*>(dtype.ptr());
  const DType known = dtype_of(descr);
  if (known == DType::other) {
    view.note = PyArray_ISNBO(descr->byteorder) ? descr->typeobj->tp_name : "a big-endian array";
    return;
  }
  if (rank > kMaxRank) {
    view.note = "an array of more than 8 axes";
    return;
  }
  if (!aligned) {
    view.note = "an array that is not aligned to its elements; use np.require(x, requirements='A')";
    return;
  }
  const int64_t size = dtype_size(known);
  view.rank = rank;
  for (int d = 0; d < rank; ++d) {
    view.shape[d] = shape[d];
    view.stride[d] = strides[d] / size;
    if (view.stride[d] * size != strides[d] && view.shape[d] > 1) {
      view.note = "an array whose strides are no multiples of its element size";
      return;
    }
  }
  view.dtype = known;
}

View to_view(PyObject* object) {
  View view;
  if (object == Py_None) return view;
  view.present = true;
  if (!PyArray_Check(object)) {
    if constexpr (kHasGpu) {
      if (read_gpu_array(object, view)) {
        if (RecordedProgram* r = recording()) r->hold(object);
        return view;
      }
    }
    view.note = Py_TYPE(object)->tp_name;
    return view;
  }
  if (RecordedProgram* r = recording()) r->hold(object);
  const auto array = reinterpret_cast<PyArrayObject*>(object);
  view.data = PyArray_DATA(array);
  view.writable = PyArray_ISWRITEABLE(array);
  static_assert(sizeof(npy_intp) == sizeof(int64_t));
  describe(view, reinterpret_cast<PyObject*>(PyArray_DESCR(array)), PyArray_NDIM(array),
           PyArray_DIMS(array), PyArray_STRIDES(array), PyArray_ISALIGNED(array));
  return view;
}

namespace {

// Large arrays get their memory from core/recycle.h and give it back there: NumPy keeps the
// allocator with the array (NEP 49), so they are ordinary arrays that own their data.
PyDataMem_Handler g_recycling = {
    "tilewright_recycling",
    1,
    {nullptr, [](void*, size_t size) { return recycle::allocate(size); },
     [](void*, size_t count, size_t size) {
       void* data = recycle::allocate(count * size);
       return data ? std::memset(data, 0, count * size) : nullptr;
     },
     [](void*, void* data, size_t size) { return recycle::resize(data, size); },
     [](void*, void* data, size_t) { recycle::release(data); }}};

// While one of these lives, NumPy allocates by it.
class RecyclingScope {
 public:
  RecyclingScope() {
    static PyObject* const capsule = PyCapsule_New(&g_recycling, "mem_handler", nullptr);
    before_ = capsule ? PyDataMem_SetHandler(capsule) : nullptr;
  }
  ~RecyclingScope() {
    if (!before_) return;
    Py_XDECREF(PyDataMem_SetHandler(before_));
    Py_DECREF(before_);
  }
  RecyclingScope(const RecyclingScope&) = delete;
  RecyclingScope& operator=(const RecyclingScope&) = delete;

 private:
  PyObject* before_;
};

PyObject* noted(PyObject* array) {
  if (RecordedProgram* r = recording(); r && array) r->made(array);
  return array;
}

// make(), with recycled memory if the array is large.
template <class Make>
PyObject* allocate(size_t bytes, const Make& make) {
  if (!recycle::takes(bytes)) return noted(make());
  const RecyclingScope scope;
  return PyErr_Occurred() ? nullptr : noted(make());
}

// empty(shape, dtype)
PyObject* empty(PyObject*, PyObject* const* args, Py_ssize_t count) {
  PyArray_Dims shape = {nullptr, 0};
  PyArray_Descr* descr = nullptr;
  if (count != 2) {
    PyErr_SetString(PyExc_TypeError, "_core.empty takes a shape and a dtype");
    return nullptr;
  }
  if constexpr (kHasGpu) {
    if (PyObject* const gpu = gpu_maker()) {
      return noted(PyObject_CallMethod(gpu, "empty", "OO", args[0], args[1]));
    }
  }
  if (!PyArray_IntpConverter(args[0], &shape)) return nullptr;
  PyObject* array = nullptr;
  if (PyArray_DescrConverter(args[1], &descr)) {
    const auto size = size_t(PyDataType_ELSIZE(descr));
    const auto items = size_t(PyArray_MultiplyList(shape.ptr, shape.len));
    array = allocate(size * items, [&] { return PyArray_Empty(shape.len, shape.ptr, descr, 0); });
  }
  PyDimMem_FREE(shape.ptr);
  return array;
}

// empty_like(x): same shape, dtype and order of axes
PyObject* empty_like(PyObject*, PyObject* x) {
  if constexpr (kHasGpu) {
    if (PyObject* const gpu = gpu_maker()) {
      return noted(PyObject_CallMethod(gpu, "empty_like", "O", x));
    }
  }
  PyObject* model = PyArray_FROM_O(x);
  if (!model) return nullptr;
  const auto array = reinterpret_cast<PyArrayObject*>(model);
  PyObject* made = allocate(size_t(PyArray_NBYTES(array)),
                            [&] { return PyArray_NewLikeArray(array, NPY_KEEPORDER, nullptr, 0); });
  Py_DECREF(model);
  return made;
}

// result_dtype(*arrays): by the rule of core/dtype.h; arguments that are no float arrays don't count
PyObject* result_dtype(PyObject*, PyObject* const* args, Py_ssize_t count) {
  DType found = DType::other;
  for (Py_ssize_t i = 0; i < count; ++i) {
    DType own = DType::other;
    if (PyArray_Check(args[i])) {
      own = dtype_of(PyArray_DESCR(reinterpret_cast<PyArrayObject*>(args[i])));
    } else if constexpr (kHasGpu) {
      own = to_view(args[i]).dtype;
    }
    if (is_float(own)) found = found == DType::other ? own : promote(found, own);
  }
  return reinterpret_cast<PyObject*>(PyArray_DescrFromType(type_number(found)));
}

PyMethodDef kResultDtype = {
    "result_dtype", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(result_dtype)),
    METH_FASTCALL, "result_dtype(*arrays): the dtype of what these operands make together"};
PyMethodDef kEmpty = {"empty", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(empty)),
                      METH_FASTCALL,
                      "empty(shape, dtype): as np.empty, large ones in recycled memory"};
PyMethodDef kEmptyLike = {"empty_like", empty_like, METH_O,
                          "empty_like(x): as np.empty_like, large ones in recycled memory"};

}  // namespace

// A fresh C-contiguous array of a float dtype, or int32.
PyObject* new_array(const int64_t* shape, int rank, DType dtype) {
  npy_intp dims[kMaxRank];
  int64_t items = 1;
  for (int d = 0; d < rank; ++d) items *= dims[d] = shape[d];
  const int type = type_number(dtype);
  if constexpr (kHasGpu) {
    if (PyObject* const gpu = gpu_maker()) {
      return noted(PyObject_CallMethod(gpu, "empty", "NN", PyArray_IntTupleFromIntp(rank, dims),
                                       PyArray_DescrFromType(type)));
    }
  }
  return allocate(size_t(items * dtype_size(dtype)),
                  [&] { return PyArray_SimpleNew(rank, dims, type); });
}

DType float_dtype(const char* op, const char* arg, PyObject* dtype) {
  PyArray_Descr* descr = nullptr;
  if (!PyArray_DescrConverter(dtype, &descr)) throw pybind11::error_already_set();
  View v;  // so that the error is worded as for an array of that dtype
  v.present = true;
  v.dtype = dtype_of(descr);
  if (v.dtype == DType::other) v.note = "another dtype";
  Py_DECREF(descr);
  Check{op}.dtype(arg, v, kFloats);
  return v.dtype;
}

void register_arrays(pybind11::module_& m) {
  PyObject* const name = m.attr("__name__").ptr();
  m.add_object("result_dtype", PyCFunction_NewEx(&kResultDtype, nullptr, name));
  m.add_object("empty", PyCFunction_NewEx(&kEmpty, nullptr, name));
  m.add_object("empty_like", PyCFunction_NewEx(&kEmptyLike, nullptr, name));
  m.def(
      "overlap",
      [](const View& a, const View& b) {
        return !share_memory(a, b) ? 0 : same_array(a, b) ? 2 : 1;
      },
      pybind11::arg("a"), pybind11::arg("b"),
      "0: no memory is shared; 2: it is the same array; 1: else");
  m.def("trim", &recycle::trim);
  m.def("memory_stats", [] {
    const recycle::Stats s = recycle::stats();
    return pybind11::make_tuple(s.in_use, s.peak, s.kept, s.reused);
  });
}

}  // namespace tilewright::python
