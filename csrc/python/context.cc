#include "python/context.h"

#include <pybind11/stl.h>

#include <string>

#include "core/parallel.h"
#include "cpu/isa.h"
#include "python/module.h"

namespace py = pybind11;

namespace tilewright::python {

std::atomic<bool> g_options_used{false};

namespace {

PyObject* g_variable = nullptr;  // ContextVar[Options]

// What is given, in the place of what `made` says.
CallOptions merge(CallOptions made, std::optional<int> threads,
                  const std::optional<std::string>& isa,
                  const std::optional<std::string>& precision,
                  std::optional<bool> batch_invariant) {
  if (threads) check_option_threads(made.threads = *threads);
  if (isa) made.kernels = &kernels_of(*isa);
  if (precision) made.precision = precision_of(*precision);
  if (batch_invariant) made.batch_invariant = *batch_invariant ? Choice::yes : Choice::no;
  return made;
}

// Until leave_options(token), for this context.
py::object enter_options(std::optional<int> threads, const std::optional<std::string>& isa,
                         const std::optional<std::string>& precision,
                         std::optional<bool> batch_invariant) {
  const py::object made =
      py::cast(merge(current_options(), threads, isa, precision, batch_invariant));
  PyObject* token = PyContextVar_Set(g_variable, made.ptr());
  if (!token) throw py::error_already_set();
  g_options_used = true;
  return py::reinterpret_steal<py::object>(token);
}

void leave_options(const py::object& token) {
  if (PyContextVar_Reset(g_variable, token.ptr()) < 0) throw py::error_already_set();
}

// For the process; nothing is set when one value is impossible.
void set_options(std::optional<int> threads, const std::optional<std::string>& isa,
                 const std::optional<std::string>& precision, std::optional<bool> batch_invariant) {
  const CallOptions checked = merge({}, threads, isa, precision, batch_invariant);
  if (threads) set_num_threads(*threads);
  if (isa) set_isa(*isa);
  if (precision) set_precision(checked.precision);
  if (batch_invariant) set_batch_invariant(*batch_invariant);
}

py::dict effective_options() {
  const ContextScope scope;
  py::dict found;
  found["precision"] = precision_name(precision());
  found["threads"] = num_threads();
  found["isa"] = kernels().isa;
  found["batch_invariant"] = batch_invariant();
  return found;
}

}  // namespace

CallOptions current_options() {
  PyObject* value = nullptr;
  if (PyContextVar_Get(g_variable, nullptr, &value) < 0) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value).cast<CallOptions>();
}

void register_context(py::module_& m) {
  py::class_<CallOptions>(m, "Options", "what a context of tw.options says");
  g_variable = PyContextVar_New("tilewright_options", py::cast(CallOptions{}).release().ptr());
  if (!g_variable) throw py::error_already_set();
  m.def("enter_options", &enter_options, py::arg("threads"), py::arg("isa"), py::arg("precision"),
        py::arg("batch_invariant"), "a token for leave_options");
  m.def("leave_options", &leave_options, py::arg("token"));
  m.def("set_options", &set_options, py::arg("threads"), py::arg("isa"), py::arg("precision"),
        py::arg("batch_invariant"));
  m.def("effective_options", effective_options, "precision, threads, isa, batch_invariant");
}

}  // namespace tilewright::python
