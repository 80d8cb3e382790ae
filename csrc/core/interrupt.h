// Ctrl-C as a call meets it: Python's main thread looks every kPollInterval, and everybody sees
// whether the region that it works for has been given up.
#pragma once
#include <atomic>
#include <chrono>

namespace tilewright {

using Clock = std::chrono::steady_clock;

class Pool;

// What a thread knows about the call that it is in.
struct Caller {
  const std::atomic<bool>* cancelled = nullptr;  // of the region, a task of which it runs
  Pool* held = nullptr;                          // by CloseRegions
  bool polls = false;                            // then: whether this thread looks at Ctrl-C
  double unseen = 0;           // ns of work, estimated, since it last looked at the clock
  Clock::time_point polled{};  // or when it first looked at the clock in this call
};
extern constinit thread_local Caller t_caller;

// Whether this thread looks at Ctrl-C.
bool may_poll();

// Whether Ctrl-C ends the call, asked every kPollInterval. If may_poll().
bool is_interrupted(Clock::time_point now);

}  // namespace tilewright
