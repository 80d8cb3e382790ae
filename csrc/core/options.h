// What a call runs under: the process's defaults, unless the caller's context says otherwise.
//
// A context's options reach a call as a thread-local CallScope around it: two calls at the same
// time, of two threads or of two tasks that take turns on one, never see each other's. The pool's
// workers take over the options of the region that they work for. C++ users have OptionScope
// (tilewright/options.h).
#pragma once
#include <string>

#include "tilewright/options.h"

namespace tilewright {

struct KernelTable;

struct CallOptions {  // what is unset is the process's
  int threads = 0;
  const KernelTable* kernels = nullptr;  // of the ISA level
  Precision precision = Precision::unset;
  Choice batch_invariant = Choice::unset;
};

const CallOptions& call_options();  // of the call that this thread is in
void set_call_options(const CallOptions& options);

class CallScope {
 public:
  explicit CallScope(const CallOptions& options) : before_(call_options()) {
    set_call_options(options);
  }
  ~CallScope() { set_call_options(before_); }
  CallScope(const CallScope&) = delete;
  CallScope& operator=(const CallScope&) = delete;

 private:
  CallOptions before_;
};

// ShapeError, as tw.options words it, unless n is a number of threads.
void check_option_threads(int n);

Precision precision_of(const std::string& name);  // UnsupportedError for an unknown one
const char* precision_name(Precision p);

}  // namespace tilewright
