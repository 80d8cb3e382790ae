// A key/value cache in pages: the keys and values of past tokens, for each layer and sequence.
//
//   layer, sequence -> pages -> | K: (heads, page, head_dim) | V: the same | scales of int8 |
//
// Pages are allocated as sequences grow and reference-counted: a fork shares them, and whoever
// writes into a page that somebody else holds writes into a copy. A page holds K and V of one layer
// and one sequence, all heads, so that a head's tokens of a page are one contiguous matrix: with
// pages of whole attention blocks (128 keys) attention reads them where they are.
//
// Like a standard container: calls of const members may run at the same time, others need the cache
// for themselves. `append` is in three steps so that a caller with a lock (the binding's is the
// GIL) need not hold it while rows are converted: plan and commit change the cache, fill touches
// only pages that nobody else writes to. What attention reads is a snapshot that keeps its pages:
// it stays as it was whatever becomes of the cache.
#pragma once
#include <memory>
#include <vector>

#include "cpu/attention.h"
#include "cpu/isa.h"
#include "tilewright/view.h"

namespace tilewright {

using KVPage = std::shared_ptr<char[]>;

struct KVShape {
  int64_t layers, batch, heads, head_dim, max_tokens, page;
  DType dtype;  // a float or int8
};

// One layer at one moment. What paged() and lengths() describe lives as long as the snapshot.
class KVSnapshot {
 public:
  PagedKeys paged() const&;
  PagedKeys paged() && = delete;
  View lengths() const&;  // (batch,) int64
  View lengths() && = delete;
  int64_t longest() const;

 private:
  friend class KVCache;
  PagedKeys layout_;
  std::vector<KVPage> held_;
  std::vector<const char*> pages_;
  std::vector<int64_t> lengths_;
};

class KVCache {
 public:
  explicit KVCache(const KVShape& shape);

  const KVShape& shape() const { return shape_; }
  int64_t length(int64_t layer, int64_t b) const { return at(layer, b).length; }
  KVSnapshot snapshot(int64_t layer) const;
  // Bytes of the pages, each counted once: what this cache would hold alone.
  int64_t nbytes() const;

  // Tokens that are being appended to a layer: the pages that they go to.
  struct Append {
    struct Sequence {
      int64_t length;             // before
      std::vector<KVPage> pages;  // from page length / page on
      KVPage shared;              // what the first of them has to be a copy of, if any
    };
    int64_t layer, tokens;
    std::vector<Sequence> sequences;
  };
  Append plan(int64_t layer, int64_t tokens) const;
  // k, v (batch, heads, tokens, head_dim), any float dtype and strides.
  void fill(const Append& append, const View& k, const View& v, const KernelTable& table) const;
  // False if the layer has changed since the plan: two threads append at once.
  bool commit(const Append& append);

  // Forgets a sequence's tokens from n on, in every layer, and lets go of pages without tokens.
  void truncate(int64_t b, int64_t n);
  // A cache of these sequences, in this order, that shares all their pages.
  KVCache fork(const std::vector<int64_t>& sequences) const;

 private:
  struct Sequence {
    int64_t length = 0;
    std::vector<KVPage> pages;
  };
  Sequence& at(int64_t layer, int64_t b) { return sequences_[size_t(layer * shape_.batch + b)]; }
  const Sequence& at(int64_t layer, int64_t b) const {
    return sequences_[size_t(layer * shape_.batch + b)];
  }

  KVShape shape_;
  PagedKeys layout_;
  int64_t page_bytes_;
  std::vector<Sequence> sequences_;  // (layers, batch)
};

}  // namespace tilewright
