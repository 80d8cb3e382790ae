// Which regions are worth more than one thread: a model of what the pool's workers cost here and now,
// learnt from the regions themselves. It reads no clock and knows no thread: core/pool.cc asks it
// before a region and tells it how the region went, on the thread that holds the pool.
//
// A region of T ns shared with a worker that arrives after `a`, by a caller who spends `w` on waking
// it, takes (T + w + a) / 2: it gains where T > w + a.
//
//   workers   w + a               share a region of T, if
//   spinning  0.5 us              T >= kAwakeWork, several times as much: tasks are never quite equal
//   parked    wake_, measured     T >= wake_, or a run of close regions has missed more than wake_
//
// * wake_ follows the wakings there are (some 5 us on bare metal, 45 in a virtual machine whose idle
//   CPUs are off), a little faster up than down, and a little down with every region that it kept
//   alone: one too high is found out.
// * In a run of close regions (apart by less than a worker spins) every one that stays alone would
//   have gained T / 2 if the workers were awake. They are woken once that adds up to wake_: as for
//   skis, to rent until it cost as much as to buy is never worse than twice the best.
// * Crowded: where other programs want the cores too, a worker can lose its core in the middle of a
//   task, for a time slice (3 ms) where a task takes 5 us, or the caller loses its own to a worker.
//   core/pool.cc makes that rare. So the model keeps accounts: what a shared region saved (its caller's
//   time in tasks, had it done them all, less the time the region took) is put to credit_, which is
//   bounded. Once it is overdrawn, regions stay alone for rest_, which doubles each time until sharing
//   has earned kCredit again. So sharing that pays on balance goes on, and what doesn't costs a slice in
//   kLongestRest. A region so long that it gains more than a slice is shared whatever happened.
#pragma once
#include <stdint.h>

namespace tilewright {

// Work, in ns of one core, below which a region stays alone unasked.
constexpr double kAwakeWork = 4e3;

class SharingModel {
 public:
  explicit SharingModel(double spin_ns) : spin_ns_(spin_ns) {}

  enum class Choice {
    alone,    // too little work
    crowded,  // alone, because sharing has cost more than it gained
    share,
    share_on,  // and the workers had better stay awake: it is one of many
  };
  // For a region of `work` ns that begins at `now`; `awake`: its workers needn't be woken.
  Choice choose(double work, bool awake, int64_t now);

  // Workers were woken: the time that it took the caller, and until they arrived.
  void learn_waking(double ns);

  struct Outcome {
    double work;         // as chosen by
    int64_t tasks, own;  // all, and those that the caller did
    double busy, late;   // ns that the caller spent in its tasks, and waiting for the others' after
  };
  // A shared region is over, at `now`.
  void learn_outcome(const Outcome& region, int64_t now);

 private:
  const double spin_ns_;
  double wake_ = 10e3;    // to begin with, low: to find out costs a few wakings
  double missed_ = 0;     // by the regions of this run that stayed alone
  int64_t last_end_ = 0;  // of the last region, estimated where it wasn't shared
  double credit_ = 0;
  double rest_ = kShortestRest;
  int64_t alone_until_ = 0;

  static constexpr double kCredit = 10e6, kShortestRest = 8e6, kLongestRest = 256e6;
};

}  // namespace tilewright
