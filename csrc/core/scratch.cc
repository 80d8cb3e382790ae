#include "core/scratch.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "core/env.h"
#include "core/pages.h"
#include "core/size.h"

namespace tilewright {
namespace {

constexpr int64_t kKeepBytes = 96 << 20;

struct Cache {
  struct Block {
    void* data;
    int64_t bytes;
  };
  std::vector<Block> blocks;
  int64_t kept = 0;

  ~Cache() {
    for (const Block& b : blocks) std::free(b.data);
  }

  // The smallest kept block that fits and wastes at most three quarters of itself.
  void* take(int64_t& bytes) {
    size_t best = blocks.size();
    for (size_t i = 0; i < blocks.size(); ++i) {
      const int64_t b = blocks[i].bytes;
      if (b >= bytes && b <= 4 * bytes && (best == blocks.size() || b < blocks[best].bytes))
        best = i;
    }
    if (best == blocks.size()) return nullptr;
    const Block found = blocks[best];
    blocks[best] = blocks.back();
    blocks.pop_back();
    kept -= found.bytes;
    bytes = found.bytes;
    return found.data;
  }

  void give(void* data, int64_t bytes) {
    if (kept + bytes > kKeepBytes || blocks.size() >= 32) return std::free(data);
    blocks.push_back({data, bytes});
    kept += bytes;
  }
};

thread_local Cache t_cache;

}  // namespace

Scratch::Scratch(int64_t bytes) : bytes_(int64_t(uint64_t(bytes) + 4096 + 63) & ~int64_t(63)) {
  if (bytes < 0 || bytes > kMostBytes) throw std::bad_alloc();
  if (bytes == 0) return;
  data_ = t_cache.take(bytes_);
  if (!data_) data_ = allocate_pages(size_t(bytes_));
  if (!data_) throw std::bad_alloc();
  if (env::poison()) std::memset(data_, 0xff, size_t(bytes_));
}

Scratch::~Scratch() {
  if (data_) t_cache.give(data_, bytes_);
}

}  // namespace tilewright
