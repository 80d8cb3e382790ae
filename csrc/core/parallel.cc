#include "core/parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <string>
#include <utility>

#include "core/check.h"
#include "core/interrupt.h"
#include "core/limits.h"
#include "core/pool.h"
#include "core/trace.h"

namespace tilewright {
namespace {

// What fork() must not copy half-way: the child forgets the pool (its threads don't exist there)
// and starts afresh. The old object is leaked on purpose: its mutexes may be held by threads that
// are gone. So is the pool at exit.
std::atomic<Pool*> g_pool{nullptr};
std::atomic<int> g_threads{0};

Pool& pool() {
  Pool* p = g_pool.load(std::memory_order_acquire);
  if (p) return *p;
  static std::atomic<bool> registered{false};
  if (!registered.exchange(true)) {
    pthread_atfork(nullptr, nullptr, [] { g_pool.store(nullptr); });
  }
  auto* fresh = new Pool;
  if (g_pool.compare_exchange_strong(p, fresh)) return *fresh;
  delete fresh;
  return *p;
}

}  // namespace

int default_num_threads() {
  double least = kMaxThreads;
  for (const ThreadLimit& limit : thread_limits()) least = std::min(least, limit.cores);
  return std::max(1, int(least + 0.5));  // a quota of 1.5 cores: two threads
}

int num_threads() {
  if (const int here = call_options().threads) return here;
  int n = g_threads.load(std::memory_order_relaxed);
  if (n == 0) g_threads.store(n = default_num_threads());
  return n;
}

void set_num_threads(int n) {
  if (n < 1) throw ShapeError("set_num_threads: n must be at least 1, got " + std::to_string(n));
  if (n > kMaxThreads)
    throw ShapeError("set_num_threads: n must be at most 1024, got " + std::to_string(n));
  g_threads.store(n);
}

CloseRegions::CloseRegions() : pool_(nullptr) {
  if (t_caller.cancelled || t_caller.held || num_threads() == 1) return;
  Pool& workers = pool();
  if (!workers.try_hold()) return;
  workers.keep_awake(true);
  t_caller.polls = may_poll();
  pool_ = t_caller.held = &workers;
}

CloseRegions::~CloseRegions() {
  if (!pool_) return;
  t_caller.held->keep_awake(false);
  std::exchange(t_caller.held, nullptr)->let_go();
}

Team::Team(double work, int64_t tasks) : work_(work), too_little_(tasks > 1 && work < kAwakeWork) {
  if (too_little_) return;
  using enum SharingModel::Choice;
  const int threads = t_caller.cancelled ? 1 : int(std::min<int64_t>(tasks, num_threads()));
  if (threads <= 1) return;
  Pool* const held = t_caller.held;
  pool_ = held ? held : &pool();
  if (!held && !pool_->try_hold()) {
    pool_ = nullptr;
    Trace::fallback("one thread: another thread's call held the pool");
    return;
  }
  const SharingModel::Choice choice = pool_->choose(work, threads);
  if (held) held->keep_awake(choice != crowded);
  if (choice == share || choice == share_on) {
    threads_ = threads;
    return;
  }
  let_go();
  too_little_ = choice == alone;
  if (!too_little_) {
    Trace::fallback("one thread: other programs want the cores, and sharing has cost time");
  }
}

Team::~Team() {
  let_go();
}

void Team::let_go() {
  if (pool_ && pool_ != t_caller.held) pool_->let_go();
  pool_ = nullptr;
}

void Team::run(int64_t tasks, Call call, const void* context) {
  if (!pool_) return run_alone(tasks, call, context);
  const int threads = int(std::min<int64_t>(tasks, threads_));
  Region region(tasks, work_, threads, call, context);
  Trace::region(tasks, pool_->run(region, threads));
  let_go();
  if (region.error) std::rethrow_exception(region.error);
}

void Team::run_alone(int64_t tasks, Call call, const void* context) const {
  constexpr double kUnpolled = 1e5;  // ns without a look at Ctrl-C, also if they are ten times that
  if (!too_little_) Trace::region(tasks, 1);
  if (work_ < kUnpolled) {
    for (int64_t i = 0; i < tasks; ++i) call(context, i);
    return poll_after(work_ + 1e3);
  }
  Region region(tasks, work_, 1, call, context);
  region.work_and_poll();
  if (region.error) std::rethrow_exception(region.error);
}

}  // namespace tilewright
