// Barriers, votes and shuffles.
#include "emulator/collectives.h"

namespace tilewright::emulator {
namespace {

void release_barrier() {
  Block& b = machine.block;
  for (unsigned w = 0; w < machine.warp_count; ++w) {
    Warp& warp = machine.warps[w];
    flush(warp);
    warp.runnable = warp.live;
    warp.epoch = 0;
  }
  b.waiting = 0;
  b.predicate_result = b.predicate_sum;
  b.predicate_sum = 0;
  ++b.epoch;
  ++machine.counters.barriers;
  draw_order();
}

// The lane that `lane` reads; its own where the distance leads out of its group of `width` lanes.
int source_lane(Shuffle kind, int lane, int operand, int width) {
  const int first = lane & ~(width - 1), last = first + width - 1;
  int from = lane;
  switch (kind) {
    case Shuffle::index:
      return first + (operand & (width - 1));
    case Shuffle::up:
      from = lane - operand;
      break;
    case Shuffle::down:
      from = lane + operand;
      break;
    case Shuffle::exclusive_or:
      // Lanes of lower groups may be read, those of higher ones not.
      from = lane ^ operand;
      return from > last ? lane : from;
  }
  return from < first || from > last ? lane : from;
}

}  // namespace

int barrier(int predicate, Site site) {
  const Unwatched unwatched;
  Block& b = machine.block;
  if (b.waiting == 0) b.barrier_site = site;
  if (!same_site(b.barrier_site, site)) {
    report("barrier divergence", site, "others of the block wait at " + text_of(b.barrier_site));
  }
  if (b.exited) {
    report("barrier divergence", site,
           std::to_string(b.exited) + " threads of the block have ended");
  }
  b.predicate_sum += predicate != 0;
  if (++b.waiting + b.exited == b.threads) {
    release_barrier();
  } else {
    wait();
  }
  return b.predicate_result;
}

Collective& join(const char* operation, unsigned mask, Site site) {
  Warp& warp = *current->warp;
  if (!(mask >> current->lane & 1)) {
    fail("warp mask", site, std::string(operation) + " with a mask that lacks the calling lane");
  }
  Collective* c = nullptr;
  for (Collective& open : warp.open) {
    if (open.mask == mask) c = &open;
  }
  if (!c) c = &warp.open.emplace_back(Collective{mask});
  if (c->arrived == 0) {
    c->operation = operation;
    c->site = site;
  }
  if (c->operation != operation || !same_site(c->site, site)) {
    fail("warp divergence", site,
         std::string(operation) + ", but other lanes wait in " + c->operation + " at " +
             text_of(c->site));
  }
  if (mask & ~warp.live) {
    fail("warp divergence", site,
         std::string(operation) +
             " names lanes that have ended or never were: " + lanes_text(mask & ~warp.live));
  }
  return *c;
}

void warp_barrier(unsigned mask, Site site) {
  const Unwatched unwatched;
  Warp& warp = *current->warp;
  rendezvous("__syncwarp", mask, site, nullptr, [&](auto&) {
    ++warp.epoch;
    ++machine.counters.warp_barriers;
  });
}

unsigned ballot(unsigned mask, int predicate, Site site) {
  const Unwatched unwatched;
  struct Argument {
    int in;
    unsigned out;
  } mine{predicate, 0};
  rendezvous("vote", mask, site, &mine, [mask](auto& all) {
    unsigned bits = 0;
    const auto each = [&](auto body) {
      for (unsigned lane = 0; lane < kLanes; ++lane) {
        if (mask >> lane & 1 && all[lane]) body(lane, *static_cast<Argument*>(all[lane]));
      }
    };
    each([&](unsigned lane, Argument& a) { bits |= static_cast<unsigned>(a.in != 0) << lane; });
    each([&](unsigned, Argument& a) { a.out = bits; });
  });
  return mine.out;
}

std::uint64_t shuffle(unsigned mask, std::uint64_t value, Shuffle kind, int operand, int width,
                      Site site) {
  const Unwatched unwatched;
  struct Argument {
    std::uint64_t in, out;
    int operand;
  } mine{value, value, operand};
  if (width < 1 || width > static_cast<int>(kLanes) || width & (width - 1)) {
    fail("shuffle", site, "a width of " + std::to_string(width) + ", not a power of two up to 32");
  }
  rendezvous("shuffle", mask, site, &mine, [=](auto& all) {
    ++machine.counters.shuffles;
    for (int lane = 0; lane < static_cast<int>(kLanes); ++lane) {
      if (!(mask >> lane & 1) || !all[static_cast<unsigned>(lane)]) continue;
      auto& a = *static_cast<Argument*>(all[static_cast<unsigned>(lane)]);
      const int from = source_lane(kind, lane, a.operand, width);
      if (from < 0 || !(mask >> from & 1) || !all[static_cast<unsigned>(from)]) {
        fail("shuffle", site,
             "lane " + std::to_string(lane) + " reads lane " + std::to_string(from) +
                 ", which does not take part");
      }
      a.out = static_cast<Argument*>(all[static_cast<unsigned>(from)])->in;
    }
  });
  return mine.out;
}

}  // namespace tilewright::emulator
