// Ops large enough for the pool, from several callers at once: the bits of one thread. Under
// ThreadSanitizer (ctest --preset debug-tsan) it also looks for races in what ops share.
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "core/recycle.h"
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
