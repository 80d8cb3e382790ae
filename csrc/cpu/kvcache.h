// A KVCache's books: which pages a sequence has. core/kvpages.h has what is in one.
#pragma once
#include <vector>

#include "cpu/attention.h"
#include "cpu/isa.h"
#include "tilewright/kvcache.h"

namespace tilewright {

KVPage new_page(int64_t bytes);  // on the CPU

struct KVSnapshot::State {
  PagedKeys layout;
  Device device;
  std::vector<KVPage> held;
  std::vector<const char*> pages;
  std::vector<int64_t> lengths;
};

struct KVCache::State {
  struct Sequence {
    int64_t length = 0;
    std::vector<KVPage> pages;
  };
  explicit State(const KVShape& shape);
  Sequence& at(int64_t layer, int64_t b) { return sequences[size_t(layer * shape.batch + b)]; }

  KVShape shape;
  PagedKeys layout;
  int64_t page_bytes;
  Device device = Device::cpu;
  std::vector<Sequence> sequences;  // (layers, batch)
};

// The rows of k and v, to the pages of an append: KVCache::fill on the CPU.
void fill_pages(const KVCache::Append& append, const PagedKeys& layout, const View& k,
                const View& v, const KernelTable& table);

}  // namespace tilewright
