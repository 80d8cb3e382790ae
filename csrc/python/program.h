// Recording: while this thread records, every call of a kernel is added to a program before it runs,
// and what the program needs of Python's memory is kept alive.
#pragma once
#include <atomic>
#include <cstdint>
#include <string>
#include <unordered_set>
#include <vector>

#include "ops/program.h"
#include "python/arrays.h"

namespace tilewright::python {

// One call of a step, recorded; once it is finished, the program that replays it.
class RecordedProgram {
 public:
  explicit RecordedProgram(const pybind11::list& inputs);

  // The arrays and packed matrices that calls read or write, and the arrays made for them. With the
  // GIL.
  void hold(PyObject* object);
  void made(PyObject* array);

  void start();
  void stop();
  // In words, what differs from the same step's recording before; nothing where a replay of this one
  // is what a next call would do.
  std::string difference(const RecordedProgram& before) const;
  void finish();
  void run(const pybind11::list& inputs, const char* kind);

  void vary(int64_t step) { varying_.insert(step); }
  void assign(int64_t step, const std::vector<double>& numbers);
  void seed(uint64_t value) { seeds_.push_back(value); }
  void reseed(const std::vector<uint64_t>& values);
  void poison();
  pybind11::list captured() const;
  pybind11::list escaping() const;
  pybind11::object gpu_arena() const { return gpu_arena_; }
  int64_t locate(PyObject* array) const;

  Program program;

 private:
  struct Operand {
    enum Where : uint8_t { input, temporary, elsewhere } where;
    int64_t which, offset;
    View view;
  };
  struct Signature {
    const char* name;
    std::vector<Operand> operands;
    std::vector<uint64_t> numbers;
  };
  Operand place(const View& view) const;
  void* allocate_on_gpu(int64_t bytes);
  Signature sign(int64_t step) const;

  struct Made {
    pybind11::object array;
    Memory memory;
  };
  std::vector<Memory> inputs_;
  std::vector<Made> made_;
  std::vector<pybind11::object> held_;
  std::unordered_set<PyObject*> known_;
  std::unordered_set<int64_t> varying_;
  std::vector<uint64_t> seeds_;
  std::vector<std::pair<uint64_t*, size_t>> seeded_;
  pybind11::object gpu_arena_ = pybind11::none();
  mutable std::vector<Signature> signatures_;
};

extern std::atomic<int> g_recordings;  // of all threads
extern constinit thread_local RecordedProgram* t_recording;

inline RecordedProgram* recording() {
  return g_recordings.load(std::memory_order_relaxed) ? t_recording : nullptr;
}

// run(op), recorded where this thread records.
template <class Op>
void call(const Op& op) {
  if (RecordedProgram* r = recording()) r->program.add(op);
  run(op);
}

}  // namespace tilewright::python
