// OptionScope: what is given, in the place of what the thread's calls ran under before.
#include "core/options.h"

#include "cpu/isa.h"

namespace tilewright {

OptionScope::OptionScope(const Options& options)
    : before_(std::make_unique<CallOptions>(call_options())) {
  CallOptions made = *before_;
  if (options.threads != 0) {
    check_option_threads(options.threads);
    made.threads = options.threads;
  }
  if (!options.isa.empty()) made.kernels = &kernels_of(options.isa);
  if (options.precision != Precision::unset) made.precision = options.precision;
  if (options.batch_invariant != Choice::unset) made.batch_invariant = options.batch_invariant;
  set_call_options(made);
}

OptionScope::~OptionScope() {
  set_call_options(*before_);
}

}  // namespace tilewright
