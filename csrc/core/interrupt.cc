#include "core/interrupt.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <utility>

#include "core/check.h"
#include "core/parallel.h"

namespace tilewright {
namespace {

constexpr std::chrono::milliseconds kPollInterval{20};

std::atomic<int (*)()> g_poll{nullptr};

// The process's first thread: the one that runs Python's signal handlers (after fork, the child's
// only thread).
bool is_main_thread() {
  return syscall(SYS_gettid) == getpid();
}

}  // namespace

constinit thread_local Caller t_caller;

bool may_poll() {
  if (t_caller.held) return t_caller.polls;  // two system calls less
  return g_poll.load(std::memory_order_relaxed) && is_main_thread();
}

bool is_interrupted(Clock::time_point now) {
  auto& polled = t_caller.polled;
  if (polled == Clock::time_point{}) polled = now;
  if (now - polled < kPollInterval) return false;
  polled = now;
  const auto poll = g_poll.load();
  const auto* const cancelled = std::exchange(t_caller.cancelled, nullptr);
  Pool* const held = std::exchange(t_caller.held, nullptr);  // a handler's calls are its own
  const bool stop = poll && poll() != 0;
  t_caller.cancelled = cancelled;
  t_caller.held = held;
  return stop;
}

void set_poll(int (*poll)()) {
  g_poll.store(poll);
}

void begin_call() {
  t_caller.polled = {};
}

void poll_after(double ns) {
  constexpr double kLook = 5e5;  // a fraction of the interval: estimates may be far too low
  Caller& me = t_caller;
  me.unseen += ns;
  if (me.unseen < kLook) return;
  me.unseen = 0;
  if (me.cancelled && me.cancelled->load(std::memory_order_relaxed)) throw Interrupted{};
  if (may_poll() && is_interrupted(Clock::now())) throw Interrupted{};
}

}  // namespace tilewright
