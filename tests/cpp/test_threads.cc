// Ops large enough for the pool, and caches of keys, from several callers at once: the bits of one
// thread. Under ThreadSanitizer (ctest --preset debug-tsan) also no races in what they share.
#include <atomic>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include "core/recycle.h"
#include "cpu/kvcache.h"
#include "guarded.h"
#include "test.h"
#include "tilewright/tilewright.h"

using namespace tilewright;
using Floats = std::vector<float>;

namespace {

Floats numbers(int64_t n, int seed) {
  Floats x(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) x[size_t(i)] = 0.25f * float(test::small(i, seed));
  return x;
}

// Every op appends its outputs here.
struct Outputs {
  std::vector<Floats> all;
  View add(std::initializer_list<int64_t> shape) {
    int64_t n = 1;
    for (int64_t extent : shape) n *= extent;
    all.emplace_back(static_cast<size_t>(n), 7.0f);
    return view_of(all.back().data(), shape);
  }
};

void product(Outputs& out) {
  const int64_t M = 130, K = 300, N = 200;
  const Floats a = numbers(M * K, 1), b = numbers(K * N, 2), bias = numbers(N, 3);
  Matmul op;
  op.a = view_of(a.data(), {M, K}), op.b = view_of(b.data(), {K, N});
  op.bias = view_of(bias.data(), {N}), op.out = out.add({M, N});
  op.activation = Activation::gelu;
  run(op);
  std::vector<int8_t> q(static_cast<size_t>(K * N));
  const View scale = out.add({N}), x = view_of(b.data(), {K, N});
  run(Quantize{x, 1, view_of(q.data(), {K, N}), scale});
  QuantizedMatmul quantized;
  quantized.a = op.a, quantized.out = out.add({M, N});
  quantized.b.data = view_of(q.data(), {K, N}), quantized.b.scale = scale, quantized.b.K = K;
  run(quantized);
}

void attention(Outputs& out, int64_t Tq) {
  const int64_t B = 2, H = 2, Tk = 200, D = 32;
  const Floats q = numbers(B * H * Tq * D, 1), k = numbers(B * H * Tk * D, 2);
  const Floats v = numbers(B * H * Tk * D, 3), dout = numbers(B * H * Tq * D, 4);
  AttentionBackward op;
  Attention& forward = op.forward;
  forward.q = view_of(q.data(), {B, H, Tq, D}), forward.k = view_of(k.data(), {B, H, Tk, D});
  forward.v = view_of(v.data(), {B, H, Tk, D}), forward.scores.causal = true;
  forward.out = out.add({B, H, Tq, D}), forward.lse = out.add({B, H, Tq});
  run(forward);
  op.dout = view_of(dout.data(), {B, H, Tq, D});
  op.dq = out.add({B, H, Tq, D}), op.dk = out.add({B, H, Tk, D}), op.dv = out.add({B, H, Tk, D});
  run(op);
}

void rows(Outputs& out) {
  const int64_t R = 200, C = 300;
  const Floats x = numbers(R * C, 1), dy = numbers(R * C, 2), gamma = numbers(C, 3);
  LayernormForward norm;
  norm.x = view_of(x.data(), {R, C}), norm.gamma = view_of(gamma.data(), {C});
  norm.y = out.add({R, C}), norm.mean = out.add({R}), norm.rstd = out.add({R});
  run(norm);
  LayernormBackward back;
  back.s = norm.x, back.gamma = norm.gamma, back.mean = norm.mean, back.rstd = norm.rstd;
  back.dy = view_of(dy.data(), {R, C}), back.dx = out.add({R, C}), back.dgamma = out.add({C});
  run(back);
  const View y = out.add({R, C});
  run(SoftmaxForward{norm.x, y});
  run(SoftmaxBackward{y, back.dy, out.add({R, C})});
  run(SumRows{norm.x, out.add({C})});
  std::vector<int32_t> ids(static_cast<size_t>(R));
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = int32_t(i * i % 50);
  run(EmbeddingBackward{view_of(ids.data(), {R}), back.dy, out.add({50, C})});
  CrossEntropyForward loss;
  loss.logits = norm.x, loss.target = view_of(ids.data(), {R});
  loss.loss = out.add({}), loss.lse = out.add({R});
  run(loss);
}

std::vector<Floats> every_op() {
  Outputs out;
  product(out);
  attention(out, 150);
  attention(out, 1);
  rows(out);
  return out.all;
}

// A cache of two sequences, used as the binding uses it: what changes the cache or lists its pages
// holds a lock, what converts rows or reads them does not. Token t is the same everywhere.
struct LockedCache {
  static constexpr int64_t kHeads = 2, kDims = 16, kPage = 4, kTokens = 60;
  KVCache cache;
  std::mutex& lock;

  LockedCache(KVCache&& made, std::mutex& shared) : cache(std::move(made)), lock(shared) {}
  LockedCache(DType dtype, std::mutex& shared)
      : LockedCache(KVCache({1, 2, kHeads, kDims, kTokens, kPage, dtype}), shared) {}

  // Nothing where a sequence would grow too long; false if the cache changed meanwhile.
  bool append(int64_t tokens) {
    std::unique_lock held(lock);
    const int64_t lengths[2] = {cache.length(0, 0), cache.length(0, 1)};
    if (std::max(lengths[0], lengths[1]) + tokens > kTokens) return true;
    const KVCache::Append append = cache.plan(0, tokens);
    held.unlock();
    Floats rows;
    for (const int64_t length : lengths) {
      const Floats upto = numbers((length + tokens) * kDims, 1);
      for (int64_t h = 0; h < kHeads; ++h) {
        rows.insert(rows.end(), upto.begin() + length * kDims, upto.end());
      }
    }
    const View x = view_of(rows.data(), {2, kHeads, tokens, kDims});
    cache.fill(append, x, x);
    held.lock();
    return cache.commit(append);
  }
  void truncate(int64_t first, int64_t second) {
    const std::lock_guard held(lock);
    cache.truncate(0, first), cache.truncate(1, second);
  }
  LockedCache fork() const {
    const std::lock_guard held(lock);
    return {cache.fork({1, 0}), lock};
  }
  // Attention of one row over each sequence, as (its length, the result).
  std::vector<std::pair<int64_t, Floats>> attend() const {
    std::unique_lock held(lock);
    const KVSnapshot keys = cache.snapshot(0);
    held.unlock();
    const int64_t size = kHeads * kDims;
    const Floats q(size_t(2 * size), 0.5f);
    Floats out(q.size());
    Attention op;
    op.q = view_of(q.data(), {2, kHeads, 1, kDims}), op.cache = &keys;
    op.out = view_of(out.data(), {2, kHeads, 1, kDims});
    run(op);
    const auto* lengths = keys.lengths().ptr<int64_t>();
    return {{lengths[0], Floats(out.begin(), out.begin() + size)},
            {lengths[1], Floats(out.begin() + size, out.end())}};
  }
};

}  // namespace

TEST(callers_at_once_get_the_bits_of_one_thread) {
  test::for_each_level([](const KernelTable&) {
    set_num_threads(1);
    const std::vector<Floats> want = every_op();
    set_num_threads(4);
    std::atomic<int> wrong{0};
    std::vector<std::thread> callers;
    for (int n = 0; n < 3; ++n) {
      callers.emplace_back([&] {
        for (int round = 0; round < 2; ++round) {
          const std::vector<Floats> got = every_op();
          for (size_t i = 0; i < want.size(); ++i) {
            wrong += std::memcmp(got[i].data(), want[i].data(), want[i].size() * 4) != 0;
          }
        }
      });
    }
    for (std::thread& t : callers) t.join();
    CHECK(wrong == 0);
  });
}

TEST(switches_may_be_turned_while_kernels_run) {
  std::atomic<bool> stop{false};
  std::thread caller([&] {
    while (!stop) every_op();
  });
  for (int i = 0; i < 50; ++i) {
    set_num_threads(1 + i % 4);
    for (const IsaLevel& level : isa_levels()) {
      if (level.supported) set_isa(level.name);
    }
    CHECK(num_threads() == 1 + i % 4);
  }
  stop = true;
  caller.join();
  set_isa("");
}

TEST(kvcaches_grow_fork_and_are_read_at_once) {
  set_num_threads(2);
  for (const DType dtype : {DType::f32, DType::s8}) {
    std::mutex lock;
    std::vector<Floats> want;  // by length
    LockedCache alone(dtype, lock);
    for (int64_t n = 0; n <= LockedCache::kTokens; ++n, alone.append(1)) {
      want.push_back(alone.attend()[1].second);
    }
    std::atomic<int> wrong{0};
    std::atomic<bool> stop{false};
    const auto read = [&](const LockedCache& c) {
      for (const auto& [length, got] : c.attend()) wrong += got != want[size_t(length)];
    };
    LockedCache cache(dtype, lock);
    std::vector<std::thread> threads;
    threads.emplace_back([&] {
      while (!stop) read(cache);
    });
    for (int n = 0; n < 2; ++n) {
      threads.emplace_back([&] {
        while (!stop) {
          LockedCache mine = cache.fork();
          wrong += !mine.append(1);  // into a copy of a shared page
          read(mine);
          mine.truncate(0, 0);  // pages are let go, under the lock
        }
      });
    }
    for (int round = 0; round < 300; ++round) {
      wrong += !cache.append(1 + round % 6);
      read(cache);
      if (round % 20 == 0) cache.truncate(5, 3);
    }
    stop = true;
    for (std::thread& t : threads) t.join();
    CHECK(wrong == 0);
  }
}

TEST(recycled_memory_has_one_owner) {
  const int64_t before = recycle::stats().in_use;
  std::vector<std::thread> threads;
  for (int n = 0; n < 4; ++n) {
    threads.emplace_back([n] {
      for (int round = 0; round < 50; ++round) {
        const size_t bytes = recycle::kSmallest + size_t(round % 3) * 4096;
        auto* p = static_cast<int*>(recycle::allocate(bytes));
        p[0] = p[bytes / 4 - 1] = n;
        std::this_thread::yield();
        CHECK(p[0] == n && p[bytes / 4 - 1] == n);
        recycle::release(p);
        if (round % 16 == 0) recycle::trim();
      }
    });
  }
  for (std::thread& t : threads) t.join();
  CHECK(recycle::stats().in_use == before);  // also of the blocks that met a taken lock
}
