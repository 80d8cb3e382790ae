// What attention's binding needs of the cache's.
#pragma once
#include <optional>

#include "cpu/kvcache.h"
#include "python/arrays.h"
#include "tilewright/ops.h"

namespace tilewright::python {

// k as a view, or the layer of a KVCache that stands for it as it is now.
std::optional<KVSnapshot> load_keys(PyObject* k, View& view);

// Adds to this thread's recording: attention to what the layer k holds when it is replayed.
void record_cached(const pybind11::object& k, const Attention& op);

}  // namespace tilewright::python
