// The device's memory is address space that the system fills as it is touched: 4 GiB of arena, and
// 16 times that for the marks of its bytes, which cost nothing until a checked kernel comes by.
#include "emulator/machine.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

namespace tilewright::emulator {
namespace {

char* reserve(std::size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(p);
}

}  // namespace

Machine::Machine()
    : stacks(reserve(kStackBytes * kMaxThreads)),
      shared(reserve(kSharedReserved)),
      shared_cells(reinterpret_cast<Cell*>(reserve(kSharedReserved * sizeof(Cell)))),
      arena(reserve(kArenaBytes)),
      arena_cells(reinterpret_cast<Cell*>(reserve(kArenaBytes * sizeof(Cell)))) {
  // A thread that outgrows its stack must not run on into its neighbour's.
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  for (unsigned i = 0; i < kMaxThreads; ++i) mprotect(stacks + i * kStackBytes, page, PROT_NONE);
}

Machine& machine = *new Machine;  // never freed: kernels may run while statics are destroyed
constinit thread_local Thread* current = nullptr;
constinit thread_local bool watched = false;
bool instrumented = false;

bool checked() {
  return instrumented;
}

void set_schedule(Order order, unsigned seed) {
  std::lock_guard lock(machine.mutex);
  machine.order = order;
  machine.seed = seed;
  machine.random.seed(seed);
}

void set_accumulation(Accumulation accumulation) {
  std::lock_guard lock(machine.mutex);
  machine.accumulation = accumulation;
}

void set_shared_limit(std::size_t bytes) {
  std::lock_guard lock(machine.mutex);
  machine.shared_limit = bytes < kSharedReserved ? bytes : kSharedReserved;
}

}  // namespace tilewright::emulator
