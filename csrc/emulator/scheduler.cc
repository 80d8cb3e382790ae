#include "emulator/scheduler.h"

#include <algorithm>
#include <bit>

#include "emulator/fibers.h"

namespace tilewright::emulator {
namespace {

Thread* first_of(const Warp& warp) {
  unsigned lane = 0;
  switch (machine.order) {
    case Order::in_order:
      lane = static_cast<unsigned>(std::countr_zero(warp.runnable));
      break;
    case Order::reversed:
      lane = kLanes - 1 - static_cast<unsigned>(std::countl_zero(warp.runnable));
      break;
    case Order::shuffled: {
      const unsigned from = warp.first_lane;
      const unsigned turned = std::rotr(warp.runnable, static_cast<int>(from));
      lane = (static_cast<unsigned>(std::countr_zero(turned)) + from) % kLanes;
      break;
    }
  }
  return &machine.threads[warp.index * kLanes + lane];
}

}  // namespace

void draw_order() {
  std::vector<unsigned>& order = machine.warp_order;
  order.resize(machine.warp_count);
  for (unsigned w = 0; w < machine.warp_count; ++w) order[w] = w;
  if (machine.order == Order::in_order) return;
  if (machine.order == Order::reversed) return std::reverse(order.begin(), order.end());
  std::shuffle(order.begin(), order.end(), machine.random);
  for (unsigned w = 0; w < machine.warp_count; ++w) {
    machine.warps[w].first_lane = static_cast<unsigned>(machine.random() % kLanes);
  }
}

Thread* next_runnable() {
  if (current && current->warp->runnable) return first_of(*current->warp);
  for (unsigned w : machine.warp_order) {
    if (machine.warps[w].runnable) return first_of(machine.warps[w]);
  }
  return nullptr;
}

void resume(Thread* next) {
  if (next == current) return;
  void** save = current ? &current->stack_pointer : &machine.main_stack_pointer;
  current = next;
  switch_stack(save, next ? next->stack_pointer : machine.main_stack_pointer);
}

void wait() {
  current->warp->runnable &= ~(1u << current->lane);
  resume(next_runnable());
}

}  // namespace tilewright::emulator
