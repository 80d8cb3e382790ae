// The emulator's settings and memory, for tests: the submodule `emulator` of an emulated extension.
#include "emulator/emulator.h"

#include <dlfcn.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>

#include "cuda/gpu/stream.h"
#include "python/gpu/emulator.h"

namespace py = pybind11;

namespace tilewright::python {
namespace {

// Bytes of device memory, which NumPy may look at like any other.
py::array allocate(size_t bytes) {
  void* const data = gpu::allocate(bytes, gpu::Stream{});
  const py::capsule owner(data, [](void* p) { emulator::release(p); });
  return py::array_t<uint8_t>({bytes}, {1}, static_cast<uint8_t*>(data), owner);
}

void set_schedule(const std::string& order, unsigned seed) {
  if (order == "in order") return emulator::set_schedule(emulator::Order::in_order, seed);
  if (order == "reversed") return emulator::set_schedule(emulator::Order::reversed, seed);
  if (order == "shuffled") return emulator::set_schedule(emulator::Order::shuffled, seed);
  throw py::value_error("order must be 'in order', 'reversed' or 'shuffled', got '" + order + "'");
}

py::tuple extent(const dim3& d) {
  return py::make_tuple(d.x, d.y, d.z);
}

py::dict described(const emulator::Launch& launch) {
  Dl_info program{};
  dladdr(launch.kernel, &program);
  const auto address = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p); };
  py::dict d;
  d["what"] = launch.what;
  d["program"] = program.dli_fname;
  d["offset"] = address(launch.kernel) - address(program.dli_fbase);
  d["grid"] = extent(launch.grid);
  d["block"] = extent(launch.block);
  d["shared_bytes"] = launch.shared_bytes;
  py::list parameters;
  for (const emulator::Parameter& p : launch.single) {
    parameters.append(py::bytes(static_cast<const char*>(p.data), p.size));
  }
  d["parameters"] = parameters;
  return d;
}

void set_runner(const std::optional<py::function>& runner) {
  if (!runner) return emulator::set_runner({});
  emulator::set_runner([run = *runner](const emulator::Launch& launch) {
    const py::gil_scoped_acquire gil;
    return run(described(launch)).cast<bool>();
  });
}

py::dict take_counters() {
  const emulator::Counters c = emulator::take_counters();
  py::dict counters;
  counters["launches"] = c.launches;
  counters["blocks"] = c.blocks;
  counters["barriers"] = c.barriers;
  counters["shuffles"] = c.shuffles;
  counters["mma"] = c.mma;
  counters["ldmatrix"] = c.ldmatrix;
  counters["cp_async"] = c.cp_async;
  counters["ldmatrix_wavefronts"] = c.ldmatrix_wavefronts;
  counters["ldmatrix_ideal"] = c.ldmatrix_ideal;
  py::list sites;
  for (const emulator::SiteCounters& s : c.sites) {
    py::dict site;
    site["where"] = s.where;
    site["space"] = s.space;
    site["write"] = s.write;
    site["instructions"] = s.instructions;
    site["wavefronts"] = s.wavefronts;
    site["ideal_wavefronts"] = s.ideal_wavefronts;
    site["sectors"] = s.sectors;
    site["ideal_sectors"] = s.ideal_sectors;
    sites.append(site);
  }
  counters["sites"] = sites;
  return counters;
}

}  // namespace

void register_emulator(py::module_& m) {
  py::module_ e = m.def_submodule("emulator", "runs CUDA kernels on the CPU, and checks them");
  e.def("allocate", &allocate, py::arg("bytes"), "fresh bytes are 0xFF");
  e.def("set_memory_limit", &emulator::set_memory_limit, py::arg("bytes"),
        "what may be allocated at once, as if the card had no more");
  e.def("allocated_bytes", &emulator::allocated_bytes, "what is not released yet");
  e.def("allocations", &emulator::allocations, "the address and size of each");
  e.def("set_runner", &set_runner, py::arg("runner"),
        "a function of a launch (a dict), which returns whether it has run it; None for none");
  e.def("checked", &emulator::checked, "whether every load and store of a kernel is checked");
  e.def("set_schedule", &set_schedule, py::arg("order"), py::arg("seed") = 0,
        "which threads go on first: 'in order', 'reversed' or 'shuffled'");
  e.def(
      "set_truncated",
      [](bool on) {
        emulator::set_accumulation(on ? emulator::Accumulation::truncated
                                      : emulator::Accumulation::rounded);
      },
      py::arg("on"), "whether a float mma cuts its sums, as tensor cores do");
  e.def("set_shared_limit", &emulator::set_shared_limit, py::arg("bytes"));
  e.def("take_counters", &take_counters, "what launches did since the last call");
}

}  // namespace tilewright::python
