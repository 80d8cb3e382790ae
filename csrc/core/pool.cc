#include "core/pool.h"

#include <pthread.h>
#include <unistd.h>

#include "core/check.h"
#include "core/trace.h"

namespace tilewright {
namespace {

constexpr int kShortJoin = 100;                 // pauses of the CPU: a few us
constexpr std::chrono::microseconds kLate{50};  // beyond two tasks: a worker has lost its CPU
constexpr int64_t kNever = 1'000'000;           // ns until a worker arrives that doesn't

int64_t nanos(Clock::time_point t) {
  return std::chrono::nanoseconds(t.time_since_epoch()).count();
}

double ns_between(Clock::time_point from, Clock::time_point to) {
  return double(nanos(to) - nanos(from));
}

void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");  // waits some ten cycles; `yield` is a no-op on most cores
#endif
}

cpu_set_t only(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  return set;
}

// Of the process's CPUs.
cpu_set_t all_but(int cpu) {
  cpu_set_t set;
  if (sched_getaffinity(getpid(), sizeof set, &set) != 0) CPU_ZERO(&set);
  CPU_CLR(cpu, &set);
  return set;
}

bool move(std::thread& thread, const cpu_set_t& cpus) {  // to none: it stays where it is
  return pthread_setaffinity_np(thread.native_handle(), sizeof cpus, &cpus) == 0;
}

}  // namespace

Region::Region(int64_t count, double ns, int threads, void (*body)(const void*, int64_t),
               const void* of_body)
    : tasks(count),
      estimate(ns),
      shares(std::min(threads, kMostShares)),
      call(body),
      context(of_body) {
  for (int s = 0; s < shares; ++s) {
    share[s].next.store(tasks * s / shares, std::memory_order_relaxed);
    share[s].end = tasks * (s + 1) / shares;
  }
}

template <class AfterTask>
int64_t Region::work(int thread, const AfterTask& after_task) {
  int64_t done = 0;
  for (int s = 0; s < shares; ++s) {
    Share& from = share[(thread + s) % shares];
    int64_t i;
    while (!cancelled.load(std::memory_order_relaxed) &&
           (i = from.next.fetch_add(1, std::memory_order_relaxed)) < from.end) {
      run(i);
      after_task();
      ++done;
    }
  }
  return done;
}

int64_t Region::work(int thread) {
  return work(thread, [] {});
}

int64_t Region::work_and_poll() {
  if (!may_poll()) return work(0);
  if (t_caller.polled == Clock::time_point{}) t_caller.polled = Clock::now();
  return work(0, [&] {
    if (is_interrupted(Clock::now())) fail(std::make_exception_ptr(Interrupted{}));
  });
}

void Region::run(int64_t i) {
  try {
    call(context, i);
  } catch (...) {
    fail(std::current_exception());
  }
}

void Region::fail(std::exception_ptr e) {
  const std::lock_guard lock(error_mutex);
  if (!error) error = e;
  cancelled = true;
}

SharingModel::Choice Pool::choose(double work, int threads) {
  started_ = Clock::now();
  if (arrived_.load(std::memory_order_relaxed) > 0) {
    model_.learn_waking(waking_ + double(arrived_.exchange(0, std::memory_order_relaxed)));
  }
  const auto choice = model_.choose(work, are_awake(threads - 1), nanos(started_));
  if (choice == SharingModel::Choice::share_on) spin_.store(max_spin_, std::memory_order_relaxed);
  return choice;
}

int Pool::run(Region& region, int threads) {
  const int helpers = start_workers(threads - 1);
  region_ = &region;
  left_.store(0, std::memory_order_relaxed);
  places_.store(helpers, std::memory_order_release);
  posted_.store(started_, std::memory_order_relaxed);
  callers_cpu_.store(sched_getcpu(), std::memory_order_relaxed);
  // A worker says that it sleeps before it looks at the ticket for the last time: it sees this one,
  // or is seen here and waits, or is about to, under the mutex.
  ticket_.fetch_add(1);
  if (!are_awake(helpers)) wake_workers();
  t_caller.cancelled = &region.cancelled;
  const int64_t own = region.work_and_poll();
  t_caller.cancelled = nullptr;
  const int came = helpers - places_.exchange(0, std::memory_order_acq_rel);
  const auto done = Clock::now();
  const auto end = join(came, done, (done - started_) / std::max<int64_t>(own, 1));
  model_.learn_outcome(
      {region.estimate, region.tasks, own, ns_between(started_, done), ns_between(done, end)},
      nanos(end));
  return helpers + 1;
}

// So many of them, or as many as the system lets there be (a limit on processes, no memory).
int Pool::start_workers(int wanted) {
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

// Linux likes to wake a thread where it last ran. Where that has come to be the caller's CPU, busy
// from now on, the worker runs once the region is over and sleeps there again: two threads then take
// the time of one, until the load balancer happens to look. So it is sent to the other CPUs of the
// process.
void Pool::wake_workers() {
  {
    const std::lock_guard lock(mutex_);
  }
  const int here = sched_getcpu();
  for (const auto& worker : workers_) {
    if (here >= 0 && worker->cpu.load(std::memory_order_relaxed) == here) {
      move(worker->thread, all_but(here));
    }
  }
  auto none = Clock::time_point{};  // those woken before may be on their way
  woken_.compare_exchange_strong(none, started_, std::memory_order_relaxed);
  wake_.notify_all();
  const auto now = Clock::now();
  waking_ = ns_between(started_, now);
  started_ = now;
}

// Waits for the workers that came, on the spot: their tasks are short. When the last one was done.
Clock::time_point Pool::join(int came, Clock::time_point done, Clock::duration task) {
  const auto joined = [&] { return left_.load(std::memory_order_acquire) >= came; };
  if (joined()) return done;
  for (int spins = 0; spins < kShortJoin && !joined(); ++spins) pause_cpu();
  const auto late = done + 2 * task + kLate;
  while (!joined() && Clock::now() < late) pause_cpu();
  if (!joined()) fetch_late_workers(came);
  return Clock::now();
}

// A worker that has lost its CPU in the middle of a task would have it back when the other thread
// there has used up its time slice, milliseconds later. It goes on here instead, at once: yielding
// leaves it this CPU.
void Pool::fetch_late_workers(int came) {
  const int here = sched_getcpu();
  for (const auto& worker : workers_) {
    worker->fetched = here >= 0 && worker->works && move(worker->thread, only(here));
  }
  while (left_.load(std::memory_order_acquire) < came) std::this_thread::yield();
  for (const auto& worker : workers_) {
    if (worker->fetched) move(worker->thread, all_but(here));
  }
}

void Pool::serve(Worker& me, uint64_t seen) {
  for (;;) {
    seen = next_ticket(me, seen);
    if (is_in_the_way(me)) arrived_.store(kNever, std::memory_order_relaxed);
    if (me.in_the_way || !take_place()) continue;
    spin_.store(max_spin_, std::memory_order_relaxed);  // it came in time: more may follow
    me.works = true;
    {
      const CallScope scope(region_->options);
      t_caller.cancelled = &region_->cancelled;
      region_->work(me.number);
      t_caller.cancelled = nullptr;
    }
    me.works = false;
    is_in_the_way(me);  // as one that was fetched is
    left_.fetch_add(1, std::memory_order_release);
  }
}

// On the caller's CPU a worker had better sleep, to be woken elsewhere.
bool Pool::is_in_the_way(Worker& me) const {
  const int here = sched_getcpu();
  return me.in_the_way = here >= 0 && here == callers_cpu_.load(std::memory_order_relaxed);
}

bool Pool::take_place() {
  int free = places_.load(std::memory_order_acquire);
  while (free > 0) {
    if (places_.compare_exchange_weak(free, free - 1, std::memory_order_acq_rel)) return true;
  }
  return false;
}

// Spin while regions follow each other closely, then park. A spin that came to nothing halves the
// next one; a region that was joined, or that a full spin would have met, restores it, and so does a
// caller who expects more of them.
uint64_t Pool::next_ticket(Worker& me, uint64_t seen) {
  auto idle_since = Clock::now();
  const auto spin = me.in_the_way ? Micros{0} : spin_.load(std::memory_order_relaxed);
  uint64_t ticket;
  for (;;) {
    const auto now = Clock::now();
    if (awake_.load(std::memory_order_relaxed) && !me.in_the_way) {
      idle_since = now;  // idle once it is over
    } else if (now >= idle_since + spin) {
      break;
    }
    for (int i = 0; i < 32; ++i) {
      if ((ticket = ticket_.load(std::memory_order_acquire)) != seen) return ticket;
      pause_cpu();
    }
  }
  if (!me.in_the_way) spin_.store(spin / 2, std::memory_order_relaxed);
  {
    std::unique_lock lock(mutex_);
    me.cpu.store(sched_getcpu(), std::memory_order_relaxed);
    sleepers_.fetch_add(1);
    wake_.wait(lock, [&] { return (ticket = ticket_.load()) != seen; });
    sleepers_.fetch_sub(1);
  }
  const auto posted = posted_.load(std::memory_order_relaxed);
  if (posted - idle_since < max_spin_) spin_.store(max_spin_, std::memory_order_relaxed);
  const auto woken = woken_.exchange({}, std::memory_order_relaxed);
  if (woken != Clock::time_point{}) {
    arrived_.store(int64_t(ns_between(woken, Clock::now())), std::memory_order_relaxed);
  }
  return ticket;
}

}  // namespace tilewright
