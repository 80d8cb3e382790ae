// What a KVCache is made of (tilewright/kvcache.h has its use):
//
//   layer, sequence -> pages -> | K: (heads, page, head_dim) | V: the same | scales of int8 |
//
// A page holds K and V of one layer and one sequence, all heads, so that a head's tokens of a page
// are one contiguous matrix.
#pragma once
#include <memory>
#include <vector>

#include "tilewright/kvcache.h"

namespace tilewright {

using KVPage = std::shared_ptr<char[]>;

// Keys and values in pages, as a KVCache keeps them. Page j of a sequence holds its
// tokens [j * tokens, (j + 1) * tokens): K, then V, both (heads, tokens, dims) contiguous; for int8
// then their scales, both (heads, tokens) float32.
struct PagedKeys {
  const char* const* pages;  // (batch, stride)
  int64_t stride;
  int64_t tokens, heads, dims;
  DType dtype;       // a float or int8
  int64_t value;     // bytes from a page's begin to V; K is first
  int64_t scale[2];  // and to the scales of K and of V
};

// Tokens that are being appended to a layer: the pages that they go to.
struct KVCache::Append {
  struct Sequence {
    int64_t length;             // before
    std::vector<KVPage> pages;  // from page length / page on
    KVPage shared;              // what the first of them has to be a copy of, if any
  };
  int64_t layer, tokens;
  Device device;  // of the pages
  std::vector<Sequence> sequences;
};

}  // namespace tilewright
