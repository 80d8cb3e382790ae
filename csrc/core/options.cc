#include "core/options.h"

#include <atomic>

#include "core/check.h"
#include "core/parallel.h"

namespace tilewright {
namespace {

thread_local CallOptions t_options;
std::atomic<Precision> g_precision{Precision::highest};
std::atomic<bool> g_batch_invariant{true};

constexpr Precision kPrecisions[] = {Precision::highest, Precision::high, Precision::medium};

}  // namespace

const CallOptions& call_options() {
  return t_options;
}
void set_call_options(const CallOptions& options) {
  t_options = options;
}

void check_option_threads(int n) {
  if (n >= 1 && n <= kMaxThreads) return;
  throw ShapeError("options: threads must be in 1.." + std::to_string(kMaxThreads) + ", got " +
                   std::to_string(n));
}

Precision precision() {
  const Precision here = t_options.precision;
  return here == Precision::unset ? g_precision.load(std::memory_order_relaxed) : here;
}
bool batch_invariant() {
  const Choice here = t_options.batch_invariant;
  return here == Choice::unset ? g_batch_invariant.load(std::memory_order_relaxed)
                               : here == Choice::yes;
}

void set_precision(Precision p) {
  g_precision.store(p);
}
void set_batch_invariant(bool on) {
  g_batch_invariant.store(on);
}

Precision precision_of(const std::string& name) {
  for (const Precision p : kPrecisions) {
    if (name == precision_name(p)) return p;
  }
  throw UnsupportedError("options: precision must be 'highest', 'high' or 'medium', got '" + name +
                         "'");
}

const char* precision_name(Precision p) {
  switch (p) {
    case Precision::highest:
      return "highest";
    case Precision::high:
      return "high";
    case Precision::medium:
      return "medium";
    default:
      return "unset";
  }
}

}  // namespace tilewright
