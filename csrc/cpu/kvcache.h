// What a KVCache is made of (tilewright/kvcache.h has its use):
//
//   layer, sequence -> pages -> | K: (heads, page, head_dim) | V: the same | scales of int8 |
//
// A page holds K and V of one layer and one sequence, all heads, so that a head's tokens of a page
// are one contiguous matrix.
#pragma once
#include <memory>
#include <vector>

#include "cpu/attention.h"
#include "cpu/isa.h"
#include "tilewright/kvcache.h"

namespace tilewright {

using KVPage = std::shared_ptr<char[]>;

struct KVSnapshot::State {
  PagedKeys layout;
  std::vector<KVPage> held;
  std::vector<const char*> pages;
  std::vector<int64_t> lengths;
};

// Tokens that are being appended to a layer: the pages that they go to.
struct KVCache::Append {
  struct Sequence {
    int64_t length;             // before
    std::vector<KVPage> pages;  // from page length / page on
    KVPage shared;              // what the first of them has to be a copy of, if any
  };
  int64_t layer, tokens;
  std::vector<Sequence> sequences;
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
  std::vector<Sequence> sequences;  // (layers, batch)
};

}  // namespace tilewright
