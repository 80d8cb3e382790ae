// KVCache and its layers. What changes or lists pages runs under the GIL (without one, under the
// object's own lock); converting rows and attention itself do not.
#include "python/kvcache.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/dtype.h"
#include "python/context.h"
#include "python/module.h"
#include "python/program.h"
#include "tilewright/ops.h"

namespace py = pybind11;

namespace tilewright::python {
namespace {

constexpr const char* kChanged = "KVCache.append: another thread has changed the layer meanwhile";

// The lock of an object in builds of Python without a GIL; nothing in others.
class Locked {
 public:
#if PY_VERSION_HEX >= 0x030d0000
  explicit Locked(py::handle object) { PyCriticalSection_Begin(&section_, object.ptr()); }
  ~Locked() { PyCriticalSection_End(&section_); }
#else
  explicit Locked(py::handle) {}
#endif
  Locked(const Locked&) = delete;
  Locked& operator=(const Locked&) = delete;

 private:
#if PY_VERSION_HEX >= 0x030d0000
  PyCriticalSection section_;
#endif
};

// A layer of a cache; it sees what is appended later.
struct KVLayer {
  py::object cache;
  int64_t index;
  KVSnapshot snapshot() const {
    const Locked lock(cache);
    return cache.cast<const KVCache&>().snapshot(index);
  }
};

KVCache make(int64_t layers, int64_t batch, int64_t heads_kv, int64_t head_dim, int64_t max_tokens,
             const std::string& dtype, int64_t page) {
  KVShape shape{layers, batch, heads_kv, head_dim, max_tokens, page, DType::s8};
  for (const DType t : kFloats) {
    if (dtype == dtype_name(t)) shape.dtype = t;
  }
  if (dtype != dtype_name(shape.dtype)) {
    Check{"KVCache"}.dtype_error("dtype must be 'float32', 'bfloat16', 'float16' or 'int8', got '" +
                                 dtype + "'");
  }
  return KVCache(shape);
}

// While a program runs, which it does without the GIL.
std::function<void(const View&, const View&)> replayed_append(const py::object& self,
                                                              int64_t layer) {
  return [self, layer](const View& k, const View& v) {
    auto& cache = self.cast<KVCache&>();
    KVCache::Append append;
    {
      const py::gil_scoped_acquire gil;
      const Locked lock(self);
      check_operands(KVAppend{&cache, layer, k, v});
      append = cache.plan(layer, k.shape[2], k.device);
    }
    cache.fill(append, k, v);
    const py::gil_scoped_acquire gil;
    const Locked lock(self);
    if (!cache.commit(append)) throw std::runtime_error(kChanged);
  };
}

void append(const py::object& self, int64_t layer, const View& k, const View& v) {
  auto& cache = self.cast<KVCache&>();
  KVCache::Append append;
  {
    const Locked lock(self);
    check_operands(KVAppend{&cache, layer, k, v});
    append = cache.plan(layer, k.shape[2], k.device);
  }
  {
    const KernelCall context;
    cache.fill(append, k, v);
  }
  const Locked lock(self);
  if (!cache.commit(append)) throw std::runtime_error(kChanged);
  if (RecordedProgram* r = recording()) {
    r->program.add(CachedAppend{k, v, replayed_append(self, layer), self.ptr(), layer});
  }
}

std::vector<int64_t> lengths(const py::object& self, int64_t layer) {
  const Locked lock(self);
  const auto& cache = self.cast<const KVCache&>();
  std::vector<int64_t> found;
  for (int64_t b = 0; b < cache.shape().batch; ++b) found.push_back(cache.length(layer, b));
  return found;
}

void truncate(const py::object& self, const std::vector<int64_t>& n) {
  const Locked lock(self);
  auto& cache = self.cast<KVCache&>();
  for (size_t b = 0; b < n.size(); ++b) cache.truncate(int64_t(b), n[b]);
}

KVCache fork(const py::object& self, const std::vector<int64_t>& sequences) {
  const Locked lock(self);
  return self.cast<const KVCache&>().fork(sequences);
}

int64_t nbytes(const py::object& self) {
  const Locked lock(self);
  return self.cast<const KVCache&>().nbytes();
}

}  // namespace

std::optional<KVSnapshot> load_keys(PyObject* k, View& view) {
  if (!is_array(k) && py::isinstance<KVLayer>(k)) return py::cast<const KVLayer&>(k).snapshot();
  view = to_view(k);
  return std::nullopt;
}

void record_cached(const py::object& k, const Attention& op) {
  const KVLayer layer = py::cast<const KVLayer&>(k);
  CachedAttention made{op,
                       [layer] {
                         const py::gil_scoped_acquire gil;
                         return layer.snapshot();
                       },
                       layer.cache.ptr(), layer.index};
  made.op.cache = nullptr;
  recording()->program.add(made);
}

void register_kvcache(py::module_& m) {
  py::class_<KVLayer>(m, "KVLayer", "A layer of a KVCache, for attention's k");
  py::class_<KVCache>(m, "KVCache", "Keys and values of past tokens, in pages")
      .def(py::init(&make), py::arg("layers"), py::arg("batch"), py::arg("heads_kv"),
           py::arg("head_dim"), py::arg("max_tokens"), py::arg("dtype"), py::arg("page"))
      .def("append", &append, py::arg("layer"), py::arg("k"), py::arg("v"))
      .def(
          "layer", [](const py::object& self, int64_t index) { return KVLayer{self, index}; },
          py::arg("index"))
      .def("lengths", &lengths, py::arg("layer"))
      .def("truncate", &truncate, py::arg("n"))
      .def("fork", &fork, py::arg("sequences"))
      .def_property_readonly("nbytes", &nbytes);
}

}  // namespace tilewright::python
