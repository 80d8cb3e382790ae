// A key/value cache in pages: the keys and values of past tokens, for each layer and sequence.
//
//     KVCache cache({.layers = 2, .batch = 1, .heads = 8, .head_dim = 64, .max_tokens = 4096});
//     cache.append(0, k, v);                          // k, v (1, 8, T, 64)
//     const KVSnapshot keys = cache.snapshot(0);      // what attention reads
//     Attention op;
//     op.q = q, op.cache = &keys, op.out = out;       // without k and v
//     run(op);
//
// Pages are allocated as sequences grow and reference-counted: a fork shares them, and whoever
// writes into a page that somebody else holds writes into a copy. With pages of whole attention
// blocks (128 tokens) attention reads them where they are; of smaller ones, which waste less
// memory, it copies 128 tokens at a time.
//
// The pages are where the first keys that are appended are: on the CPU, or on a GPU where the library
// has CUDA.
//
// Like a standard container: calls of const members may run at the same time, others need the cache
// for themselves. What attention reads is a snapshot that keeps its pages: it stays as it was
// whatever becomes of the cache.
#pragma once
#include <memory>
#include <vector>

#include "tilewright/view.h"

namespace tilewright {

struct PagedKeys;  // core/kvpages.h: where the pages lie

struct KVShape {
  int64_t layers = 1;         // 1 to 2^20, as batch and heads
  int64_t batch = 1;          // sequences; may be 0
  int64_t heads = 1;          // of keys and values, Hkv
  int64_t head_dim = 1;       // 1 to 256
  int64_t max_tokens = 0;     // that a sequence may reach
  int64_t page = 128;         // tokens of a page
  DType dtype = DType::bf16;  // what is stored: f32, bf16, f16; or s8 with a scale amax / 127 for
                              // each token's K and V of each head
};

// One layer at one moment, to be read by attention: Attention::cache. Copies share what they hold.
class KVSnapshot {
 public:
  View lengths() const&;  // (batch,) int64; lives as long as the snapshot
  View lengths() && = delete;
  int64_t longest() const;
  Device device() const;

  struct State;              // cpu/kvcache.h
  PagedKeys paged() const&;  // lives as long as the snapshot
  PagedKeys paged() && = delete;

 private:
  friend class KVCache;
  explicit KVSnapshot(std::shared_ptr<const State> state);
  std::shared_ptr<const State> state_;
};

// A layer that doesn't exist, and whatever else is said to be impossible, is a ShapeError; then
// nothing has changed. A cache that was moved from may only be destroyed or assigned to.
class KVCache {
 public:
  explicit KVCache(const KVShape& shape);  // ShapeError, DtypeError: see KVShape
  KVCache(KVCache&& other) noexcept;
  KVCache& operator=(KVCache&& other) noexcept;
  ~KVCache();

  const KVShape& shape() const;  // page is at most max_tokens here
  int64_t length(int64_t layer, int64_t b) const;
  Device device() const;  // of the pages; CPU as long as there was none
  bool empty() const;     // no layer has tokens: the next ones may be anywhere
  // Bytes of the pages, each counted once: what this cache would hold alone.
  int64_t nbytes() const;
  KVSnapshot snapshot(int64_t layer) const;

  // k, v (batch, heads, T, head_dim) of any float dtype and strides become the next T tokens of
  // each sequence: run(KVAppend). ShapeError also where a sequence would exceed max_tokens.
  void append(int64_t layer, const View& k, const View& v);
  // Forgets sequence b's tokens from n >= 0 on, in every layer, and lets go of pages without tokens.
  // n may be more than it has.
  void truncate(int64_t b, int64_t n);
  // A cache of these sequences, in this order, also repeated, that shares all their pages.
  KVCache fork(const std::vector<int64_t>& sequences) const;

  // append() in three steps (cpu/kvcache.h), for a caller with a lock, which it need not hold while
  // rows are converted: plan and commit change the cache, fill touches only pages that nobody else
  // writes to. The arguments have been checked: check_operands(KVAppend).
  struct Append;
  Append plan(int64_t layer, int64_t tokens, Device device = Device::cpu) const;
  void fill(const Append& append, const View& k, const View& v) const;
  // False if the layer has changed since the plan: two threads append at once.
  bool commit(const Append& append);

 private:
  struct State;
  using NewPage = std::shared_ptr<char[]> (*)(int64_t bytes);
  Append plan(int64_t layer, int64_t tokens, Device device, NewPage new_page) const;
  std::unique_ptr<State> state_;
};

}  // namespace tilewright
