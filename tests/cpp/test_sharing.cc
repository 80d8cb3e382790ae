// The model of what sharing costs, fed with made-up regions: no clock, no threads.
#include "core/sharing.h"
#include "test.h"

using namespace tilewright;
using Choice = SharingModel::Choice;

namespace {

constexpr double kSpin = 20e3, kUs = 1e3, kMs = 1e6;

// A program of regions of one size: apart by `gap`, on workers that sleep unless `awake`.
struct Program {
  SharingModel model{kSpin};
  int64_t now = 1'000'000'000;

  Choice next(double work, double gap, bool awake) {
    now += int64_t(gap);
    const Choice choice = model.choose(work, awake, now);
    now += int64_t(work);
    return choice;
  }
  // Shared between two threads that have half the work each, `late` lost.
  void went(double work, double late) {
    now += int64_t(late);
    model.learn_outcome({work, 2, 1, work / 2, late}, now);
  }
  // How many of `regions` were on more than one thread; each loses `late`.
  int shared(int regions, double work, double gap, double late) {
    int count = 0;
    for (int i = 0; i < regions; ++i) {
      const Choice choice = next(work, gap, true);
      if (choice != Choice::share && choice != Choice::share_on) continue;
      ++count;
      went(work, late);
    }
    return count;
  }
};

}  // namespace

TEST(small_regions_share_with_workers_that_are_awake_alone) {
  Program p;
  for (int i = 0; i < 20; ++i) p.model.learn_waking(50 * kUs);
  CHECK(p.next(10 * kUs, kMs, true) == Choice::share);
  CHECK(p.next(10 * kUs, kMs, false) == Choice::alone);
  CHECK(p.next(100 * kUs, kMs, false) == Choice::share);
}

TEST(what_waking_costs_is_learnt_and_forgotten) {
  Program p;
  CHECK(p.next(30 * kUs, kMs, false) == Choice::share);
  for (int i = 0; i < 8; ++i) p.model.learn_waking(50 * kUs);
  CHECK(p.next(30 * kUs, kMs, false) == Choice::alone);
  p.model.learn_waking(1e9);  // once, by chance
  int until_shared = 0;
  while (p.next(30 * kUs, kMs, false) == Choice::alone && until_shared < 10000) ++until_shared;
  CHECK(until_shared > 10 && until_shared < 1000);
  for (int i = 0; i < 50; ++i) p.model.learn_waking(5 * kUs);
  CHECK(p.next(8 * kUs, kMs, false) == Choice::share);
}

TEST(a_run_of_close_regions_wakes_the_workers_and_keeps_them) {
  Program p;
  for (int i = 0; i < 20; ++i) p.model.learn_waking(50 * kUs);
  int alone = 0;
  while (p.next(10 * kUs, 5 * kUs, false) == Choice::alone && alone < 100) ++alone;
  CHECK(alone >= 5 && alone < 20);                           // 50 us at 5 us each
  CHECK(p.next(10 * kUs, 5 * kUs, false) == Choice::alone);  // and again from the beginning
  while (p.next(10 * kUs, 5 * kUs, false) == Choice::alone) continue;
  for (int i = 0; i < 100; ++i) CHECK(p.next(10 * kUs, 2 * kSpin, false) == Choice::alone);
  CHECK(p.next(100 * kUs, 5 * kUs, false) == Choice::share_on);
}

TEST(a_pool_that_costs_more_than_it_gains_is_left_alone_for_longer_and_longer) {
  Program p;
  CHECK(p.shared(1000, 20 * kUs, 5 * kUs, 0) == 1000);
  CHECK(p.shared(10, 20 * kUs, 5 * kUs, 20 * kUs) == 10);  // one loss is no reason, nor are ten
  CHECK(p.shared(10, 20 * kUs, 5 * kUs, 3 * kMs) < 10);
  // Then the shares of some 8 ms, 16 ms, … of regions that are tried
  const int tried = p.shared(100'000, 20 * kUs, 5 * kUs, 3 * kMs);
  CHECK(tried >= 8 && tried < 30);
  CHECK(p.shared(50, 20 * kUs, 5 * kUs, 3 * kMs) == 0);
  // once the cores are free, sharing is tried, earns credit, and goes on
  CHECK(p.shared(100'000, 20 * kUs, 5 * kUs, 0) > 85'000);
  CHECK(p.shared(1000, 20 * kUs, 5 * kUs, 0) == 1000);
  // and what comes then is held against it no longer than at first
  CHECK(p.shared(10, 20 * kUs, 5 * kUs, 3 * kMs) < 10);
  CHECK(p.shared(1000, 20 * kUs, 5 * kUs, 0) > 500);
}

TEST(sharing_that_pays_on_balance_goes_on) {
  Program p;
  for (int i = 0; i < 100; ++i) {
    CHECK(p.shared(500, 20 * kUs, 5 * kUs, 0) == 500);  // 5 ms gained
    CHECK(p.shared(1, 20 * kUs, 5 * kUs, 3 * kMs) == 1);
  }
}

TEST(long_regions_are_shared_whatever_happened) {
  Program p;
  p.shared(100, 20 * kUs, 5 * kUs, 3 * kMs);
  CHECK(p.next(20 * kUs, 5 * kUs, true) == Choice::crowded);
  CHECK(p.next(20 * kMs, 5 * kUs, true) == Choice::share);
}

TEST(a_caller_that_lost_its_own_core_is_a_loss_too) {
  Program p;
  int shared = 0;
  for (int i = 0; i < 100; ++i) {
    if (p.next(20 * kUs, 5 * kUs, true) != Choice::share) continue;
    ++shared;
    p.model.learn_outcome({20 * kUs, 8, 1, 3 * kMs, 0}, p.now);
  }
  CHECK(shared < 10);
}

// Estimates of work may be far too low: a region that took ten times as long, well shared, is no loss.
TEST(a_wrong_estimate_is_no_loss) {
  Program p;
  for (int i = 0; i < 1000; ++i) {
    CHECK(p.next(20 * kUs, 5 * kUs, true) == Choice::share);
    p.model.learn_outcome({20 * kUs, 8, 4, 100 * kUs, 5 * kUs}, p.now);
  }
}
