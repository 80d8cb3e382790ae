// What a call runs under: the process's defaults, unless the caller's context says otherwise.
//
// A context's options reach a call as a thread-local OptionScope around it: two calls at the same
// time, of two threads or of two tasks that take turns on one, never see each other's. The pool's
// workers take over the options of the region that they work for.
#pragma once
#include <stdint.h>

#include <string>

namespace tilewright {

struct KernelTable;

// How exactly float32 is multiplied: highest keeps the bound of plain float32 arithmetic.
enum class Precision : uint8_t { unset, highest, high, medium };
enum class Choice : uint8_t { unset, no, yes };

struct Options {  // what is unset is the process's
  int threads = 0;
  const KernelTable* kernels = nullptr;  // of the ISA level
  Precision precision = Precision::unset;
  Choice batch_invariant = Choice::unset;
};

const Options& context_options();  // of the call that this thread is in

class OptionScope {
 public:
  explicit OptionScope(const Options& options);
  ~OptionScope();
  OptionScope(const OptionScope&) = delete;
  OptionScope& operator=(const OptionScope&) = delete;

 private:
  Options before_;
};

// In effect here. Threads and kernels have their own: num_threads(), kernels().
Precision precision();
bool batch_invariant();
// The process's defaults.
void set_precision(Precision p);
void set_batch_invariant(bool on);

Precision precision_of(const std::string& name);  // UnsupportedError for an unknown one
const char* precision_name(Precision p);

}  // namespace tilewright
