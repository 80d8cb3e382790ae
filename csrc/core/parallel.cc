#include "core/parallel.h"

#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/check.h"
#include "core/env.h"
#include "core/limits.h"
#include "core/options.h"
#include "core/trace.h"

namespace tilewright {
namespace {

using Clock = std::chrono::steady_clock;
using Micros = std::chrono::microseconds;

constexpr Micros kPollInterval{20'000};

std::atomic<int (*)()> g_poll{nullptr};

void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");  // waits some ten cycles; `yield` is a no-op on most cores
#endif
}

// The process's first thread: the one that runs Python's signal handlers (after fork, the child's
// only thread).
bool is_main_thread() {
  return syscall(SYS_gettid) == getpid();
}

struct Region;
class Pool;

// What a thread knows about the call that it is in.
struct Caller {
  const Region* region = nullptr;  // of the pool, a task of which it runs
  Pool* held = nullptr;            // by CloseRegions
  bool polls = false;              // then: whether this thread looks at Ctrl-C
  double unseen = 0;               // ns of work, estimated, since it last looked at the clock
  Clock::time_point polled{};      // or when it first looked at the clock in this call
};
constinit thread_local Caller t_caller;

bool may_poll() {
  if (t_caller.held) return t_caller.polls;  // two system calls less
  return g_poll.load(std::memory_order_relaxed) && is_main_thread();
}

// Whether Ctrl-C ends the call, asked every kPollInterval. If may_poll().
bool is_interrupted(Clock::time_point now) {
  auto& polled = t_caller.polled;
  if (polled == Clock::time_point{}) polled = now;
  if (now - polled < kPollInterval) return false;
  polled = now;
  const auto poll = g_poll.load();
  const Region* region = std::exchange(t_caller.region, nullptr);  // a handler's calls are its own
  Pool* const held = std::exchange(t_caller.held, nullptr);
  const bool stop = poll && poll() != 0;
  t_caller.region = region;
  t_caller.held = held;
  return stop;
}

// One region: its tasks in shares of neighbours, one for each thread; who is done with its own helps
// with the next. So a thread finds in its caches what the region before left there, where both walk
// over the same operands. Lives on the caller's stack; the pool joins before it goes.
struct Region {
  static constexpr int kMostShares = 64;  // 4 KiB; beyond, threads have one together

  Region(int64_t tasks, int threads, void (*body)(const void*, int64_t), const void* of_body)
      : shares(std::min(threads, kMostShares)), call(body), context(of_body) {
    for (int s = 0; s < shares; ++s) {
      share[s].next.store(tasks * s / shares, std::memory_order_relaxed);
      share[s].end = tasks * (s + 1) / shares;
    }
  }

  struct alignas(64) Share {  // a line of its own: no two threads write to one while they are apart
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int shares;
  void (*const call)(const void*, int64_t);
  const void* const context;
  const CallOptions options = call_options();  // of the caller: its workers' too
  std::atomic<bool> cancelled{false};
  std::mutex error_mutex;
  std::exception_ptr error;
  Share share[kMostShares];

  // Tasks until none is left, from the share of this thread on (the caller's is the first);
  // after_task() after each.
  template <class AfterTask>
  void work(int thread, const AfterTask& after_task) {
    for (int s = 0; s < shares; ++s) {
      Share& from = share[(thread + s) % shares];
      int64_t i;
      while (!cancelled.load(std::memory_order_relaxed) &&
             (i = from.next.fetch_add(1, std::memory_order_relaxed)) < from.end) {
        run(i);
        after_task();
      }
    }
  }

  void work(int thread) {
    work(thread, [] {});
  }

  // The caller's part: the same, with a look at Ctrl-C every kPollInterval.
  void work_and_poll() {
    if (!may_poll()) return work(0);
    if (t_caller.polled == Clock::time_point{}) t_caller.polled = Clock::now();
    work(0, [&] {
      if (is_interrupted(Clock::now())) fail(std::make_exception_ptr(Interrupted{}));
    });
  }

  void run(int64_t i) {
    try {
      call(context, i);
    } catch (...) {
      fail(std::current_exception());
    }
  }

  void fail(std::exception_ptr e) {
    const std::lock_guard lock(error_mutex);
    if (!error) error = e;
    cancelled = true;
  }
};

// Workers are started when first needed and never end. A region offers places, a worker that wakes
// in time takes one, and those that are not taken when the caller has run out of tasks are withdrawn:
// short regions never wait for a sleeping thread.
class Pool {
 public:
  bool try_hold() { return !busy_.exchange(true); }
  void let_go() { busy_.store(false, std::memory_order_release); }
  // Workers spin from one region to the next, whatever they have learnt.
  void keep_awake(bool on) { awake_.store(on, std::memory_order_relaxed); }
  bool asleep() const { return workers_.empty() || sleepers_.load(std::memory_order_relaxed) > 0; }

  // How many threads could take part. The caller holds the pool.
  int run(Region& region, int threads) {
    const int helpers = start_workers(threads - 1);
    region_ = &region;
    left_.store(0, std::memory_order_relaxed);
    places_.store(helpers, std::memory_order_release);
    if (!awake_.load(std::memory_order_relaxed)) {
      posted_.store(Clock::now(), std::memory_order_relaxed);
    }
    // A worker says that it sleeps before it looks at the ticket for the last time: it sees this one,
    // or is seen here and waits, or is about to, under the mutex.
    ticket_.fetch_add(1);
    if (sleepers_.load() > 0) {
      {
        const std::lock_guard lock(mutex_);
      }
      keep_off_this_cpu();
      wake_.notify_all();
    }
    t_caller.region = &region;
    region.work_and_poll();
    t_caller.region = nullptr;
    const int came = helpers - places_.exchange(0, std::memory_order_acq_rel);
    // Their tasks are short, so they are waited for on the spot; yielding gives one that was
    // descheduled this core.
    for (int spins = 0; left_.load(std::memory_order_acquire) < came; ++spins) {
      if (spins < 4000) {
        pause_cpu();
      } else {
        std::this_thread::yield();
      }
    }
    return helpers + 1;
  }

 private:
  struct Worker {
    explicit Worker(int n) : number(n) {}
    const int number;          // from 1 on
    std::atomic<int> cpu{-1};  // where it last went to sleep
    std::thread thread;
  };

  // Linux likes to wake a thread where it last ran. Where that has come to be the caller's CPU, busy
  // from now on, the worker runs once the region is over and sleeps there again: two threads then
  // take the time of one, until the load balancer happens to look. So it is sent to the other CPUs of
  // the process.
  void keep_off_this_cpu() {
    const int here = sched_getcpu();
    for (const auto& worker : workers_) {
      if (here < 0 || worker->cpu.load(std::memory_order_relaxed) != here) continue;
      cpu_set_t others;
      if (sched_getaffinity(getpid(), sizeof others, &others) != 0) return;
      CPU_CLR(here, &others);
      if (CPU_COUNT(&others) == 0) return;
      pthread_setaffinity_np(worker->thread.native_handle(), sizeof others, &others);
    }
  }

  // So many of them, or as many as the system lets there be (a limit on processes, no memory).
  int start_workers(int wanted) {
    try {
      while (int(workers_.size()) < wanted) {
        workers_.reserve(workers_.size() + 1);
        auto worker = std::make_unique<Worker>(int(workers_.size()) + 1);
        worker->thread =
            std::thread([this, me = worker.get(), seen = ticket_.load()] { serve(*me, seen); });
        workers_.push_back(std::move(worker));
      }
    } catch (const std::exception&) {
      Trace::fallback("fewer threads: the system would start no more");
    }
    return std::min(wanted, int(workers_.size()));
  }

  void serve(Worker& me, uint64_t seen) {
    for (;;) {
      seen = next_ticket(me, seen);
      if (!take_place()) continue;
      spin_.store(max_spin_, std::memory_order_relaxed);  // it came in time: more may follow
      {
        const CallScope scope(region_->options);
        t_caller.region = region_;
        region_->work(me.number);
        t_caller.region = nullptr;
      }
      left_.fetch_add(1, std::memory_order_release);
    }
  }

  bool take_place() {
    int free = places_.load(std::memory_order_acquire);
    while (free > 0) {
      if (places_.compare_exchange_weak(free, free - 1, std::memory_order_acq_rel)) return true;
    }
    return false;
  }

  // Spin while regions follow each other closely, then park. A spin that came to nothing halves the
  // next one; a region that was joined, or that a full spin would have met, restores it.
  uint64_t next_ticket(Worker& me, uint64_t seen) {
    auto idle_since = Clock::now();
    const auto spin = spin_.load(std::memory_order_relaxed);
    uint64_t ticket;
    for (;;) {
      const auto now = Clock::now();
      if (awake_.load(std::memory_order_relaxed)) {
        idle_since = now;  // idle once it is over
      } else if (now >= idle_since + spin) {
        break;
      }
      for (int i = 0; i < 32; ++i) {
        if ((ticket = ticket_.load(std::memory_order_acquire)) != seen) return ticket;
        pause_cpu();
      }
    }
    {
      std::unique_lock lock(mutex_);
      me.cpu.store(sched_getcpu(), std::memory_order_relaxed);
      sleepers_.fetch_add(1);
      wake_.wait(lock, [&] { return (ticket = ticket_.load()) != seen; });
      sleepers_.fetch_sub(1);
    }
    const bool close = posted_.load(std::memory_order_relaxed) - idle_since < max_spin_;
    spin_.store(close ? max_spin_ : spin / 2, std::memory_order_relaxed);
    return ticket;
  }

  std::vector<std::unique_ptr<Worker>> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> ticket_{0};  // counts regions
  std::atomic<int> places_{0};       // that workers may still take in the region
  std::atomic<int> left_{0};         // workers that took one and are done
  std::atomic<int> sleepers_{0};
  std::atomic<bool> busy_{false};
  std::atomic<bool> awake_{false};
  std::atomic<Clock::time_point> posted_{Clock::time_point{}};  // when the last region began
  const Micros max_spin_{std::clamp(env::get_int("TILEWRIGHT_SPIN_US", 20), 0L, 100'000L)};
  std::atomic<Micros> spin_{max_spin_};
  Region* region_ = nullptr;
};

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
  if (me.region && me.region->cancelled.load(std::memory_order_relaxed)) throw Interrupted{};
  if (may_poll() && is_interrupted(Clock::now())) throw Interrupted{};
}

CloseRegions::CloseRegions() : pool_(nullptr) {
  if (t_caller.region || t_caller.held || num_threads() == 1) return;
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

namespace detail {

// 20 us is ten times the cost of waking a worker that spins or has just parked. One that is known to
// spin comes in 0.2 us.
double worth_sharing() {
  constexpr double kAwake = 8e3, kParked = 20e3;
  return t_caller.held && !t_caller.held->asleep() ? kAwake : kParked;
}

void run_tasks(int64_t tasks, void (*call)(const void*, int64_t), const void* context) {
  const int threads = t_caller.region ? 1 : int(std::min<int64_t>(tasks, num_threads()));
  const bool alone = threads == 1;
  Region region(tasks, threads, call, context);
  Pool* const held = t_caller.held;
  Pool* const workers = alone ? nullptr : held ? held : &pool();
  if (workers && (held || workers->try_hold())) {
    Trace::region(tasks, workers->run(region, threads));
    if (!held) workers->let_go();
  } else {
    if (!alone) Trace::fallback("one thread: another thread's call held the pool");
    Trace::region(tasks, 1);
    region.work_and_poll();
  }
  if (region.error) std::rethrow_exception(region.error);
}

}  // namespace detail
}  // namespace tilewright
