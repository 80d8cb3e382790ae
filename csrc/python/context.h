// tw.options reaches the kernels here: the options of Python's current context (a ContextVar), as an
// CallScope around one call.
#pragma once
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <atomic>
#include <optional>

#include "core/options.h"
#include "core/parallel.h"

namespace tilewright::python {

CallOptions current_options();            // needs the GIL
extern std::atomic<bool> g_options_used;  // false until tw.options is used: calls don't look before

// Around whatever depends on threads, ISA level or precision.
class ContextScope {
 public:
  ContextScope() {
    if (g_options_used.load(std::memory_order_relaxed)) scope_.emplace(current_options());
  }

 private:
  std::optional<CallScope> scope_;
};

// py::gil_scoped_release without its look-up of pybind11's internals.
//
// Where the interpreter has meanwhile ended, up to CPython 3.13, a daemon thread that asks for the
// GIL is made to leave by pthread_exit: an unwinding that would run destructors without the GIL, and
// that must not pass this one. The thread stays here instead, as it does from CPython 3.14 on, until
// the process is gone.
class NoGil {
 public:
  NoGil() : state_(PyEval_SaveThread()) { begin_call(); }
  ~NoGil() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      for (;;) pause();
    }
  }
  NoGil(const NoGil&) = delete;
  NoGil& operator=(const NoGil&) = delete;

 private:
  PyThreadState* state_;
};

// Around every call of a kernel: the context's options, and the GIL released.
class KernelCall {
 private:
  ContextScope context_;
  NoGil nogil_;
};

}  // namespace tilewright::python
