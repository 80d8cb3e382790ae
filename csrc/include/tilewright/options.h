// Options of calls: those of the process, and those of a scope.
//
//     {
//       const OptionScope scope({.threads = 1, .precision = Precision::high});
//       run(op);  // on this thread alone; float32 may be multiplied less exactly
//     }
//
// A scope counts for the thread that made it: calls of other threads at the same time don't see it.
// Threads and ISA level of the process: runtime.h.
#pragma once
#include <stdint.h>

#include <memory>
#include <string>

namespace tilewright {

struct CallOptions;  // core/options.h: what a call runs under

// How exactly float32 is multiplied: highest keeps the bound of plain float32 arithmetic. high (off by
// about 2^-17 of the sum of absolute terms) and medium (2^-9) permit less where a kernel is faster
// for it, on matrix units.
enum class Precision : uint8_t { unset, highest, high, medium };
enum class Choice : uint8_t { unset, no, yes };

// What is unset stays as it is around the scope.
struct Options {
  int threads = 0;  // 1 to 1024
  std::string isa;  // a level's name (isa_levels())
  Precision precision = Precision::unset;
  // `no` permits that a row's bits depend on the number of rows: few of them may take the float32
  // kernel where more are multiplied on matrix units.
  Choice batch_invariant = Choice::unset;
};

class OptionScope {
 public:
  // ShapeError: threads. UnsupportedError: a level that is unknown or not supported here. Then
  // nothing has changed.
  explicit OptionScope(const Options& options);
  // On the thread that made it, the last one first.
  ~OptionScope();
  OptionScope(const OptionScope&) = delete;
  OptionScope& operator=(const OptionScope&) = delete;

 private:
  std::unique_ptr<const CallOptions> before_;
};

// In effect here, for this thread.
Precision precision();
bool batch_invariant();
// The process's: what counts outside of scopes. At first highest, and yes.
void set_precision(Precision p);  // not `unset`
void set_batch_invariant(bool on);

}  // namespace tilewright
