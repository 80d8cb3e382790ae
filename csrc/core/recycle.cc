#include "core/recycle.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#include "core/env.h"
#include "core/pages.h"

namespace tilewright::recycle {
namespace {

// In front of every block's data, one cache line.
struct alignas(64) Header {
  size_t bytes;  // of the data
};

// What is in use is counted without the lock: a block may be handed out while somebody else holds it,
// and given back when nobody does.
struct Pool {
  std::atomic<int64_t> in_use{0}, peak{0};  // bytes
  std::mutex mutex;                         // of what follows
  std::vector<Header*> kept;                // oldest first
  int64_t kept_bytes = 0;
  int64_t reused = 0;

  void begin_use(size_t bytes) {
    const int64_t now = in_use.fetch_add(int64_t(bytes)) + int64_t(bytes);
    int64_t most = peak.load();
    while (most < now && !peak.compare_exchange_weak(most, now)) {
    }
  }
  void end_use(size_t bytes) { in_use.fetch_sub(int64_t(bytes)); }

  // The smallest kept block that fits and wastes at most a quarter; of several the newest, which the
  // caches may still hold.
  Header* take(size_t bytes) {
    auto best = kept.end();
    for (auto it = kept.begin(); it != kept.end(); ++it) {
      const size_t size = (*it)->bytes;
      if (size < bytes || size > bytes + bytes / 4) continue;
      if (best == kept.end() || size <= (*best)->bytes) best = it;
    }
    if (best == kept.end()) return nullptr;
    Header* found = *best;
    kept.erase(best);
    kept_bytes -= int64_t(found->bytes);
    ++reused;
    return found;
  }

  // The newest are the likeliest to be wanted again: the oldest make room.
  void keep(Header* block) {
    kept.push_back(block);
    kept_bytes += int64_t(block->bytes);
    const int64_t room = 2 * peak.load() - in_use.load();
    auto oldest = kept.begin();
    for (; oldest != kept.end() && kept_bytes > room; ++oldest) {
      kept_bytes -= int64_t((*oldest)->bytes);
      std::free(*oldest);
    }
    kept.erase(kept.begin(), oldest);
  }
};

// Never destroyed: arrays may outlive every static object.
Pool& pool() {
  static Pool* const p = new Pool;
  return *p;
}

}  // namespace

bool takes(size_t bytes) {
  return bytes >= kSmallest || env::poison();
}

// A lock that another thread held at the moment of a fork stays locked in the child, so nobody waits
// for it: without the lock memory comes from the system and goes back to it.
void* allocate(size_t bytes) {
  Pool& p = pool();
  Header* block = nullptr;
  if (const std::unique_lock lock(p.mutex, std::try_to_lock); lock) block = p.take(bytes);
  if (!block) {
    block = static_cast<Header*>(allocate_pages(sizeof(Header) + bytes));
    if (!block) return nullptr;
    block->bytes = bytes;
  }
  p.begin_use(block->bytes);
  if (env::poison()) std::memset(block + 1, 0xff, block->bytes);
  return block + 1;
}

void release(void* data) {
  if (!data) return;
  Header* block = static_cast<Header*>(data) - 1;
  Pool& p = pool();
  p.end_use(block->bytes);
  const std::unique_lock lock(p.mutex, std::try_to_lock);
  if (!lock) return std::free(block);
  p.keep(block);
}

void* resize(void* data, size_t bytes) {
  void* fresh = allocate(bytes);
  if (!fresh || !data) return fresh;
  std::memcpy(fresh, data, std::min(bytes, (static_cast<Header*>(data) - 1)->bytes));
  release(data);
  return fresh;
}

void trim() {
  Pool& p = pool();
  const std::unique_lock lock(p.mutex, std::try_to_lock);
  if (!lock) return;
  for (Header* block : p.kept) std::free(block);
  p.kept.clear();
  p.kept_bytes = 0;
  p.peak = p.in_use.load();
}

Stats stats() {
  Pool& p = pool();
  const std::unique_lock lock(p.mutex, std::try_to_lock);
  return {p.in_use, p.peak, lock ? p.kept_bytes : 0, lock ? p.reused : 0};
}

}  // namespace tilewright::recycle
