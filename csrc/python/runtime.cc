// Levels, threads, environment, build: what `python -m tilewright` reports and the setters behind
// it.
#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "core/env.h"
#include "core/limits.h"
#include "core/parallel.h"
#include "core/trace.h"
#include "cpu/isa.h"
#include "python/context.h"
#include "python/module.h"

namespace py = pybind11;

namespace tilewright::python {
namespace {

// Runs Python's signal handlers; -1 when one raised. Called from a kernel's main thread, which
// holds no GIL there.
int check_signals() {
  const py::gil_scoped_acquire gil;
  return PyErr_CheckSignals();
}

py::list list_levels() {
  const ContextScope scope;
  py::list levels;
  for (const IsaLevel& l : isa_levels()) {
    levels.append(py::make_tuple(l.name, l.compiled, l.supported, l.active));
  }
  return levels;
}

py::list list_environment() {
  py::list rows;
  for (const env::Variable& v : env::variables()) {
    rows.append(py::make_tuple(v.name, env::get(v.name), v.meaning));
  }
  return rows;
}

py::list list_thread_limits(const std::string& root) {
  py::list rows;
  for (const ThreadLimit& l : thread_limits(root)) rows.append(py::make_tuple(l.source, l.cores));
  return rows;
}

// The kernel calls that run() makes, described.
py::list record_calls(const py::object& run) {
  const Recording recording;
  run();
  py::list calls;
  for (const CallRecord& c : recording.calls) {
    py::dict call;
    call["op"] = c.op;
    call["kernel"] = c.kernel;
    call["isa"] = c.isa;
    call["shape"] = c.shape;
    call["threads"] = c.threads;
    call["tasks"] = std::max<int64_t>(1, c.tasks);
    call["microseconds"] = c.microseconds;
    call["details"] = py::dict();
    for (const auto& [name, value] : c.details) call["details"][name.c_str()] = value;
    call["notes"] = py::tuple(py::cast(c.notes));
    calls.append(call);
  }
  return calls;
}

// (op, kernel, ISA level, count); of fallbacks: (op, reason, "", count).
py::list list_counts(const std::vector<CallCount>& counts) {
  py::list rows;
  for (const CallCount& c : counts) rows.append(py::make_tuple(c.op, c.kernel, c.isa, c.count));
  return rows;
}

py::dict build_info() {
  py::dict info;
  info["version"] = TILEWRIGHT_VERSION;
  info["compiler"] = __VERSION__;
  info["build_type"] = TILEWRIGHT_BUILD_TYPE;
  info["flags"] = TILEWRIGHT_ISA_FLAGS;  // "level: flags|" for each level
  info["sanitized"] =
#ifdef __SANITIZE_ADDRESS__
      true;
#else
      false;
#endif
  return info;
}

}  // namespace

void register_runtime(py::module_& m) {
  set_poll(check_signals);
  m.def("isa_levels", list_levels, "(name, compiled, supported, active) of every level");
  m.def("set_isa", &set_isa, py::arg("name"));
  const auto context = py::call_guard<ContextScope>();
  m.def("active_isa", [] { return kernels().isa; }, context, "name of the active level");
  m.def("get_num_threads", &num_threads, context);
  m.def("thread_limits", list_thread_limits, py::arg("root") = "",
        "(source, cores) of what bounds the default; the cgroup's below `root`");
  m.def("set_num_threads", &set_num_threads, py::arg("n"));
  m.def("environment", list_environment, "(name, value, meaning) of every variable that is read");
  m.def("build_info", build_info);
  m.def("record_calls", &record_calls, py::arg("run"), "the kernel calls that run() makes");
  m.def("call_counts", [] { return list_counts(call_counts()); }, "(op, kernel, isa, count)");
  m.def(
      "fallback_counts", [] { return list_counts(fallback_counts()); },
      "(op, reason, \"\", count)");
}

}  // namespace tilewright::python
