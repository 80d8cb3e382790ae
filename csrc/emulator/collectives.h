// Operations that several lanes of a warp perform together.
#pragma once
#include <cstdio>

#include "emulator/counters.h"
#include "emulator/findings.h"
#include "emulator/scheduler.h"

namespace tilewright::emulator {

inline std::string lanes_text(unsigned lanes) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", lanes);
  return text;
}

// The collective that lanes with this mask wait in, or begin; ends the kernel when they wait in
// another operation, or somewhere else.
Collective& join(const char* operation, unsigned mask, Site site);

// Waits for every lane in `mask`; the last to come runs finish(arguments of all lanes). With
// needs_whole_warp, a warp that the block's size cuts short can't perform it at all.
template <class Finish>
void rendezvous(const char* operation, unsigned mask, Site site, void* argument, Finish finish,
                bool needs_whole_warp = false) {
  const Thread& t = *current;
  Warp& warp = *t.warp;
  if (mask == ~0u && !needs_whole_warp) mask = warp.initial;
  Collective& c = join(operation, mask, site);
  c.arguments[t.lane] = argument;
  c.arrived |= 1u << t.lane;
  if (c.arrived != mask) return wait();  // c may have moved by the time this returns
  if (mask == warp.live) flush(warp);
  c.arrived = 0;
  finish(c.arguments);
  warp.runnable |= mask;
}

}  // namespace tilewright::emulator
