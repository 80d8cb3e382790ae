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

namespace {

// That of a caller who is in no task of the pool. Whether it was for the pool, and has run there.
bool run_on_pool(int64_t tasks, double work, void (*call)(const void*, int64_t),
                 const void* context, int threads) {
  using Choice = SharingModel::Choice;
  Pool* const held = t_caller.held;
  Pool& workers = held ? *held : pool();
  if (!held && !workers.try_hold()) {
    Trace::fallback("one thread: another thread's call held the pool");
    Trace::region(tasks, 1);
    return false;
  }
  const Choice choice = workers.choose(work, threads);
  if (held) workers.keep_awake(choice != Choice::crowded);
  if (choice == Choice::alone || choice == Choice::crowded) {
    if (!held) workers.let_go();
    if (choice == Choice::alone) return false;
    Trace::fallback("one thread: other programs want the cores, and sharing has cost time");
    Trace::region(tasks, 1);
    return false;
  }
  Region region(tasks, work, threads, call, context);
  Trace::region(tasks, workers.run(region, threads));
  if (!held) workers.let_go();
  if (region.error) std::rethrow_exception(region.error);
  return true;
}

}  // namespace

namespace detail {

void run_tasks(int64_t tasks, double work, void (*call)(const void*, int64_t),
               const void* context) {
  constexpr double kUnpolled = 1e5;  // ns without a look at Ctrl-C, also if they are ten times that
  const int threads = t_caller.cancelled ? 1 : int(std::min<int64_t>(tasks, num_threads()));
  if (threads > 1 && run_on_pool(tasks, work, call, context, threads)) return;
  if (threads == 1) Trace::region(tasks, 1);
  if (work < kUnpolled) {
    for (int64_t i = 0; i < tasks; ++i) call(context, i);
    return poll_after(work + 1e3);
  }
  Region region(tasks, work, 1, call, context);
  region.work_and_poll();
  if (region.error) std::rethrow_exception(region.error);
}

}  // namespace detail
}  // namespace tilewright
