// cp.async: copies belong to the thread that issued them. They are carried out when it waits for
// their group; other threads may read the bytes only after that and a barrier (marks.cc).
#include <algorithm>
#include <cstring>

#include "emulator/findings.h"
#include "emulator/memory.h"

namespace tilewright::emulator {

void cp_async(void* shared, const void* global, int bytes, int source_bytes, Site site) {
  const Unwatched unwatched;
  shared_offset(shared, static_cast<std::size_t>(bytes), "cp.async", site);
  if (source_bytes < 0 || source_bytes > bytes) {
    fail("cp.async", site, "a source of " + std::to_string(source_bytes) + " bytes");
  }
  if (reinterpret_cast<std::uintptr_t>(global) % static_cast<std::uintptr_t>(bytes)) {
    fail("cp.async", site, "the source is not aligned to " + std::to_string(bytes) + " bytes");
  }
  if (source_bytes) {
    touch(global, static_cast<std::size_t>(source_bytes), Access::read, site);
  }
  touch(shared, static_cast<std::size_t>(bytes), Access::async_issue, site);
  std::memset(shared, kPoison, static_cast<std::size_t>(bytes));
  current->uncommitted.push_back(
      {static_cast<char*>(shared), static_cast<const char*>(global), bytes, source_bytes, site});
  if (current->lane == 0) ++machine.counters.cp_async;
}

// An empty group counts as a group, as on hardware.
void cp_async_commit() {
  const Unwatched unwatched;
  current->groups.push_back(std::move(current->uncommitted));
  current->uncommitted.clear();
}

void cp_async_wait(int groups_left) {
  const Unwatched unwatched;
  auto& groups = current->groups;
  const int finished = std::max(0, static_cast<int>(groups.size()) - groups_left);
  for (int g = 0; g < finished; ++g) {
    for (const Copy& c : groups[static_cast<std::size_t>(g)]) {
      const auto copied = static_cast<std::size_t>(c.source_bytes);
      const auto bytes = static_cast<std::size_t>(c.bytes);
      if (copied) std::memcpy(c.to, c.from, copied);
      std::memset(c.to + copied, 0, bytes - copied);
      touch(c.to, bytes, Access::async_done, c.site);
    }
  }
  groups.erase(groups.begin(), groups.begin() + finished);
}

}  // namespace tilewright::emulator
