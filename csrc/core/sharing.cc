#include "core/sharing.h"

#include <algorithm>

namespace tilewright {
namespace {

constexpr double kSlice = 4e6;          // that a scheduler may take from a thread at a time
constexpr double kOverdraft = 1e6;      // no single small region closes the account
constexpr double kLongestWake = 200e3;  // beyond it a CPU wasn't asleep but taken
constexpr double kForget = 1.0 / 256;   // of wake_, for a region that it kept alone
constexpr double kUnderestimate = 8;    // at most: of work on a lower ISA level, on fresh pages

}  // namespace

SharingModel::Choice SharingModel::choose(double work, bool awake, int64_t now) {
  const bool close = double(now - last_end_) < spin_ns_;
  last_end_ = now + int64_t(std::min(work, 1e15));
  if (now < alone_until_ && work < 2 * kSlice) return Choice::crowded;
  missed_ = awake || !close ? 0 : missed_ + work / 2;
  if (awake) return Choice::share;
  if (work < wake_ && missed_ < wake_) {
    wake_ -= wake_ * kForget;
    return Choice::alone;
  }
  missed_ = 0;
  return close ? Choice::share_on : Choice::share;
}

void SharingModel::learn_waking(double ns) {
  const double change = std::min(ns, kLongestWake) - wake_;
  wake_ += change / (change > 0 ? 4 : 8);
}

void SharingModel::learn_outcome(const Outcome& region, int64_t now) {
  last_end_ = now;
  // A caller that lost its core was long in few tasks, and would have been with all of them: hence
  // the estimate's bound.
  const double all = region.busy * double(region.tasks) / double(std::max<int64_t>(region.own, 1));
  const double alone = std::min(all, kUnderestimate * region.work);
  const double saved = std::min(alone - region.busy - region.late, region.work);
  credit_ = std::min(credit_ + saved, kCredit);
  if (credit_ == kCredit) rest_ = kShortestRest;
  if (credit_ >= -kOverdraft) return;
  alone_until_ = now + int64_t(rest_);
  rest_ = std::min(2 * rest_, kLongestRest);
  credit_ = 0;
}

}  // namespace tilewright
