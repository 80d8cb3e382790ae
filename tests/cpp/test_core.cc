// The thread pool, scratch memory, 16-bit floats, and the wording and overlap rules of the checks.
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <tuple>
#include <vector>

#include "core/check.h"
#include "core/dtype.h"
#include "core/overlap.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/size.h"
#include "core/trace.h"
#include "guarded.h"
#include "test.h"

using namespace tilewright;

namespace {

constexpr double kMuch = 1e9;  // work that is always worth the pool

int sum_of_tasks(int64_t tasks) {
  std::vector<std::atomic<int>> hits(static_cast<size_t>(tasks));
  parallel_for(tasks, kMuch, [&](int64_t i) { hits[size_t(i)].fetch_add(1); });
  int once = 0;
  for (const auto& h : hits) once += h.load() == 1;
  return once;
}

}  // namespace

TEST(every_task_runs_once) {
  for (const int threads : {1, 2, 3, 8, 33, 70}) {
    set_num_threads(threads);
    for (const int64_t tasks : {1, 2, 3, 7, 100, 1000}) CHECK(sum_of_tasks(tasks) == tasks);
  }
  parallel_for(0, kMuch, [](int64_t) { CHECK(false); });
  parallel_for(-3, kMuch, [](int64_t) { CHECK(false); });
}

// A thread meets the tasks that it had in the region before, whose operands its caches may hold.
TEST(a_worker_begins_half_way) {
  set_num_threads(2);
  const auto caller = std::this_thread::get_id();
  int64_t began = -1;
  for (int round = 0; round < 1000 && began != 50; ++round) {
    std::atomic<int64_t> first{-1};
    parallel_for(100, kMuch, [&](int64_t i) {
      int64_t none = -1;
      if (std::this_thread::get_id() != caller) first.compare_exchange_strong(none, i);
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    });
    began = first;
  }
  CHECK(began == 50);
}

TEST(many_small_regions) {
  set_num_threads(4);
  std::atomic<int64_t> total{0};
  for (int region = 0; region < 20000; ++region) {
    parallel_for(3, kMuch, [&](int64_t i) { total += i; });
  }
  CHECK(total == 3 * 20000);
}

TEST(regions_nest) {
  set_num_threads(3);
  std::atomic<int> total{0};
  parallel_for(5, kMuch, [&](int64_t) {
    parallel_for(7, kMuch, [&](int64_t) { parallel_for(2, kMuch, [&](int64_t) { ++total; }); });
  });
  CHECK(total == 70);
}

TEST(an_exception_reaches_the_caller_and_the_pool_works_on) {
  for (const int threads : {1, 4}) {
    set_num_threads(threads);
    for (int round = 0; round < 200; ++round) {
      CHECK_THROWS(std::runtime_error, "task 3", parallel_for(50, kMuch, [](int64_t i) {
                     if (i == 3) throw std::runtime_error("task 3");
                   }));
      CHECK(sum_of_tasks(20) == 20);
    }
  }
}

TEST(callers_from_many_threads) {
  set_num_threads(3);
  std::vector<std::thread> callers;
  std::atomic<int> wrong{0};
  for (int n = 0; n < 4; ++n) {
    callers.emplace_back([&] {
      for (int round = 0; round < 300; ++round) wrong += sum_of_tasks(17) != 17;
    });
  }
  for (std::thread& t : callers) t.join();
  CHECK(wrong == 0);
}

TEST(the_poll_interrupts_a_region) {
  set_num_threads(2);
  static std::atomic<int> polls{0};
  set_poll([] { return ++polls >= 2 ? -1 : 0; });
  const auto nap = [](int64_t) { std::this_thread::sleep_for(std::chrono::milliseconds(2)); };
  bool interrupted = false;
  try {
    parallel_for(100000, kMuch, nap);
  } catch (const Interrupted&) {
    interrupted = true;
  }
  set_poll(nullptr);
  CHECK(interrupted);
  CHECK(polls == 2);
  CHECK(sum_of_tasks(20) == 20);
}

TEST(the_poll_interrupts_a_call_of_many_short_regions) {
  static std::atomic<int> polls{0};
  set_poll([] {
    ++polls;
    return -1;
  });
  const auto nap = [](int64_t) { std::this_thread::sleep_for(std::chrono::milliseconds(1)); };
  // {threads, tasks, work}: in the pool; one task; a region that is too small for the pool; nested
  for (const auto& [threads, tasks, work] :
       {std::tuple{2, 4, kMuch}, {2, 1, kMuch}, {1, 3, kMuch}, {2, 2, 19e3}}) {
    set_num_threads(threads);
    for (const bool nested : {false, true}) {
      polls = 0;
      begin_call();
      const auto begin = std::chrono::steady_clock::now();
      int regions = 0;
      bool interrupted = false;
      const auto call = [&, &tasks = tasks, &work = work](int64_t) {
        for (; regions < 3000; ++regions) parallel_for(tasks, work, nap);
      };
      try {
        nested ? parallel_for(1, kMuch, call) : call(0);
      } catch (const Interrupted&) {
        interrupted = true;
      }
      CHECK(interrupted);
      CHECK(polls == 1);
      // Not before the interval of 20 ms, which is few regions where naps are long.
      CHECK(std::chrono::steady_clock::now() - begin >= std::chrono::milliseconds(20));
      CHECK(regions < 2000);
    }
  }
  polls = 0;
  for (int i = 0; i < 40; ++i) {  // short calls never poll, however many
    begin_call();
    parallel_for(2, kMuch, nap);
  }
  CHECK(polls == 0);
  set_poll(nullptr);
}

TEST(a_long_task_notices_an_interrupt) {
  static std::atomic<bool> stop{false};
  set_poll([] { return stop ? -1 : 0; });
  for (const int threads : {1, 2}) {
    set_num_threads(threads);
    for (const bool error : {false, true}) {  // of another task
      stop = !error;
      std::atomic<int> ended{0};
      try {
        parallel_for(2, kMuch, [&](int64_t i) {
          if (error && i == 1) throw std::runtime_error("task 1");
          for (int step = 0; step < 500; ++step) {
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
            poll_after(1e6);
          }
          ++ended;
        });
        CHECK(false);
      } catch (const Interrupted&) {
        CHECK(!error);
      } catch (const std::runtime_error&) {
        CHECK(error);
      }
      CHECK(ended <= int(error && threads == 1));
    }
  }
  set_poll(nullptr);
}

TEST(regions_inside_tasks_are_no_fallback) {
  set_num_threads(2);
  const auto fallbacks = [] {
    int64_t n = 0;
    for (const CallCount& c : fallback_counts()) n += c.count;
    return n;
  };
  const int64_t before = fallbacks();
  const Trace trace("test", "", [] { return std::string(); });
  for (int round = 0; round < 20; ++round) {
    parallel_for(8, kMuch, [](int64_t) { parallel_for(8, kMuch, [](int64_t) {}); });
  }
  CHECK(fallbacks() == before);
}

// The CPU that a worker runs one of two tasks on, once both have begun; -1 if none came in time.
template <class Also>
int cpu_of_worker(const Also& also) {
  const auto caller = std::this_thread::get_id();
  std::atomic<int> begun{0}, cpu{-1};
  parallel_for(2, kMuch, [&](int64_t) {
    if (std::this_thread::get_id() != caller) {
      cpu = sched_getcpu();
      also();
    }
    ++begun;
    for (int i = 0; i < 100'000 && begun < 2; ++i) std::this_thread::yield();
  });
  return cpu;
}

TEST(a_worker_asleep_on_the_callers_cpu_wakes_on_another) {
  if (num_threads() < 2) return;
  std::thread([] {  // so that the main thread's CPUs stay what they are
    const auto pin_to = [](int cpu) {
      cpu_set_t one;
      CPU_ZERO(&one);
      CPU_SET(cpu, &one);
      CHECK(pthread_setaffinity_np(pthread_self(), sizeof one, &one) == 0);
    };
    const int before = cpu_of_worker([&] { pin_to(sched_getcpu()); });  // it would wake there
    if (before < 0) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(50));  // until it sleeps
    pin_to(before);
    const int now = cpu_of_worker([] {});
    CHECK(now >= 0 && now != before);
  })
      .join();
}

TEST(a_pool_works_with_the_threads_that_the_system_allows) {
  set_num_threads(2);
  CHECK(sum_of_tasks(20) == 20);
  pthread_attr_t attributes;
  size_t size = 0;
  CHECK(pthread_getattr_default_np(&attributes) == 0);
  pthread_attr_getstacksize(&attributes, &size);
  pthread_attr_setstacksize(&attributes, size_t(1) << 48);  // no thread can have such a stack
  CHECK(pthread_setattr_default_np(&attributes) == 0);
  const auto fallbacks = [](const char* reason) {
    int64_t n = 0;
    for (const CallCount& c : fallback_counts()) {
      if (std::strstr(c.kernel, reason)) n += c.count;
    }
    return n;
  };
  const int64_t fewer = fallbacks("fewer threads"), held = fallbacks("held the pool");
  {
    const Trace trace("test", "", [] { return std::string(); });
    set_num_threads(400);
    CHECK(sum_of_tasks(1000) == 1000);
    set_num_threads(2);
    CHECK(sum_of_tasks(1000) == 1000);
  }
  CHECK(fallbacks("fewer threads") == fewer + 1);
  CHECK(fallbacks("held the pool") == held);
  pthread_attr_setstacksize(&attributes, size);
  CHECK(pthread_setattr_default_np(&attributes) == 0);
  pthread_attr_destroy(&attributes);
}

TEST(scratch_is_aligned_and_nobody_elses) {
  for (int round = 0; round < 3; ++round) {
    std::vector<std::unique_ptr<Scratch>> blocks;
    for (const int64_t bytes : {0, 1, 63, 64, 65, 4096, 100000, 5 << 20}) {
      blocks.push_back(std::make_unique<Scratch>(bytes));
      char* p = blocks.back()->as<char>();
      CHECK(reinterpret_cast<uintptr_t>(p) % 64 == 0);
      std::memset(p, int(blocks.size()), size_t(bytes));
    }
    int number = 0;
    for (const int64_t bytes : {0, 1, 63, 64, 65, 4096, 100000, 5 << 20}) {
      const char* p = blocks[size_t(number)]->as<char>();
      ++number;
      for (int64_t i = 0; i < bytes; i += 61) CHECK(p[i] == char(number));
    }
  }
}

TEST(sizes_that_no_memory_has_are_refused) {
  const int64_t most = std::numeric_limits<int64_t>::max();
  CHECK(product_of({}) == 1);
  CHECK(product_of({3, 5, 7}) == 105);
  CHECK(product_of({kMostBytes / 4, 4}) == kMostBytes);
  CHECK(product_of({most, most, 0}) == 0);
  const auto refused = [](const auto& size) {
    try {
      const Scratch room(size());
      return false;
    } catch (const std::bad_alloc&) {
      return true;
    }
  };
  CHECK(!refused([] { return 100; }));
  CHECK(refused([] { return product_of({int64_t(1) << 60, 32, 4}); }));  // 2^67: would be 0
  CHECK(refused([&] { return product_of({most, most}); }));              // would be 1
  CHECK(refused([&] { return product_of({most / 8 + 1, 8}); }));         // would be negative
  CHECK(refused([&] { return most; }));
  CHECK(refused([] { return -1; }));
}

TEST(scratch_in_threads_and_beyond_what_is_kept) {
  std::vector<std::thread> threads;
  for (int n = 0; n < 4; ++n) {
    threads.emplace_back([n] {
      for (int round = 0; round < 50; ++round) {
        const Scratch a((round + 1) * 1000), b((200 << 20) * int64_t(round == 25));
        a.as<int>()[0] = n;
        std::this_thread::yield();
        CHECK(a.as<int>()[0] == n);
      }
    });
  }
  for (std::thread& t : threads) t.join();
}

namespace {

// Every bit pattern of T is a float that rounds back to it; a NaN becomes quiet, nothing more.
template <class T>
bool is_exact(uint16_t quiet) {
  bool right = true;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const T h{uint16_t(bits)};
    const uint16_t back = from_float<T>(to_float(h)).bits;
    right = right && back == (std::isnan(to_float(h)) ? bits | quiet : bits);
  }
  return right;
}

}  // namespace

TEST(bfloat16_is_exact_and_rounds_to_even) {
  CHECK(is_exact<Bf16>(0x40));
  const auto rounded = [](float f) { return from_float<Bf16>(f).bits; };
  CHECK(rounded(1.0f + 1.0f / 256) == 0x3f80);  // a tie: down to even
  CHECK(rounded(1.0f + 3.0f / 256) == 0x3f82);  // a tie: up to even
  CHECK(rounded(std::nextafter(1.0f + 1.0f / 256, 2.0f)) == 0x3f81);
  CHECK(std::isinf(to_float(from_float<Bf16>(3.4e38f))));
}

TEST(float16_is_exact_and_rounds_to_even) {
  CHECK(is_exact<F16>(0x0200));
  const auto rounded = [](float f) { return from_float<F16>(f).bits; };
  CHECK(rounded(1.0f + 0x1p-11f) == 0x3c00);  // a tie: down to even
  CHECK(rounded(1.0f + 0x3p-11f) == 0x3c02);  // a tie: up to even
  CHECK(rounded(-std::nextafter(1.0f + 0x1p-11f, 2.0f)) == 0xbc01);
  CHECK(rounded(0x1p-25f) == 0);  // half the smallest number, and one and a half of it
  CHECK(rounded(0x3p-25f) == 2);
  CHECK(rounded(std::nextafter(0x1p-25f, 1.0f)) == 1);
  CHECK(rounded(0x1.ffep-15f) == 0x0400);  // between the subnormal and the normal numbers
  CHECK(rounded(65519.996f) == 0x7bff);
  CHECK(rounded(65520.0f) == 0x7c00);
  CHECK(rounded(-3e38f) == 0xfc00);
  CHECK(rounded(-1e-45f) == 0x8000);
  // To the nearest in double arithmetic, for neighbours of every tie and for floats in general.
  bool right = true;
  const auto nearest = [&](float f) {
    const float h = to_float(from_float<F16>(f));
    const double distance = std::fabs(double(h) - double(f));
    const float above = std::nextafter(std::fabs(f), 1e9f) * 0x1p-11f;
    right = right && (distance <= std::fmax(double(above), 0x1p-25) || std::fabs(f) >= 65520.0f);
  };
  for (uint32_t bits = 0; bits < 0x7bff; ++bits) {
    const float low = to_float(F16{uint16_t(bits)}), high = to_float(F16{uint16_t(bits + 1)});
    const float tie = 0.5f * (low + high);
    right = right && rounded(tie) == bits + (bits & 1);
    right = right && rounded(std::nextafter(tie, 0.0f)) == bits;
    right = right && rounded(-std::nextafter(tie, 1e9f)) == (0x8000 | (bits + 1));
  }
  for (uint64_t bits = 0; bits < 0x7f800000u; bits += 4099) nearest(float_of_bits(uint32_t(bits)));
  CHECK(right);
}

TEST(levels_convert_16_bit_floats_like_the_scalar_code) {
  std::vector<float> floats;
  for (uint64_t bits = 0; bits < (uint64_t(1) << 32); bits += 4099) {
    floats.push_back(float_of_bits(uint32_t(bits)));
  }
  std::vector<uint16_t> all(0x10000), narrow(floats.size());
  for (size_t i = 0; i < all.size(); ++i) all[i] = uint16_t(i);
  for (size_t i = 0; i < all.size(); ++i) {  // and both sides of every tie
    const float f = to_float(F16{all[i]});
    for (const uint32_t off : {0x0fffu, 0x1000u, 0x1001u, 0xfffff000u}) {
      floats.push_back(float_of_bits(bits_of_float(f) + off));
    }
  }
  narrow.resize(floats.size());
  test::for_each_level([&](const KernelTable& table) {
    for (const DType t : {DType::bf16, DType::f16}) {
      bool right = true;
      std::vector<float> wide(all.size());
      table.element.widen(t, all.data(), wide.data(), int64_t(all.size()));
      for (size_t i = 0; i < all.size(); ++i) {
        right =
            right && bits_of_float(wide[i]) == bits_of_float(load_float(all.data(), int64_t(i), t));
      }
      table.element.narrow(t, floats.data(), narrow.data(), int64_t(floats.size()));
      for (size_t i = 0; i < floats.size(); ++i) {
        right = right && narrow[i] == (t == DType::bf16 ? from_float<Bf16>(floats[i]).bits
                                                        : from_float<F16>(floats[i]).bits);
      }
      CHECK(right);
    }
  });
}

namespace {

View view_of(void* data, std::initializer_list<int64_t> shape,
             std::initializer_list<int64_t> stride, DType dtype = DType::f32) {
  View v;
  v.data = data, v.dtype = dtype, v.present = v.writable = true, v.rank = int(shape.size());
  std::copy(shape.begin(), shape.end(), v.shape);
  std::copy(stride.begin(), stride.end(), v.stride);
  return v;
}

const Check check{"op"};

}  // namespace

TEST(messages_name_op_argument_required_and_got) {
  float data[64] = {};
  const View x = view_of(data, {8, 4}, {4, 1});
  const View gamma = view_of(data, {3}, {1});
  CHECK_THROWS(ShapeError,
               "op: gamma must have shape (4,) to match the last axis of x (8, 4), got (3,)",
               check.shape("gamma", gamma, {4}, "to match the last axis of x", &x));
  CHECK_THROWS(DtypeError, "op: x must be int8 or uint8, got float32",
               check.dtype("x", x, {DType::s8, DType::u8}));
  CHECK_THROWS(DtypeError, "op: x is required, got None", check.present("x", View{}));
  CHECK_THROWS(ShapeError, "op: gamma must have at least 2 axes, (rows, C), got shape (3,)",
               check.rank("gamma", gamma, 2, "(rows, C)"));
  View wide = x;
  wide.dtype = DType::f64;
  CHECK_THROWS(DtypeError, "got float64; use x.astype(np.float32)",
               check.dtype("x", wide, {DType::f32}));
}

TEST(outputs_must_be_writable_and_not_broadcast) {
  float data[64] = {};
  View out = view_of(data, {4, 4}, {0, 1});
  CHECK_THROWS(ShapeError, "op: out must not be a broadcast view (axis 0 has stride 0)",
               check.output("out", out, {DType::f32}));
  out.stride[0] = 4;
  check.output("out", out, {DType::f32});
  out.writable = false;
  CHECK_THROWS(ShapeError, "op: out must be writable", check.output("out", out, {DType::f32}));
  View empty = view_of(data, {0, 4}, {0, 0});
  check.output("out", empty, {DType::f32});
}

TEST(overlaps_are_found_in_every_direction) {
  float data[64] = {};
  const View x = view_of(data, {4, 4}, {4, 1});
  const auto overlaps = [&](const View& out, bool same_allowed = false) {
    try {
      check.no_overlap("out", out, "x", x, same_allowed);
      return false;
    } catch (const ShapeError& e) {
      CHECK(std::strstr(e.what(), "op: out must not share memory with x"));
      return true;
    }
  };
  CHECK(overlaps(x));
  CHECK(!overlaps(x, true));
  CHECK(!overlaps(view_of(data + 16, {4, 4}, {4, 1})));
  CHECK(overlaps(view_of(data + 15, {4, 4}, {4, 1})));
  CHECK(overlaps(view_of(data + 19, {4, 4}, {-4, 1}), true));    // reaches back into x
  CHECK(!overlaps(view_of(data + 31, {4, 4}, {-4, -1}), true));  // ends just behind it
  CHECK(overlaps(view_of(data, {4, 4}, {1, 4}), true));          // the same memory, transposed
  CHECK(overlaps(view_of(data, {4, 4}, {4, 1}, DType::bf16), true));
  CHECK(!overlaps(view_of(data, {0, 4}, {4, 1})));
  CHECK(!overlaps(View{}));
}

TEST(memory_is_shared_where_elements_are_and_not_where_ranges_are) {
  float data[64] = {};
  const View even = view_of(data, {8}, {2}), odd = view_of(data + 1, {8}, {2});
  CHECK(share_memory(even, even));
  CHECK(!share_memory(even, odd));
  CHECK(share_memory(even, view_of(data + 3, {4}, {-1})));
  CHECK(!share_memory(view_of(data, {8, 4}, {8, 1}), view_of(data + 4, {8, 4}, {8, 1})));
  CHECK(share_memory(view_of(data, {8, 5}, {8, 1}), view_of(data + 4, {8, 4}, {8, 1})));
  char* bytes = reinterpret_cast<char*>(data);  // the halves of a float
  CHECK(share_memory(even, view_of(bytes + 2, {4}, {4}, DType::bf16)));
  CHECK(!share_memory(even, view_of(bytes + 6, {4}, {4}, DType::bf16)));
  CHECK(!overlaps_itself(view_of(data, {3, 3}, {2, 3})));
  CHECK(!overlaps_itself(view_of(data, {3, 4}, {2, 3})));
  CHECK(overlaps_itself(view_of(data, {4, 3}, {3, 6})));
  CHECK(overlaps_itself(view_of(data, {3, 3}, {1, 1})));
}
