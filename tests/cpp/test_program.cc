// Programs in C++: the bits of the calls one by one, an arena that is shared, inputs rebound, errors
// that leave a program usable; and regions that follow each other closely.
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "core/parallel.h"
#include "guarded.h"
#include "ops/program.h"
#include "test.h"
#include "tilewright/tilewright.h"

using namespace tilewright;
using Floats = std::vector<float>;

namespace {

constexpr int64_t kRows = 60, kWidth = 90, kBytes = kRows * kWidth * 4;

Floats numbers(int64_t n, int seed) {
  Floats x(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) x[size_t(i)] = 0.1f * float(test::small(i, seed));
  return x;
}

// x -> gelu(x w) -> its layernorm, twice over: y.
struct Chain {
  Floats x = numbers(kRows * kWidth, 1), w = numbers(kWidth * kWidth, 2);
  Floats a = x, b = x, c = x, y = x;

  template <class Take>
  void each(const Take& take) {
    const auto view = [](Floats& f) { return view_of(f.data(), {kRows, kWidth}); };
    Matmul product;
    product.a = view(x), product.b = view_of(w.data(), {kWidth, kWidth});
    product.out = view(a);
    take(product);
    take(ActivationForward{view(a), view(b), Activation::gelu});
    LayernormForward norm;
    norm.x = view(b), norm.y = view(c);
    take(norm);
    product.a = view(c), product.out = view(y);
    take(product);
  }
  void run_each() {
    each([](const auto& op) { run(op); });
  }
  void record(Program& program) {
    each([&](const auto& op) { program.add(op); });
    program.plan({{x.data(), kBytes}},
                 {{a.data(), kBytes}, {b.data(), kBytes}, {c.data(), kBytes}});
    for (Floats* gone : {&a, &b, &c}) *gone = Floats(1);  // what lay there is in the arena now
  }
};

}  // namespace

TEST(a_program_has_the_bits_of_its_calls) {
  test::for_each_level([](const KernelTable&) {
    for (const int threads : {1, 3}) {
      set_num_threads(threads);
      Chain want, got;
      want.run_each();
      Program program;
      got.record(program);
      for (int i = 0; i < 3; ++i) {
        program.poison();
        program.run();
        CHECK(program.done() == 4);
        CHECK(std::memcmp(want.y.data(), got.y.data(), kBytes) == 0);
      }
      CHECK(program.arena_bytes() <= 2 * (kBytes + 64));  // of three, two live at once
      want.x = numbers(kRows * kWidth, 7);
      want.a = want.b = want.c = want.y;
      want.run_each();
      program.rebind(0, want.x.data());
      program.run();
      CHECK(std::memcmp(want.y.data(), got.y.data(), kBytes) == 0);
    }
  });
}

TEST(lists_of_views_are_copied) {
  Floats p(100, 1.0f), g(100, 2.0f);
  Program program;
  {
    std::vector<View> params{view_of(p.data(), {100})}, grads{view_of(g.data(), {100})};
    Sgd op{};
    op.params = {params.data(), 1}, op.grads = {grads.data(), 1}, op.lr = 0.5;
    program.add(op);
    params[0] = grads[0] = View{};
  }
  program.run();
  CHECK(p[99] == 0.0f);
}

TEST(an_error_names_the_step_and_leaves_the_program_usable) {
  Floats table = numbers(12, 1), y(8), z(8);
  std::vector<int64_t> ids{2, 1};
  Program program;
  const View rows = view_of(y.data(), {2, 4});
  program.add(EmbeddingForward{view_of(ids.data(), {2}), view_of(table.data(), {3, 4}), rows});
  program.add(ActivationForward{rows, view_of(z.data(), {2, 4}), Activation::relu});
  program.run();
  ids[1] = 3;
  CHECK_THROWS(ShapeError, "ids", program.run());
  CHECK(program.done() == 0);
  ids[1] = 0;
  program.run();
  CHECK(program.done() == 2);
}

TEST(close_regions_nest_and_give_the_pool_back) {
  set_num_threads(4);
  std::atomic<int64_t> total{0};
  const auto region = [&] { parallel_for(8, 1e9, [&](int64_t i) { total += i; }); };
  for (int i = 0; i < 200; ++i) {
    const CloseRegions outer;
    region();
    const CloseRegions inner;
    for (int n = 0; n < 20; ++n) region();
  }
  region();
  CHECK(total == 28 * (200 * 21 + 1));
}

TEST(programs_of_several_threads_take_turns) {
  set_num_threads(3);
  Chain want;
  want.run_each();
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int n = 0; n < 3; ++n) {
    callers.emplace_back([&] {
      Chain mine;
      Program program;
      mine.record(program);
      for (int i = 0; i < 30; ++i) {
        program.poison();
        program.run();
        wrong += std::memcmp(want.y.data(), mine.y.data(), kBytes) != 0;
      }
    });
  }
  for (std::thread& t : callers) t.join();
  CHECK(wrong == 0);
}

TEST(the_poll_interrupts_a_program) {
  set_num_threads(2);
  static std::atomic<bool> stop{false};
  set_poll([] { return stop.load() ? 1 : 0; });
  Chain chain;
  Program program;
  for (int i = 0; i < 5000; ++i) {
    ActivationForward op;
    op.x = op.y = view_of(chain.y.data(), {kRows, kWidth});
    op.activation = Activation::gelu;
    program.add(op);
  }
  stop = true;
  CHECK_THROWS(Interrupted, "interrupted", for (int i = 0; i < 1000; ++i) program.run());
  stop = false;
  set_poll(nullptr);
  program.run();
  CHECK(program.done() == program.size());
}
