// Programs: what a recording keeps, how two recordings are compared, and the replay.
#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL tilewright_numpy
#define NO_IMPORT_ARRAY
#include "python/program.h"

#include <numpy/arrayobject.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/device.h"
#include "core/dtype.h"
#include "core/trace.h"
#include "cpu/isa.h"
#include "python/context.h"
#include "python/gpu/arrays.h"
#include "python/module.h"

namespace py = pybind11;

namespace tilewright::python {

std::atomic<int> g_recordings{0};
constinit thread_local RecordedProgram* t_recording = nullptr;

namespace {

PyArrayObject* as_array(PyObject* object) {
  return reinterpret_cast<PyArrayObject*>(object);
}

// From an array's first element to the end of its last: the arrays here have no negative strides, and
// those of a GPU no gaps. Nothing of what is no array.
Memory memory_of(PyObject* object) {
  if (!PyArray_Check(object)) {
    if constexpr (kHasGpu) return gpu_memory(object);
    return {nullptr, 0};
  }
  PyArrayObject* const a = as_array(object);
  int64_t bytes = PyDataType_ELSIZE(PyArray_DESCR(a));
  for (int d = 0; d < PyArray_NDIM(a); ++d) {
    if (PyArray_DIM(a, d) == 0) return {PyArray_DATA(a), 0};
    bytes += (PyArray_DIM(a, d) - 1) * PyArray_STRIDE(a, d);
  }
  return {PyArray_DATA(a), bytes};
}

class Signing final : public Fields {
 public:
  std::vector<View> views;
  std::vector<Number> numbers;
  void view(View& v) override { views.push_back(v); }
  void number(const Number& n) override { numbers.push_back(n); }
};

uint64_t bits_of(const Number& n) {
  uint64_t bits = 0;
  std::memcpy(&bits, n.at, n.size());
  return bits;
}

bool same_layout(const View& a, const View& b) {
  return a.present == b.present && a.dtype == b.dtype && a.rank == b.rank &&
         std::equal(a.shape, a.shape + a.rank, b.shape) &&
         std::equal(a.stride, a.stride + a.rank, b.stride);
}

std::string describe_operand(const View& v) {
  std::string text = std::string("a ") + dtype_name(v.dtype) + " array of shape (";
  for (int d = 0; d < v.rank; ++d) text += (d ? ", " : "") + std::to_string(v.shape[d]);
  return text + ")";
}

}  // namespace

RecordedProgram::RecordedProgram(const py::list& inputs) {
  for (const py::handle input : inputs) inputs_.push_back(memory_of(input.ptr()));
}

void RecordedProgram::hold(PyObject* object) {
  if (object == Py_None || !known_.insert(object).second) return;
  held_.push_back(py::reinterpret_borrow<py::object>(object));
}

void RecordedProgram::made(PyObject* array) {
  made_.push_back({py::reinterpret_borrow<py::object>(array), memory_of(array)});
}

void RecordedProgram::start() {
  t_recording = this;
  ++g_recordings;
}

void RecordedProgram::stop() {
  t_recording = nullptr;
  --g_recordings;
  for (int64_t i = 0; i < program.size(); ++i) signatures_.push_back(sign(i));
}

RecordedProgram::Operand RecordedProgram::place(const View& view) const {
  if (!view.present || view.size() == 0) return {Operand::elsewhere, 0, 0, view};
  const auto offset = [&](const Memory& m) {
    return view.ptr<const char>() - static_cast<const char*>(m.data);
  };
  for (size_t i = 0; i < inputs_.size(); ++i) {
    if (inputs_[i].holds(view.data)) {
      return {Operand::input, int64_t(i), offset(inputs_[i]), view};
    }
  }
  for (size_t i = 0; i < made_.size(); ++i) {
    const Memory& m = made_[i].memory;
    if (m.holds(view.data)) return {Operand::temporary, int64_t(i), offset(m), view};
  }
  return {Operand::elsewhere, 0, int64_t(reinterpret_cast<uintptr_t>(view.data)), view};
}

// A seed that was drawn is the draw's number: two calls draw different ones.
RecordedProgram::Signature RecordedProgram::sign(int64_t i) const {
  ProgramStep& step = const_cast<Program&>(program).step(i);
  Signing signing;
  step.visit(signing);
  Signature made{step.name(), {}, {}};
  for (const View& v : signing.views) made.operands.push_back(place(v));
  if (varying_.count(i)) return made;
  for (const Number& n : signing.numbers) {
    uint64_t bits = bits_of(n);
    if (n.kind == Number::u64) {
      const auto drawn = std::find(seeds_.begin(), seeds_.end(), bits);
      if (drawn != seeds_.end()) bits = uint64_t(drawn - seeds_.begin());
    }
    made.numbers.push_back(bits);
  }
  return made;
}

std::string RecordedProgram::difference(const RecordedProgram& before) const {
  const size_t count = std::min(signatures_.size(), before.signatures_.size());
  for (size_t i = 0; i < count; ++i) {
    const Signature &now = signatures_[i], &then = before.signatures_[i];
    const std::string where = "kernel call " + std::to_string(i + 1);
    if (std::strcmp(now.name, then.name) != 0) {
      return where + " is " + now.name + ", and was " + then.name + " in the call before";
    }
    const std::string what = where + " (" + now.name + ")";
    if (now.operands.size() != then.operands.size()) return what + " has another list of arrays";
    for (size_t k = 0; k < now.operands.size(); ++k) {
      const Operand &a = now.operands[k], &b = then.operands[k];
      if (!same_layout(a.view, b.view)) return what + " has operands of other shapes";
      if (a.where == b.where && a.which == b.which && a.offset == b.offset) continue;
      return what + " takes " + describe_operand(a.view) +
             " that was another one in the call before: it is made outside of the registry's ops "
             "(by NumPy's arithmetic, a conversion or a copy), or replaced between calls";
    }
    if (now.numbers != then.numbers) {
      return what + " has a number that was another one in the call before";
    }
  }
  if (signatures_.size() == before.signatures_.size()) return "";
  return "it makes " + std::to_string(signatures_.size()) + " kernel calls, and made " +
         std::to_string(before.signatures_.size()) + " the time before";
}

// What only the program sees moves into the arena, and its arrays are let go. Whoever else holds one
// (a result, a gradient) keeps it: the program writes there each time.
void RecordedProgram::finish() {
  const auto ours = [&](const py::object& object) {
    const void* const data = memory_of(object.ptr()).data;
    const auto holds = [&](const Memory& m) { return data && m.holds(data); };
    return std::any_of(inputs_.begin(), inputs_.end(), holds) ||
           std::any_of(made_.begin(), made_.end(),
                       [&](const Made& m) { return m.memory.holds(data); });
  };
  held_.erase(std::remove_if(held_.begin(), held_.end(), ours), held_.end());
  known_.clear();
  std::vector<Memory> temporaries;
  for (const Made& m : made_) {
    if (Py_REFCNT(m.array.ptr()) == 1 && m.memory.bytes > 0) temporaries.push_back(m.memory);
  }
  program.plan(inputs_, temporaries, [&](int64_t bytes) { return allocate_on_gpu(bytes); });
  made_.erase(std::remove_if(made_.begin(), made_.end(),
                             [](const Made& m) { return Py_REFCNT(m.array.ptr()) == 1; }),
              made_.end());
  for (int64_t i = 0; i < program.size(); ++i) {
    Signing signing;
    program.step(i).visit(signing);
    for (const Number& n : signing.numbers) {
      if (n.kind != Number::u64) continue;
      const auto drawn = std::find(seeds_.begin(), seeds_.end(), bits_of(n));
      if (drawn == seeds_.end()) continue;
      seeded_.emplace_back(static_cast<uint64_t*>(n.at), size_t(drawn - seeds_.begin()));
    }
  }
}

// By the device that calls run on, as an array's memory: it lives as long as the program.
void* RecordedProgram::allocate_on_gpu(int64_t bytes) {
  if constexpr (kHasGpu) {
    gpu_arena_ = py::handle(gpu_maker()).attr("empty")(py::make_tuple(bytes), "uint8");
    return const_cast<void*>(gpu_memory(gpu_arena_.ptr()).data);
  }
  return nullptr;
}

void RecordedProgram::run(const py::list& inputs, const char* kind) {
  for (size_t i = 0; i < inputs.size(); ++i) {
    program.rebind(int64_t(i), const_cast<void*>(memory_of(inputs[i].ptr()).data));
  }
  const KernelCall scope;
  program.run(kind);
}

void RecordedProgram::assign(int64_t step, const std::vector<double>& numbers) {
  Signing signing;
  program.step(step).visit(signing);
  if (signing.numbers.size() != numbers.size()) {
    throw std::logic_error("program: a step has other numbers than are assigned");
  }
  for (size_t i = 0; i < numbers.size(); ++i) {
    const uint64_t before = bits_of(signing.numbers[i]);
    signing.numbers[i].set(numbers[i]);
    if (bits_of(signing.numbers[i]) != before) program.changed();
  }
}

void RecordedProgram::reseed(const std::vector<uint64_t>& values) {
  for (const auto& [at, draw] : seeded_) *at = values[draw];
  program.changed();
}

// What the program reads or writes and does not own: parameters, gradients, state.
py::list RecordedProgram::captured() const {
  py::list found;
  for (const py::object& object : held_) {
    if (memory_of(object.ptr()).data && place(to_view(object.ptr())).where == Operand::elsewhere) {
      found.append(object);
    }
  }
  return found;
}

// So that nothing of the recorded call is left where the program writes in the CPU's memory.
void RecordedProgram::poison() {
  program.poison();
  for (const Made& m : made_) {
    if (m.memory.device != Device::cpu) continue;
    std::memset(const_cast<void*>(m.memory.data), 0xff, size_t(m.memory.bytes));
  }
}

py::list RecordedProgram::escaping() const {
  py::list found;
  for (const Made& m : made_) found.append(m.array);
  return found;
}

// Of an array's memory: the number of the input, -1 for what the step made, -2 for all else.
int64_t RecordedProgram::locate(PyObject* array) const {
  const View view = to_view(array);
  if (view.size() == 0) return -1;
  const Operand at = place(view);
  return at.where == Operand::input ? at.which : at.where == Operand::temporary ? -1 : -2;
}

void register_program(py::module_& m) {
  py::class_<RecordedProgram>(m, "Program", "A step's kernel calls, recorded to be run again")
      .def(py::init<const py::list&>(), py::arg("inputs"))
      .def("start", &RecordedProgram::start)
      .def("stop", &RecordedProgram::stop)
      .def("difference", &RecordedProgram::difference, py::arg("before"))
      .def("finish", &RecordedProgram::finish)
      .def(
          "run", [](RecordedProgram& self, const py::list& inputs) { self.run(inputs, "replay"); },
          py::arg("inputs"))
      .def(
          "prove", [](RecordedProgram& self, const py::list& inputs) { self.run(inputs, "proof"); },
          py::arg("inputs"), "run, over the state that the recorded call began with")
      .def("vary", &RecordedProgram::vary, py::arg("step"))
      .def("assign", &RecordedProgram::assign, py::arg("step"), py::arg("numbers"))
      .def("seed", &RecordedProgram::seed, py::arg("value"))
      .def("reseed", &RecordedProgram::reseed, py::arg("values"))
      .def("captured", &RecordedProgram::captured)
      .def("escaping", &RecordedProgram::escaping)
      .def(
          "locate",
          [](const RecordedProgram& self, const py::object& array) {
            return self.locate(array.ptr());
          },
          py::arg("array"))
      .def("poison", &RecordedProgram::poison)
      .def_property_readonly("gpu_arena", &RecordedProgram::gpu_arena)
      .def_property_readonly("size", [](const RecordedProgram& p) { return p.program.size(); })
      .def_property_readonly("done", [](const RecordedProgram& p) { return p.program.done(); })
      .def_property_readonly("arena_bytes",
                             [](const RecordedProgram& p) { return p.program.arena_bytes(); });
  m.def(
      "options_key",
      [] {
        const ContextScope scope;
        return py::make_tuple(kernels().isa, int(precision()), batch_invariant());
      },
      "what a program's kernels depend on beside their arguments");
  m.def(
      "count_recording",
      [](bool again) {
        const Trace trace("program", kernels().isa, [] { return std::string(); });
        Trace::kernel(again ? "record again" : "record");
      },
      py::arg("again"));
}

}  // namespace tilewright::python
