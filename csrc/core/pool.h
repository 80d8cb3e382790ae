// The worker threads, and what they work for. Only core/parallel.cc uses them.
#pragma once
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "core/env.h"
#include "core/interrupt.h"
#include "core/options.h"
#include "core/sharing.h"

namespace tilewright {

// One region: its tasks in shares of neighbours, one for each thread; who is done with its own helps
// with the next. So a thread finds in its caches what the region before left there, where both walk
// over the same operands. Lives on the caller's stack; the pool joins before it goes.
struct Region {
  static constexpr int kMostShares = 64;  // 4 KiB; beyond, threads have one together

  Region(int64_t count, double ns, int threads, void (*body)(const void*, int64_t),
         const void* of_body);

  struct alignas(64) Share {  // a line of its own: no two threads write to one while they are apart
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t tasks;
  const double estimate;  // of the work, in ns of one core
  const int shares;
  void (*const call)(const void*, int64_t);
  const void* const context;
  const CallOptions options = call_options();  // of the caller: its workers' too
  std::atomic<bool> cancelled{false};
  std::mutex error_mutex;
  std::exception_ptr error;
  Share share[kMostShares];

  // Tasks until none is left, from the share of this thread on (the caller's is the first); how many
  // it did.
  int64_t work(int thread);
  // The caller's part: the same, with a look at Ctrl-C every kPollInterval.
  int64_t work_and_poll();

 private:
  template <class AfterTask>
  int64_t work(int thread, const AfterTask& after_task);
  void run(int64_t i);
  void fail(std::exception_ptr e);
};

// Workers are started when first needed and never end. A region offers places, a worker that wakes
// in time takes one, and those that are not taken when the caller has run out of tasks are withdrawn:
// short regions never wait for a sleeping thread.
class Pool {
 public:
  bool try_hold() { return !busy_.exchange(true); }
  void let_go() { busy_.store(false, std::memory_order_release); }

  // --- for the thread that holds it ---------------------------------------------------------------
  // Workers spin from one region to the next, whatever they have learnt.
  void keep_awake(bool on) { awake_.store(on, std::memory_order_relaxed); }
  // Whether a region that begins now is for so many threads.
  SharingModel::Choice choose(double work, int threads);
  // Such a region, after choose(). How many threads could take part.
  int run(Region& region, int threads);

 private:
  using Micros = std::chrono::microseconds;

  struct Worker {
    explicit Worker(int n) : number(n) {}
    const int number;          // from 1 on
    std::atomic<int> cpu{-1};  // where it last went to sleep
    std::atomic<bool> works{false};
    bool fetched = false;     // the caller's: to its own CPU
    bool in_the_way = false;  // the worker's: of the last region's caller
    std::thread thread;
  };

  int start_workers(int wanted);
  bool are_awake(int helpers) const { return int(workers_.size()) - sleepers_.load() >= helpers; }
  void wake_workers();
  Clock::time_point join(int came, Clock::time_point done, Clock::duration task);
  void fetch_late_workers(int came);

  void serve(Worker& me, uint64_t seen);
  uint64_t next_ticket(Worker& me, uint64_t seen);
  bool take_place();
  bool is_in_the_way(Worker& me) const;

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
  std::atomic<int> callers_cpu_{-1};                            // and where
  std::atomic<Clock::time_point> woken_{Clock::time_point{}};   // workers, and none has come yet
  std::atomic<int64_t> arrived_{0};                             // ns from then until one did
  const Micros max_spin_{std::clamp(env::get_int("TILEWRIGHT_SPIN_US", 20), 0L, 100'000L)};
  std::atomic<Micros> spin_{max_spin_};
  Region* region_ = nullptr;
  // The holder's.
  SharingModel model_{1e3 * double(max_spin_.count())};
  Clock::time_point started_{};  // the region, and then its tasks
  double waking_ = 0;            // ns that it last spent on it
};

}  // namespace tilewright
