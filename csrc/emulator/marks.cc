// Each byte has a mark of its last write and one of its reads since. What orders two accesses:
//
//   by one thread                          always
//   in one warp                            a __syncwarp, or a barrier, between them
//   in one block                           a barrier between them
//   in different blocks of one launch      nothing; but atomics never race with each other
//
// A mark holds one access. When several readers (or atomics) share it, it holds the last, and flags
// say what the others were: of other threads, warps or blocks. Readers of the same warp that a
// __syncwarp has put before the new one are forgotten; whoever could clash with them and not with
// the new one has passed that __syncwarp too.
#include "emulator/marks.h"

#include "emulator/findings.h"

namespace tilewright::emulator {
namespace {

unsigned warp_of(unsigned thread) {
  return thread / kLanes;
}

Mark mark_of(const Thread& t, Access kind) {
  Mark now{};
  now.block = machine.block.index;
  now.epoch = machine.block.epoch;
  now.warp_epoch = t.warp->epoch;
  now.thread = t.linear;
  now.valid = 1;
  now.atomic = kind == Access::atomic;
  now.pending = kind == Access::async_issue;
  return now;
}

bool clash(const Mark& old, const Mark& now) {
  if (!old.valid || (old.atomic && now.atomic)) return false;
  if (old.block != now.block || old.several_blocks) return true;
  if (old.epoch != now.epoch) return false;
  if (old.thread == now.thread && !old.several_threads) return false;
  const bool same_warp = !old.several_warps && warp_of(old.thread) == warp_of(now.thread);
  return !(same_warp && old.warp_epoch < now.warp_epoch);
}

// `now` in place of `old`, which doesn't clash with it.
Mark merged(const Mark& old, Mark now) {
  if (!old.valid) return now;
  now.several_blocks = old.several_blocks || old.block != now.block;
  if (old.block != now.block || old.epoch != now.epoch) return now;
  const bool other_warps = old.several_warps || warp_of(old.thread) != warp_of(now.thread);
  if (!other_warps && old.warp_epoch < now.warp_epoch) return now;
  now.several_warps = other_warps;
  now.several_threads = old.several_threads || old.thread != now.thread;
  return now;
}

void report_race(const Mark& old, const Mark& now, Site site, const char* space) {
  const std::string block =
      old.block != now.block ? "block " + std::to_string(old.block) + " " : std::string();
  report("race", site,
         std::string(space) + " memory also " + (old.atomic ? "changed atomically" : "touched") +
             " by " + block + "thread " + std::to_string(old.thread) + ", with no barrier between");
}

void check_cell(Cell& cell, Access kind, const Mark& now, Site site, const char* space) {
  const bool reading = kind == Access::read;
  if (kind != Access::async_done) {
    if (cell.write.pending) {
      report("cp.async not waited for", site,
             std::string(reading ? "reads" : "writes") + " bytes that thread " +
                 std::to_string(cell.write.thread) + " is still copying");
    } else if (clash(cell.write, now)) {
      report_race(cell.write, now, site, space);
    } else if (!reading && clash(cell.read, now)) {
      report_race(cell.read, now, site, space);
    }
  }
  if (reading) {
    cell.read = merged(cell.read, now);
  } else {
    cell.write = now.atomic && cell.write.atomic ? merged(cell.write, now) : now;
    cell.read.valid = 0;
  }
}

}  // namespace

void check_order(Cell* cells, std::size_t bytes, Access kind, Site site, const char* space) {
  const Mark now = mark_of(*current, kind);
  for (std::size_t i = 0; i < bytes; ++i) check_cell(cells[i], kind, now, site, space);
}

}  // namespace tilewright::emulator
