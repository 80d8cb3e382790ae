// Global memory is an arena of allocations with gaps between them that belong to nobody. Shared
// memory is one range, which each block finds poisoned. Kernels' addresses are looked up here.
#include "emulator/memory.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "emulator/counters.h"
#include "emulator/findings.h"
#include "emulator/marks.h"
#include "emulator/tape.h"

namespace tilewright::emulator {
namespace {

constexpr std::size_t kAlignment = 256, kPage = 4096, kMostGap = std::size_t{1} << 20;

std::uintptr_t number(const void* p) {
  return reinterpret_cast<std::uintptr_t>(p);
}

std::size_t aligned(std::size_t n) {
  return (n + kAlignment - 1) / kAlignment * kAlignment;
}

// An allocation and the gap after it, as large as itself within limits: an index wrong by a row,
// not only by one, should fall there and not into a neighbour.
std::size_t with_gap(std::size_t bytes) {
  return aligned(bytes + std::clamp(bytes, kPage, kMostGap));
}

// The first offset from `from` on with `need` free bytes; kArenaBytes if there is none.
std::size_t free_offset(std::size_t from, std::size_t need) {
  const std::uintptr_t arena = number(machine.arena);
  std::size_t candidate = from;
  for (auto it = machine.allocations.lower_bound(arena + from); it != machine.allocations.end();
       ++it) {
    const std::size_t start = it->first - arena;
    if (start >= candidate + need) break;
    candidate = start + with_gap(it->second);
  }
  return candidate + need <= kArenaBytes ? candidate : kArenaBytes;
}

// Constants of the program and of its libraries: what the loader maps without the right to write.
class Constants {
 public:
  bool contain(std::uintptr_t address) {
    if (last_ < ranges_.size() && ranges_[last_].contains(address)) return true;
    if (find(address)) return true;
    ranges_.clear();  // perhaps a library came since
    dl_iterate_phdr(add, this);
    return find(address);
  }

 private:
  struct Range {
    std::uintptr_t begin, end;
    bool contains(std::uintptr_t address) const { return begin <= address && address < end; }
  };

  static int add(dl_phdr_info* info, std::size_t, void* self) {
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& header = info->dlpi_phdr[i];
      const bool constant =
          header.p_type == PT_GNU_RELRO || (header.p_type == PT_LOAD && !(header.p_flags & PF_W));
      const std::uintptr_t begin = info->dlpi_addr + header.p_vaddr;
      if (constant) {
        static_cast<Constants*>(self)->ranges_.push_back({begin, begin + header.p_memsz});
      }
    }
    return 0;
  }

  bool find(std::uintptr_t address) {
    for (last_ = 0; last_ < ranges_.size(); ++last_) {
      if (ranges_[last_].contains(address)) return true;
    }
    return false;
  }

  std::vector<Range> ranges_;
  std::size_t last_ = 0;
};

bool is_constant(std::uintptr_t address) {
  static Constants constants;
  return constants.contain(address);
}

void check_alignment(std::uintptr_t address, std::size_t bytes, Site site) {
  const bool one_access = bytes == 2 || bytes == 4 || bytes == 8 || bytes == 16;
  if (!one_access || address % bytes == 0) return;
  fail("misaligned access", site,
       std::to_string(bytes) + " bytes at an address that is not a multiple of that");
}

void log(Access kind, bool count, Site site, std::uintptr_t address, std::size_t bytes,
         bool shared) {
  if (!count || kind == Access::atomic || kind == Access::async_done) return;
  current->warp->log[current->lane].push_back(
      {site, address, static_cast<std::uint16_t>(bytes), kind != Access::read, shared});
}

void access_shared(std::size_t offset, std::size_t bytes, Access kind, Site site, bool count) {
  if (offset + bytes > machine.launch->shared_bytes) {
    fail("shared memory out of bounds", site,
         std::to_string(bytes) + " bytes at offset " + std::to_string(offset) + " of " +
             std::to_string(machine.launch->shared_bytes));
  }
  check_alignment(offset, bytes, site);
  if (instrumented) {
    Cell* cells = machine.shared_cells + offset;
    if (kind == Access::read || kind == Access::atomic) {
      for (std::size_t i = 0; i < bytes; ++i) {
        if (cells[i].write.valid) continue;
        report("uninitialised shared memory", site, "offset " + std::to_string(offset + i));
        break;
      }
    }
    check_order(cells, bytes, kind, site, "shared");
  }
  log(kind, count, site, offset, bytes, true);
}

[[noreturn]] void out_of_bounds(std::uintptr_t address, std::size_t bytes, Site site) {
  std::string place = "in no allocation (or one that was released)";
  auto it = machine.allocations.upper_bound(address);
  if (it != machine.allocations.begin()) {
    --it;
    if (address - it->first < with_gap(it->second)) {
      place = "at offset " + std::to_string(address - it->first) + " of an allocation of " +
              std::to_string(it->second);
    }
  }
  fail("global memory out of bounds", site, std::to_string(bytes) + " bytes " + place);
}

void access_global(std::uintptr_t address, std::size_t bytes, Access kind, Site site, bool count) {
  if (address < machine.last_begin || address + bytes > machine.last_end) {
    auto it = machine.allocations.upper_bound(address);
    if (it == machine.allocations.begin()) out_of_bounds(address, bytes, site);
    --it;
    if (address + bytes > it->first + it->second) out_of_bounds(address, bytes, site);
    machine.last_begin = it->first;
    machine.last_end = it->first + it->second;
  }
  check_alignment(address, bytes, site);
  if (instrumented) {
    const std::size_t offset = address - number(machine.arena);
    machine.cells_begin = std::min(machine.cells_begin, offset);
    machine.cells_end = std::max(machine.cells_end, offset + bytes);
    check_order(machine.arena_cells + offset, bytes, kind, site, "global");
  }
  log(kind, count, site, address, bytes, false);
}

}  // namespace

void* allocate(std::size_t bytes) {
  std::lock_guard lock(machine.mutex);
  std::size_t offset = kArenaBytes;
  if (machine.allocated + bytes <= machine.memory_limit) {
    const std::size_t need = with_gap(bytes), first = kPage;
    offset = free_offset(std::max(machine.next_offset, first), need);
    if (offset == kArenaBytes) offset = free_offset(first, need);
  }
  if (offset == kArenaBytes) return nullptr;
  char* p = machine.arena + offset;
  machine.allocations[number(p)] = bytes;
  machine.allocated += bytes;
  machine.next_offset = offset + with_gap(bytes);
  std::memset(p, kPoison, bytes);
  if (recording) recording->memory_.push_back({p, bytes});
  return p;
}

void release(void* pointer) {
  if (!pointer || (recording && recording->owns(pointer))) return;
  std::lock_guard lock(machine.mutex);
  const auto it = machine.allocations.find(number(pointer));
  if (it == machine.allocations.end()) {
    throw DeviceError("release of memory that allocate() did not give, or that was released");
  }
  const std::size_t bytes = it->second;
  machine.allocations.erase(it);
  machine.allocated -= bytes;
  machine.last_begin = machine.last_end = 0;
  // Its pages go back to the system. No other allocation has a part of them: gaps are too large.
  const std::uintptr_t begin = number(pointer) / kPage * kPage;
  if (bytes)
    madvise(reinterpret_cast<void*>(begin), number(pointer) + bytes - begin, MADV_DONTNEED);
}

std::size_t allocated_bytes() {
  std::lock_guard lock(machine.mutex);
  return machine.allocated;
}

void set_memory_limit(std::size_t bytes) {
  std::lock_guard lock(machine.mutex);
  machine.memory_limit = std::min(bytes, kArenaBytes);
}

std::vector<std::pair<std::uintptr_t, std::size_t>> allocations() {
  std::lock_guard lock(machine.mutex);
  return {machine.allocations.begin(), machine.allocations.end()};
}

void* shared_memory(std::size_t bytes, Site site) {
  const Unwatched unwatched;
  if (bytes > machine.launch->shared_bytes) {
    fail("shared memory", site,
         "the kernel uses " + std::to_string(bytes) + " bytes, the launch gave " +
             std::to_string(machine.launch->shared_bytes));
  }
  return machine.shared;
}

std::size_t shared_offset(const void* address, std::size_t bytes, const std::string& kind,
                          Site site) {
  const std::size_t offset = number(address) - number(machine.shared);
  const std::size_t size = machine.launch->shared_bytes;
  if (offset > size || size - offset < bytes) fail(kind, site, "an address outside shared memory");
  if (offset % bytes) fail(kind, site, "not aligned to " + std::to_string(bytes) + " bytes");
  return offset;
}

void touch(const void* address, std::size_t bytes, Access kind, Site site, bool count) {
  const std::uintptr_t a = number(address);
  if (a - current->stack_low < kStackBytes) return;
  const std::uintptr_t shared = a - number(machine.shared);
  if (shared < kSharedReserved) return access_shared(shared, bytes, kind, site, count);
  if (a - number(machine.arena) < kArenaBytes) return access_global(a, bytes, kind, site, count);
  const Launch& launch = *machine.launch;
  const std::uintptr_t parameter = a - number(launch.parameters);
  if (kind == Access::read) {
    if (parameter < launch.parameter_bytes && launch.parameter_bytes - parameter >= bytes) return;
    if (is_constant(a)) return;
  }
  fail("host memory", site,
       a < kPage ? "the kernel uses a null pointer"
                 : "the kernel touches memory that is not the device's");
}

void access(const void* address, std::size_t bytes, Access kind, Site site) {
  if (!watched) return;
  const Unwatched unwatched;
  touch(address, bytes, kind, site, true);
}

void load_vector(void* to, const void* from, std::size_t bytes, Site site) {
  const Unwatched unwatched;
  touch(from, bytes, Access::read, site, true);
  std::memcpy(to, from, bytes);
}

void store_vector(void* to, const void* from, std::size_t bytes, Site site) {
  const Unwatched unwatched;
  touch(to, bytes, Access::write, site, true);
  std::memcpy(to, from, bytes);
}

void forget_global_marks() {
  if (machine.cells_begin < machine.cells_end) {
    const std::uintptr_t begin = number(machine.arena_cells + machine.cells_begin) / kPage * kPage;
    madvise(reinterpret_cast<void*>(begin), number(machine.arena_cells + machine.cells_end) - begin,
            MADV_DONTNEED);
  }
  machine.cells_begin = kArenaBytes;
  machine.cells_end = 0;
}

void clear_shared() {
  const std::size_t bytes = machine.launch->shared_bytes;
  std::memset(machine.shared, kPoison, bytes);
  if (instrumented) std::memset(static_cast<void*>(machine.shared_cells), 0, bytes * sizeof(Cell));
}

}  // namespace tilewright::emulator
