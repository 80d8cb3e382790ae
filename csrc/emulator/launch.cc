// One launch: its blocks one after another, each with fresh fibers, until all have ended, one has
// failed, or nobody can go on.
#include <algorithm>

#include "emulator/collectives.h"
#include "emulator/fibers.h"
#include "emulator/memory.h"
#include "emulator/tape.h"

namespace tilewright::emulator {
namespace {

void end_of_kernel() {
  Thread& t = *current;
  t.groups.push_back(std::move(t.uncommitted));
  t.uncommitted.clear();
  for (const auto& group : t.groups) {
    if (group.empty()) continue;
    report("cp.async without wait", group[0].site, "the thread ends before the copy");
  }
  if (machine.block.waiting) {
    report("barrier divergence", machine.block.barrier_site,
           "this thread ends while others wait there");
  }
}

// What every fiber runs. It never returns: its last act is to leave for another.
void fiber_main() {
  try {
    watched = true;
    machine.launch->body(machine.launch->parameters);
    watched = false;
    end_of_kernel();
  } catch (const Fatal&) {
    watched = false;
    machine.aborted = true;
  } catch (const std::exception& e) {
    watched = false;
    report("exception", {}, e.what());
    machine.aborted = true;
  }
  Thread& t = *current;
  t.warp->live &= ~(1u << t.lane);
  t.warp->runnable &= ~(1u << t.lane);
  ++machine.block.exited;
  resume(machine.aborted ? nullptr : next_runnable());
  __builtin_unreachable();
}

void make_thread(unsigned i, uint3 block_index) {
  const dim3 size = machine.launch->block;
  Thread& t = machine.threads[i];
  t.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
  t.block_index = block_index;
  t.linear = i;
  t.lane = i % kLanes;
  t.warp = &machine.warps[i / kLanes];
  t.uncommitted.clear();
  t.groups.clear();
  char* low = machine.stacks + i * kStackBytes;
  t.stack_low = reinterpret_cast<std::uintptr_t>(low);
  // Tops fall on different cache sets, or the fibers' locals would push each other out.
  t.stack_pointer = fresh_stack(low, low + kStackBytes - 64 * (i * 7 % 64 + 1), fiber_main);
}

void make_warp(unsigned w, unsigned threads) {
  Warp& warp = machine.warps[w];
  const unsigned lanes = std::min(kLanes, threads - kLanes * w);
  warp.index = w;
  warp.epoch = 0;
  warp.first_lane = 0;
  warp.open.clear();
  warp.initial = warp.live = warp.runnable = lanes == kLanes ? ~0u : (1u << lanes) - 1;
}

// Some threads have not ended, and none can go on: says what each waits for.
void report_deadlock() {
  const Block& b = machine.block;
  for (unsigned w = 0; w < machine.warp_count; ++w) {
    for (const Collective& c : machine.warps[w].open) {
      if (!c.arrived) continue;
      report("warp divergence", c.site,
             std::string(c.operation) + " reached by lanes " + lanes_text(c.arrived) + " of " +
                 lanes_text(c.mask));
    }
  }
  if (b.waiting) {
    report(
        "barrier divergence", b.barrier_site,
        std::to_string(b.waiting) + " of " + std::to_string(b.threads) + " threads wait for ever");
  }
  if (machine.findings.empty()) report("deadlock", {}, "no thread can go on");
}

void run_block(uint3 index) {
  const Launch& launch = *machine.launch;
  Block& b = machine.block;
  b = {};
  b.index = (index.z * launch.grid.y + index.y) * launch.grid.x + index.x;
  b.threads = launch.block.x * launch.block.y * launch.block.z;
  clear_shared();
  machine.warp_count = (b.threads + kLanes - 1) / kLanes;
  for (unsigned w = 0; w < machine.warp_count; ++w) make_warp(w, b.threads);
  for (unsigned i = 0; i < b.threads; ++i) make_thread(i, index);
  draw_order();
  resume(next_runnable());
  // Back here when the last fiber has left.
  for (unsigned w = 0; w < machine.warp_count; ++w) flush(machine.warps[w]);
  if (!machine.aborted && b.exited != b.threads) {
    machine.aborted = true;
    report_deadlock();
  }
  ++machine.counters.blocks;
}

void run_blocks() {
  const dim3 grid = machine.launch->grid;
  std::vector<unsigned> order(std::size_t{grid.x} * grid.y * grid.z);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  if (machine.order == Order::reversed) std::reverse(order.begin(), order.end());
  if (machine.order == Order::shuffled) {
    std::shuffle(order.begin(), order.end(), machine.random);
  }
  for (unsigned i : order) {
    if (machine.aborted) return;
    run_block({i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y});
  }
}

}  // namespace

uint3 thread_index() noexcept {
  return current->index;
}
uint3 block_index() noexcept {
  return current->block_index;
}
dim3 block_extent() noexcept {
  return machine.launch->block;
}
dim3 grid_extent() noexcept {
  return machine.launch->grid;
}

void set_runner(Runner runner) {
  machine.runner = std::move(runner);
}

void run(const Launch& launch) {
  if (current) throw DeviceError(launch.what + ": a kernel can't launch another");
  if (recording) return recording->add(launch);
  if (machine.runner && machine.runner(launch)) return;
  std::lock_guard lock(machine.mutex);
  const std::size_t threads = std::size_t{launch.block.x} * launch.block.y * launch.block.z;
  if (threads == 0 || threads > kMaxThreads) {
    throw DeviceError(launch.what + ": a block has 1 to 1024 threads");
  }
  if (launch.shared_bytes > machine.shared_limit) {
    throw DeviceError(launch.what + ": a block has at most " +
                      std::to_string(machine.shared_limit) + " bytes of shared memory");
  }
  machine.launch = &launch;
  machine.aborted = false;
  machine.findings.clear();
  machine.known_findings.clear();
  ++machine.counters.launches;
  forget_global_marks();
  run_blocks();
  machine.launch = nullptr;
  if (machine.findings.empty()) return;
  std::string all = launch.what + ": " + std::to_string(machine.findings.size()) +
                    (machine.findings.size() == 1 ? " finding" : " findings");
  for (const std::string& finding : machine.findings) all += "\n  " + finding;
  throw Fault(all);
}

}  // namespace tilewright::emulator
