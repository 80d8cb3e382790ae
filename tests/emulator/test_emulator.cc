// Whether the emulator does its own work: right kernels pass with the right numbers, wrong ones
// have the finding they should. Compiled in both modes; where only checked mode can see, only it
// must.
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#include "check_kernels.h"
#include "device.h"

using namespace tilewright;
using namespace check_kernels;

namespace {

std::vector<float> numbers(std::size_t n) {
  std::vector<float> x(n);
  unsigned state = 1;
  for (float& v : x) {
    state = state * 1664525u + 1013904223u;
    v = static_cast<float>(state >> 16) / 32768.0f - 1.0f;
  }
  return x;
}

void fill(const Device<float>& to) {
  const std::vector<float> x = numbers(to.size());
  std::memcpy(to.get(), x.data(), x.size() * sizeof(float));
}

// Counters of the one site that has traffic of this kind.
emulator::SiteCounters site(const emulator::Counters& counters, const char* space, bool write) {
  emulator::SiteCounters found{};
  for (const auto& s : counters.sites) {
    if (s.space == std::string(space) && s.write == write) found = s;
  }
  return found;
}

}  // namespace

TEST(the_mode_is_the_one_compiled) {
#ifdef __SANITIZE_THREAD__
  CHECK(emulator::checked());
#else
  CHECK(!emulator::checked());
#endif
}

TEST(transpose_and_its_bank_conflicts) {
  const Device<float> x(64 * 64), y(64 * 64, 0.0f);
  fill(x);
  emulator::take_counters();
  IS_RIGHT(outcome(transpose<1>, dim3(2, 2), dim3(32, 32), 32 * 33 * 4, x.get(), y.get(), 64));
  const emulator::Counters padded = emulator::take_counters();
  for (std::size_t i = 0; i < 64 * 64; ++i) CHECK(y[i] == x[i % 64 * 64 + i / 64]);
  IS_RIGHT(outcome(transpose<0>, dim3(2, 2), dim3(32, 32), 32 * 32 * 4, x.get(), y.get(), 64));
  const emulator::Counters unpadded = emulator::take_counters();
  for (std::size_t i = 0; i < 64 * 64; ++i) CHECK(y[i] == x[i % 64 * 64 + i / 64]);
  CHECK(padded.blocks == 4 && padded.barriers == 4 && padded.launches == 1);
  if (!emulator::checked()) return;
  CHECK(site(padded, "shared", false).wavefronts == 128);
  CHECK(site(unpadded, "shared", false).wavefronts == 4096);
  CHECK(site(unpadded, "shared", false).ideal_wavefronts == 128);
  CHECK(site(unpadded, "shared", true).wavefronts == 128);
  CHECK(site(unpadded, "global", false).sectors == 512);
  CHECK(site(unpadded, "global", false).ideal_sectors == 512);
  CHECK(site(unpadded, "global", true).where.find("check_kernels.h:") == 0);
}

TEST(layernorm_needs_its_barrier) {
  const Device<float> x(4 * 200), y(4 * 200);
  fill(x);
  IS_RIGHT(outcome(layernorm<true>, dim3(4), dim3(128), 64, x.get(), y.get(), 200));
  for (std::size_t row = 0; row < 4; ++row) {
    double sum = 0, squares = 0;
    for (std::size_t i = 0; i < 200; ++i) {
      const double v = x[row * 200 + i];
      sum += v;
      squares += v * v;
    }
    const double mean = sum / 200, scale = 1 / std::sqrt(squares / 200 - mean * mean + 1e-5);
    for (std::size_t i = row * 200; i < row * 200 + 200; ++i) {
      CHECK(std::abs(y[i] - (x[i] - mean) * scale) < 1e-5);
    }
  }
  FINDS_CHECKED("race at check_kernels.h",
                outcome(layernorm<false>, dim3(4), dim3(128), 64, x.get(), y.get(), 200));
}

TEST(threads_that_miss_a_barrier) {
  const Device<float> y(64);
  FINDS("barrier divergence", outcome(early_exit, dim3(1), dim3(64), 0, y.get()));
  FINDS("1 threads of the block have ended", outcome(late_exit, dim3(1), dim3(64), 0, y.get()));
  FINDS("others of the block wait at check_kernels.h",
        outcome(two_barriers, dim3(1), dim3(64), 0, y.get()));
  Scheduled reversed(emulator::Order::reversed);
  FINDS("ends while others wait", outcome(late_exit, dim3(1), dim3(64), 0, y.get()));
}

TEST(barriers_that_count) {
  const Device<int> count(64 * 3);
  IS_RIGHT(outcome(predicates, dim3(1), dim3(64), 0, count.get()));
  for (std::size_t i = 0; i < 64; ++i) {
    CHECK(count[i * 3] == 32 && count[i * 3 + 1] == 1 && count[i * 3 + 2] == 0);
  }
}

TEST(shared_memory_out_of_bounds_and_unwritten) {
  const Device<float> y(64);
  FINDS_CHECKED("uninitialised shared memory at check_kernels.h",
                outcome(unwritten, dim3(1), dim3(64), 256, y.get()));
  IS_RIGHT(outcome(beyond_shared, dim3(1), dim3(32), 128, y.get(), 0));
  FINDS_CHECKED("4 bytes at offset 128 of 128",
                outcome(beyond_shared, dim3(1), dim3(32), 128, y.get(), 1));
  FINDS("uses 128 bytes, the launch gave 100",
        outcome(beyond_shared, dim3(1), dim3(32), 100, y.get(), 0));
}

TEST(unwritten_memory_is_nan) {
  const Device<float> y(64);
  CHECK(std::isnan(y[0]) && std::isnan(y[63]));
  if (emulator::checked()) return;
  IS_RIGHT(outcome(unwritten, dim3(1), dim3(64), 256, y.get()));
  CHECK(std::isnan(y[0]) && y[1] == 1);
}

TEST(warp_exchanges) {
  const Device<float> y(32);
  IS_RIGHT(outcome(warp_exchange<true>, dim3(1), dim3(32), 128, y.get()));
  for (std::size_t i = 0; i < 32; ++i) CHECK(y[i] == static_cast<float>(i ^ 1));
  FINDS_CHECKED("race", outcome(warp_exchange<false>, dim3(1), dim3(32), 128, y.get()));
  for (const auto order : {emulator::Order::in_order, emulator::Order::reversed}) {
    Scheduled scheduled(order);
    IS_RIGHT(outcome(warp_exchange_in_place, dim3(1), dim3(32), 128, y.get()));
    for (std::size_t i = 0; i < 32; ++i) CHECK(y[i] == 31 * 32 / 2);
  }
}

TEST(lanes_that_miss_an_operation) {
  const Device<float> y(32);
  FINDS("names lanes that have ended", outcome(lost_lane, dim3(1), dim3(32), 0, y.get()));
  FINDS("lacks the calling lane", outcome(own_lane_missing, dim3(1), dim3(32), 0, y.get()));
  FINDS("reads lane 20, which does not take part",
        outcome(outside_the_mask, dim3(1), dim3(32), 0, y.get()));
  FINDS("other lanes wait in shuffle at check_kernels.h",
        outcome(diverging_shuffles, dim3(1), dim3(32), 0, y.get()));
}

TEST(shuffles_and_votes) {
  const Device<int> out(32 * 5);
  IS_RIGHT(outcome(warp_operations, dim3(1), dim3(32), 0, out.get()));
  for (int lane = 0; lane < 32; ++lane) {
    const int* mine = out.get() + lane * 5;
    CHECK(mine[0] == 5);
    CHECK(mine[1] == lane / 8 * 8 + (lane + 1) % 8);
    CHECK(mine[2] == (lane % 16 < 3 ? lane : lane - 3));
    CHECK(mine[3] == (lane > 28 ? lane : lane + 3));
    CHECK(mine[4] == ((lane ^ 12) > lane / 8 * 8 + 7 ? lane : lane ^ 12));
  }
  for (const unsigned lanes : {32u, 16u}) {
    IS_RIGHT(outcome(votes, dim3(1), dim3(lanes), 0, out.get()));
    CHECK(out[0] == static_cast<int>(0x49249249u & (lanes == 32 ? ~0u : 0xffffu)));
    CHECK(out[1] == 1 && out[2] == 1);
  }
  FINDS("which does not take part",
        outcome(warp_operations, dim3(1), dim3(16), 0, out.get()));  // shuffles past its end
  const Device<double> halves(32);
  IS_RIGHT(outcome(half_warps, dim3(1), dim3(32), 0, halves.get()));
  CHECK(halves[0] == 120 && halves[15] == 120 && halves[16] == 376);
}

TEST(blocks_share_only_atomics) {
  const Device<float> x(5 * 40), sum(40, 0.0f);
  fill(x);
  IS_RIGHT(outcome(column_sum<true>, dim3(5), dim3(40), 0, x.get(), sum.get(), 40));
  for (std::size_t c = 0; c < 40; ++c) {
    CHECK(sum[c] == (((x[c] + x[40 + c]) + x[80 + c]) + x[120 + c]) + x[160 + c]);
  }
  FINDS_CHECKED("also touched by block 0 thread",
                outcome(column_sum<false>, dim3(5), dim3(40), 0, x.get(), sum.get(), 40));
  const Device<int> count(1, 0), seen(1);
  FINDS_CHECKED("also changed atomically",
                outcome(peek, dim3(1), dim3(64), 0, count.get(), seen.get()));
}

TEST(atomics_do_what_they_say) {
  const Device<int> x(6, 0), old(32);
  const Device<unsigned> bits(2, 0u);
  bits[1] = ~0u;
  IS_RIGHT(outcome(atomics, dim3(1), dim3(32), 0, x.get(), bits.get(), old.get()));
  CHECK(x[0] == 496 && x[1] == -496 && x[2] == 31 && x[3] == -31 && x[4] == 32 && x[5] == 31);
  CHECK(bits[0] == ~0u && bits[1] == 0);
  CHECK(old[0] == 0 && old[1] == 0 && old[31] == 30);
}

TEST(sectors_of_a_stride) {
  const Device<float> x(32 * 32), y(32);
  fill(x);
  for (const int stride : {1, 2, 32}) {
    emulator::take_counters();
    IS_RIGHT(outcome(strided, dim3(1), dim3(32), 0, x.get(), y.get(), stride));
    if (!emulator::checked()) continue;
    const emulator::SiteCounters s = site(emulator::take_counters(), "global", false);
    CHECK(s.sectors == static_cast<std::uint64_t>(stride == 32 ? 32 : 4 * stride));
    CHECK(s.ideal_sectors == 4 && s.instructions == 1);
  }
}

TEST(global_memory_out_of_bounds) {
  const Device<float> few(20);
  IS_RIGHT(outcome(store_one, dim3(1), dim3(32), 0, few.get(), 20));
  FINDS_CHECKED("4 bytes at offset 80 of an allocation of 80",
                outcome(store_one, dim3(1), dim3(32), 0, few.get(), 21));
  FINDS_CHECKED("global memory out of bounds",
                outcome(store_one, dim3(1), dim3(32), 0, few.get() - 1, 1));
  FINDS("16 bytes at offset 80 of an allocation of 80",
        outcome(store_vectors, dim3(1), dim3(32), 0, few.get()));
  const Device<float4> y(32);
  FINDS("misaligned access at check_kernels.h",
        outcome(load_vectors, dim3(1), dim3(4), 0, few.get(), 1, y.get()));
}

TEST(memory_that_is_not_the_devices) {
  std::vector<float> host(128);
  static float writable[128];
  for (float* p : {host.data(), writable}) {
    FINDS_CHECKED("host memory at check_kernels.h",
                  outcome(store_one, dim3(1), dim3(32), 0, p, 32));
    FINDS("not the device's", outcome(store_vectors, dim3(1), dim3(32), 0, p));
  }
  FINDS("null pointer", outcome(store_vectors, dim3(1), dim3(32), 0, static_cast<float*>(nullptr)));
  float* released = nullptr;
  {
    const Device<float> y(128);
    released = y.get();
  }
  FINDS("one that was released", outcome(store_vectors, dim3(1), dim3(32), 0, released));
  // Far beyond every allocation, and just outside of the arena.
  const Device<float> y(128);
  FINDS("in no allocation",
        outcome(store_vectors, dim3(1), dim3(32), 0, y.get() + (std::size_t{1} << 27)));
  FINDS("not the device's",
        outcome(store_vectors, dim3(1), dim3(32), 0, y.get() + (std::size_t{1} << 31)));
  FINDS_CHECKED("host memory", outcome(strided, dim3(1), dim3(32), 0, writable, y.get(), 1));
  // Constants of the program are no memory of its own: kernels may read them.
  IS_RIGHT(outcome(constants, dim3(1), dim3(32), 0, y.get(), 1));
  CHECK(y[0] == 2 && y[1] == 4 && y[2] == 8 && y[3] == 1);
}

TEST(copies_are_waited_for) {
  const Device<float4> x(32), y(32);
  for (std::size_t i = 0; i < 32; ++i) x[i] = make_float4(float(i), 1, 2, 3);
  const auto run = [&](auto kernel, int bytes) {
    return outcome(kernel, dim3(1), dim3(32), 512, x.get(), y.get(), bytes);
  };
  IS_RIGHT(run(copy_across<Wait::right>, 16));
  for (std::size_t i = 0; i < 32; ++i) CHECK(y[i].x == float(31 - i) && y[i].w == 3);
  IS_RIGHT(run(copy_across<Wait::right>, 8));
  CHECK(y[0].x == 31 && y[0].y == 1 && y[0].z == 0 && y[0].w == 0);
  IS_RIGHT(run(copy_across<Wait::right>, 0));
  CHECK(y[0].x == 0);
  FINDS("the thread ends before the copy", run(copy_across<Wait::none>, 16));
  CHECK(std::isnan(y[0].x));
  FINDS("the thread ends before the copy", run(copy_across<Wait::uncommitted>, 16));
  FINDS("the thread ends before the copy", run(copy_across<Wait::too_few>, 16));
  FINDS_CHECKED("is still copying", run(copy_across<Wait::none>, 16));
  FINDS_CHECKED("race at check_kernels.h", run(copy_across<Wait::no_barrier>, 16));
  FINDS("a source of 17 bytes", run(copy_across<Wait::right>, 17));
  FINDS("global memory out of bounds",
        outcome(copy_across<Wait::right>, dim3(1), dim3(32), 512, x.get() + 1, y.get(), 16));
}

TEST(buffers_are_not_refilled_while_others_read) {
  const Device<float4> x(64 * 6);
  const Device<float> y(64);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = make_float4(float(i), 0, 0, 0);
  for (const auto order : {emulator::Order::in_order, emulator::Order::reversed}) {
    Scheduled scheduled(order);
    IS_RIGHT(outcome(pipeline<true>, dim3(1), dim3(64), 2048, x.get(), y.get(), 6));
    for (std::size_t i = 0; i < 64; ++i) CHECK(y[i] == float(6 * (63 - i) + 64 * 15));
  }
  const std::string found = outcome(pipeline<false>, dim3(1), dim3(64), 2048, x.get(), y.get(), 6);
  FINDS_CHECKED("race at check_kernels.h", found);
  bool wrong = false;
  for (std::size_t i = 0; i < 64; ++i) wrong |= y[i] != float(6 * (63 - i) + 64 * 15);
  CHECK(wrong);  // in either mode
}

TEST(findings_say_where_and_who) {
  const Device<float> y(64);
  const std::string found = outcome(early_exit, dim3(2), dim3(64), 0, y.get());
  FINDS("kernel: grid (2, 1, 1), block (64, 1, 1), 0 bytes of shared memory: ", found);
  FINDS("check_kernels.h:", found);
  FINDS("block (0,0,0) thread (", found);
  // The next launch begins anew.
  IS_RIGHT(outcome(store_one, dim3(1), dim3(64), 0, y.get(), 64));
}

TEST(limits_of_every_card) {
  const Device<float> y(1024);
  const auto launch = [&](dim3 grid, dim3 block) {
    gpu::launch("tall", store_one, grid, block, 0, nullptr, y.get(), 0);
  };
  launch(dim3(70000), dim3(1));
  CHECK_THROWS(DeviceError,
               "tall: grid (1, 65536, 1), block (32, 1, 1), 0 bytes of shared memory:"
               " grid.y must be 1 to 65535, got 65536",
               launch(dim3(1, 65536), dim3(32)));
  CHECK_THROWS(DeviceError, "grid.z must be 1 to 65535", launch(dim3(1, 1, 65536), dim3(32)));
  CHECK_THROWS(DeviceError, "grid.x must be 1 to 2147483647, got 0", launch(dim3(0), dim3(32)));
  CHECK_THROWS(DeviceError, "block.z must be 1 to 64", launch(dim3(1), dim3(1, 1, 65)));
  CHECK_THROWS(DeviceError, "block.x must be 1 to 1024, got 0", launch(dim3(1), dim3(0)));
  CHECK_THROWS(DeviceError, "at most 1024 threads, got 2048", launch(dim3(1), dim3(1024, 2)));
  launch(dim3(1), dim3(1024));
}

TEST(shared_memory_of_a_smaller_card) {
  const Device<float> y(32);
  const auto launch = [&](std::size_t bytes) {
    gpu::launch("wide", store_one, dim3(1), dim3(32), bytes, nullptr, y.get(), 0);
  };
  launch(227 * 1024);
  CHECK_THROWS(DeviceError, "at most 232448 bytes of shared memory", launch(227 * 1024 + 1));
  emulator::set_shared_limit(99 * 1024);
  CHECK_THROWS(DeviceError, "wide: grid (1, 1, 1), block (32, 1, 1), 102400 bytes",
               launch(100 * 1024));
  emulator::set_shared_limit(227 * 1024);
  launch(100 * 1024);
}

TEST(schedules) {
  constexpr unsigned kBlocks = 3, kThreads = 64, kAllOfThem = kBlocks * kThreads;
  const auto arrive = [] {
    const Device<unsigned> next(1, 0u), order(kAllOfThem);
    IS_RIGHT(outcome(arrivals, dim3(kBlocks), dim3(kThreads), 0, next.get(), order.get()));
    return std::vector<unsigned>(order.get(), order.get() + kAllOfThem);
  };
  std::vector<unsigned> expected(kAllOfThem);
  for (unsigned i = 0; i < kAllOfThem; ++i) expected[i] = i;
  CHECK(arrive() == expected);
  {
    Scheduled reversed(emulator::Order::reversed);
    CHECK(arrive() == std::vector<unsigned>(expected.rbegin(), expected.rend()));
  }
  const auto two_launches = [&](unsigned seed) {
    Scheduled shuffled(emulator::Order::shuffled, seed);
    std::vector<unsigned> first = arrive(), second = arrive();
    CHECK(first != second);
    first.insert(first.end(), second.begin(), second.end());
    return first;
  };
  const std::vector<unsigned> once = two_launches(5);
  CHECK(once == two_launches(5));
  CHECK(once != two_launches(6));
  CHECK(arrive() == expected);
}

TEST(device_memory) {
  const std::size_t before = emulator::allocated_bytes();
  {
    const Device<char> a(1000), b(0), c(std::size_t{1} << 20);
    CHECK(emulator::allocated_bytes() == before + 1000 + (std::size_t{1} << 20));
    CHECK(reinterpret_cast<std::uintptr_t>(a.get()) % 256 == 0);
    CHECK(a.get() != b.get());
  }
  CHECK(emulator::allocated_bytes() == before);
  emulator::release(nullptr);
  int host = 0;
  CHECK_THROWS(DeviceError, "did not give", emulator::release(&host));
  CHECK(emulator::allocate(std::size_t{1} << 40) == nullptr);
  emulator::set_memory_limit(before + 1000);
  CHECK(emulator::allocate(1001) == nullptr);
  emulator::release(emulator::allocate(1000));
  emulator::set_memory_limit(~std::size_t{0});
  // More than the whole arena, beside an allocation that stays: addresses come round again.
  const Device<int> stays(100, 7);
  bool came_round = false;
  const char* last = nullptr;
  for (int i = 0; i < 1100000; ++i) {  // of no bytes, but with a gap
    auto* p = static_cast<char*>(emulator::allocate(0));
    came_round |= p < last;
    last = p;
    emulator::release(p);
  }
  CHECK(came_round);
  CHECK(stays[0] == 7 && stays[99] == 7);
}

TEST(launches_from_several_threads_take_turns) {
  const Device<float> x(200), y(200), z(200);
  fill(x);
  const auto run = [&](const Device<float>& to) {
    for (int i = 0; i < 20; ++i) {
      IS_RIGHT(outcome(layernorm<true>, dim3(1), dim3(128), 64, x.get(), to.get(), 200));
    }
  };
  std::thread other([&] { run(z); });
  run(y);
  other.join();
  CHECK(!std::memcmp(y.get(), z.get(), 200 * sizeof(float)));
}
