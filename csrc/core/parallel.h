// The thread pool: parallel_for over independent tasks, a poll for Ctrl-C between them.
//
// Rules every kernel relies on:
// - Tasks are independent and each is computed the same way whoever runs it: results never depend
// on the thread count.
// - A caller that finds the pool taken (another Python thread's kernel) runs its own tasks alone
// instead of waiting.
// - After fork() the child starts with a fresh pool; no lock of the parent is touched.
// - A task should last well under 20 ms, so that an interrupt is answered within 100 ms; one that
// may last longer calls poll_after().
// - A region inside a task of the pool runs on the thread of that task.
#pragma once
#include <stdint.h>

#include "core/sharing.h"
#include "tilewright/runtime.h"

namespace tilewright {

constexpr int kMaxThreads = 1024;

class Pool;

// A call begins on this thread: what came before it does not count towards its first poll.
void begin_call();

// Where a task or a loop over small regions is long: this thread has done about `ns` more of its
// call. Now and then that is a look at Ctrl-C, on the main thread, and at whether the region has
// been given up: throws Interrupted.
void poll_after(double ns);

// Regions of this thread follow each other closely while one of these lives: workers that come to the
// first stay awake between them, spinning, and the pool is this thread's. Where another thread holds
// it, everything is as it would be without.
class CloseRegions {
 public:
  CloseRegions();
  ~CloseRegions();
  CloseRegions(const CloseRegions&) = delete;
  CloseRegions& operator=(const CloseRegions&) = delete;

 private:
  Pool* pool_;
};

// The threads of a region of about `work` ns of one core, for a caller that cuts it into tasks
// accordingly: asked for first, then run() once, with nothing between that is a region itself.
class Team {
 public:
  explicit Team(double work, int64_t tasks = kMaxThreads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int threads() const { return threads_; }
  template <class Body>
  void run(int64_t tasks, const Body& body) {
    run(
        tasks, [](const void* context, int64_t i) { (*static_cast<const Body*>(context))(i); },
        &body);
  }

 private:
  using Call = void (*)(const void*, int64_t);
  void run(int64_t tasks, Call call, const void* context);
  void run_alone(int64_t tasks, Call call, const void* context) const;
  void let_go();

  const double work_;
  int threads_ = 1;
  Pool* pool_ = nullptr;     // if there are more
  bool too_little_ = false;  // work for more
};

// body(i) for i in [0, tasks). `work` is an estimate of the whole region in ns of one core, right
// within about two: core/sharing.h decides by it whether the region is for more than one thread.
template <class Body>
void parallel_for(int64_t tasks, double work, const Body& body) {
  if (tasks <= 0) return;
  if (work < kAwakeWork) {
    for (int64_t i = 0; i < tasks; ++i) body(i);
    return poll_after(work + 1e3);  // a call may be a great many of these
  }
  Team(work, tasks).run(tasks, body);
}

}  // namespace tilewright
