#include "core/trace.h"

#include <algorithm>
#include <atomic>
#include <cstdio>

#include "core/env.h"
#include "core/parallel.h"

namespace tilewright {
namespace {

thread_local Trace* t_trace = nullptr;  // the innermost call of this thread
thread_local Recording* t_recording = nullptr;

// Counters by the addresses of their names: an open-addressed table that only grows, without a lock
// that a fork could leave taken. Two threads that enter the same names at once may make two entries;
// readers add up.
class Counters {
 public:
  void add(const char* op, const char* kernel, const char* isa) {
    const auto bits = [](const char* p) { return reinterpret_cast<uintptr_t>(p); };
    const uintptr_t hash = (bits(op) ^ bits(kernel) * 31 ^ bits(isa) * 131) >> 3;
    for (uintptr_t i = 0; i < kSize; ++i) {
      Entry& e = entries_[(hash + i) % kSize];
      int state = e.state.load(std::memory_order_acquire);
      if (state == kReady && e.op == op && e.kernel == kernel && e.isa == isa) {
        e.count.fetch_add(1, std::memory_order_relaxed);
        return;
      }
      if (state != kFree || !e.state.compare_exchange_strong(state, kTaken)) continue;
      e.op = op, e.kernel = kernel, e.isa = isa;
      e.count.store(1, std::memory_order_relaxed);
      e.state.store(kReady, std::memory_order_release);
      return;
    }
  }

  std::vector<CallCount> list() const {
    std::vector<CallCount> found;
    for (const Entry& e : entries_) {
      if (e.state.load(std::memory_order_acquire) != kReady) continue;
      found.push_back({e.op, e.kernel, e.isa, e.count.load(std::memory_order_relaxed)});
    }
    return found;
  }

 private:
  static constexpr uintptr_t kSize = 512;  // ops x kernels x levels: about 150
  enum State { kFree, kTaken, kReady };
  struct Entry {
    std::atomic<int> state{kFree};
    const char *op, *kernel, *isa;
    std::atomic<int64_t> count{0};
  };
  Entry entries_[kSize];
};

Counters g_calls, g_fallbacks;

bool printing() {
  static const bool on = [] {
    const bool wanted = env::get_int("TILEWRIGHT_TRACE", 0) != 0;
    if (wanted) std::fputs("op,kernel,isa,shape,threads,microseconds\n", stderr);
    return wanted;
  }();
  return on;
}

}  // namespace

CallRecord* Trace::new_record() {
  if (t_recording) return &t_recording->calls.emplace_back();
  if (!printing()) return nullptr;
  own_ = std::make_unique<CallRecord>();
  return own_.get();
}

void Trace::begin(CallRecord& r, std::string shape) {
  r.op = op_;
  r.isa = isa_;
  r.shape = std::move(shape);
  record_ = &r;
  start_ = std::chrono::steady_clock::now();
}

void Trace::enter() {
  outer_ = t_trace;
  t_trace = this;
}

Trace::~Trace() {
  g_calls.add(op_, kernel_, isa_);
  if (record_) finish();
  t_trace = outer_;
}

void Trace::finish() {
  const std::chrono::duration<double, std::micro> us = std::chrono::steady_clock::now() - start_;
  record_->kernel = kernel_;
  record_->microseconds = us.count();
  if (record_->tasks == 0 && num_threads() > 1) {
    note("one thread: too little work to share");
  }
  if (!own_) return;
  std::fprintf(stderr, "%s,%s,%s,%s,%d,%.2f\n", op_, kernel_, isa_, record_->shape.c_str(),
               record_->threads, us.count());
}

CallRecord* Trace::record() {
  return t_trace ? t_trace->record_ : nullptr;
}

void Trace::kernel(const char* name) {
  if (t_trace) t_trace->kernel_ = name;
}

bool Trace::described() {
  return record() != nullptr;
}

void Trace::detail(const char* name, std::string value) {
  CallRecord* r = record();
  if (!r) return;
  for (auto& [known, old] : r->details) {
    if (known == name) {
      old = std::move(value);
      return;
    }
  }
  r->details.emplace_back(name, std::move(value));
}

void Trace::note(std::string text) {
  CallRecord* r = record();
  if (!r || std::find(r->notes.begin(), r->notes.end(), text) != r->notes.end()) return;
  r->notes.push_back(std::move(text));
}

void Trace::fallback(const char* reason) {
  if (!t_trace) return;
  g_fallbacks.add(t_trace->op_, reason, "");
  if (described()) note(reason);
}

void Trace::region(int64_t tasks, int threads) {
  CallRecord* r = record();
  if (!r || threads < r->threads || (threads == r->threads && tasks <= r->tasks)) return;
  r->threads = threads;
  r->tasks = tasks;
}

Recording::Recording() : outer_(t_recording) {
  t_recording = this;
}
Recording::~Recording() {
  t_recording = outer_;
}

std::vector<CallCount> call_counts() {
  return g_calls.list();
}
std::vector<CallCount> fallback_counts() {
  return g_fallbacks.list();
}

}  // namespace tilewright
