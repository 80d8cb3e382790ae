// What attention's binding needs of the cache's.
#pragma once
#include <optional>

#include "cpu/kvcache.h"
#include "python/arrays.h"

namespace tilewright::python {

// k as a view, or the layer of a KVCache that stands for it as it is now.
std::optional<KVSnapshot> load_keys(PyObject* k, View& view);

}  // namespace tilewright::python
