// Attention, backward, on the GPU, by recomputation of P from lse:
//
//   P = exp(t - lse)                        dV = P^T dO      dP = dO V^T
//   dS = P * (dP - delta)                   dQ = scale * dS K     dK = scale * dS^T Q
//   delta = rowsum(dO * O) - dlse           t = scale * Q K^T + bias, as in the forward pass
//
// With dropout dV has the weights that were kept, dP likewise. With a softcap dS is also multiplied by
// its derivative, 1 - tanh^2.
//
//   gradient   outer lines (A, A2)   inner lines (B, B2)      scores A B^T   sums +=
//   dq         rows    Q, dO         keys    K, V             (row, key)     dS (B = K)
//   dk         keys    K, V          rows    Q, dO            (key, row)     dS^T (B = Q)
//   dv         keys    K             rows    Q, dO            (key, row)     P^T (B2 = dO)
//
// One kernel for all three: a block owns M outer lines and their sums, and walks through the inner
// lines that meet them, N at a time, in ascending order: the rows of all heads of a group, one head
// after the other. So no two blocks add to one sum; gradients are the same on repeat and whatever
// lies beside a sequence. The price against one pass with atomics is 8 products of a tile for 5.
//
// Parameter       bounded by                                                     16 bits       float32
// warps           16 lines each, shared memory for A and A2                        4, 4, 2       4, 2, 2
// lines N         registers, N / 2 for scores and as many for dP; B and B2      64, 32, 32   32, 32, 8
// stages          2: the next tiles arrive while these are used; 1 where            2, 2, 1      1, 1, 1
//                 there is no room: 99 KiB (sm_86, sm_89, sm_120) hold all
//                                                        (three numbers: heads up to 64, 128 and 256)
// sums            of one gradient: D / 2 registers a thread, beside S and dP; the softcap's derivative
//                 would be as many again, so its scores are computed twice
//
// Numerics: float32; in 16 bits P and dS are rounded once, as left operands. scale is applied to the
// sums. A weight of zero hides what it weighs, NaN and Inf included (as in attention_forward.cu).
// Not handled: a gradient for the mask.
//
// Method: Dao (2023), FlashAttention-2, section 3.1.2.
#include "cuda/attention_products.h"
#include "cuda/gpu/stream.h"
#include "cuda/kernels.h"

namespace tilewright::cuda {
namespace attention {
namespace {

template <class T, int kDims>
struct Config {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kWarps = kDims == 64 || (kHalf && kDims == 128) ? 4 : 2;
  static constexpr int kLines = kHalf ? (kDims == 64 ? 64 : 32) : (kDims == 256 ? 8 : 32);
  static constexpr int kStages = kHalf && kDims < 256 ? 2 : 1;
  static constexpr int M = 16 * kWarps, kThreads = 32 * kWarps;
  // Left to itself (0), ptxas spills on sm_90 to make room for one block more.
  static constexpr int kLeastBlocks = !kHalf && kDims == 64 ? 1 : 0;
};

enum class Of { dq, dk, dv };

struct Gradients {
  Operand dout, out, lse, dlse;  // (B, H, Tq, Dv) twice, (B, H, Tq) twice
  Operand dq, dk, dv;
  Operand delta;  // (B, H, Tq)
  float scale;    // of dq and dk
};

// lse, in the base of the scores, and delta, of the rows of a tile.
template <int M>
struct RowSums {
  float lse[M], delta[M];

  __device__ void fill(const Gradients& g, const RowTile& tile, float unit) {
    const int r = static_cast<int>(threadIdx.x);
    if (r >= M) return;
    const bool exists = r < tile.count();
    lse[r] = exists ? static_cast<const float*>(g.lse.data)[tile.at(g.lse, r)] * unit : -INFINITY;
    delta[r] = exists ? static_cast<const float*>(g.delta.data)[tile.at(g.delta, r)] : 0.0f;
  }
};

// Some elements of the rows of a warp, of O and dO. The padding spreads a column over the banks.
constexpr int kDeltaThreads = 64;
struct DeltaRows {
  float out[32][33], dout[32][33];
};

// delta, a thread a row: one chain in ascending order, as float32's dP is. So where a row sees one
// key, and O is its V, dP - delta is exactly 0. A warp reads row by row, whole sectors, 32 elements
// of each of its rows at a time.
__global__ void __launch_bounds__(kDeltaThreads)
    attention_delta_kernel(Gradients g, std::int64_t rows) {
  auto& memory = gpu::shared_memory<DeltaRows[kDeltaThreads / 32]>()[threadIdx.x / 32];
  const int lane = lane_id(), dims = static_cast<int>(g.out.shape[3]);
  const std::int64_t own = std::int64_t(blockIdx.x) * kDeltaThreads + threadIdx.x;
  const std::int64_t row = min(own, rows - 1);  // lanes beyond help to read
  const std::int64_t t = row % g.lse.shape[2], bh = row / g.lse.shape[2];
  const std::int64_t h = bh % g.lse.shape[1], b = bh / g.lse.shape[1];
  const std::int64_t of_dout = g.dout.row(b, h, t), of_out = g.out.row(b, h, t);
  float sum = 0;
  for (int first = 0; first < dims; first += 32) {
    const int d = first + lane;
    for (int r = 0; r < 32; ++r) {
      const std::int64_t at_dout = __shfl_sync(kAllLanes, of_dout, r);
      const std::int64_t at_out = __shfl_sync(kAllLanes, of_out, r);
      if (d >= dims) continue;
      memory.dout[r][lane] = g.dout.element(at_dout + d * g.dout.stride[3]);
      memory.out[r][lane] = g.out.element(at_out + d * g.out.stride[3]);
    }
    __syncwarp();
    for (int i = 0; i < min(32, dims - first); ++i) {
      sum = fmaf(memory.dout[lane][i], memory.out[lane][i], sum);
    }
    __syncwarp();
  }
  if (own >= rows) return;
  if (g.dlse) sum -= static_cast<const float*>(g.dlse.data)[g.dlse.row(b, h, t)];
  static_cast<float*>(g.delta.data)[row] = sum;
}

template <class T, int kDims, Of of>
struct Shared {
  using C = Config<T, kDims>;
  static constexpr bool kTurned = of != Of::dq;
  static constexpr int kRows = kTurned ? C::kLines : C::M, kTables = kTurned ? C::kStages : 1;
  union {
    struct {
      Tile<T, C::M, kDims> a, a2;
    };
    Tile<float, C::M, kDims> result;
  };
  Tile<T, C::kLines, kDims> b[C::kStages], b2[C::kStages];
  typename Weights<T, C::kLines / 8, 1>::Memory weights[C::kWarps];
  RowTable<kRows> rows[kTables];
  RowSums<kRows> sums[kTables];
  std::conditional_t<kTurned, Slot, Job> job;
};

// A unit's key tile.
struct KeyTile {
  const Sequence& sequence;
  int head_kv;
  int first;  // key

  __device__ std::int64_t at(const Operand& x, int line, std::int64_t limit) const {
    const std::int64_t key = std::int64_t(first) + line;
    return key < limit ? x.row(sequence.batch, head_kv, sequence.first_key + key) : kNowhere;
  }
};

// Inner tiles by their numbers, which is all that a step ahead has to keep.
//
// The row tiles of a unit, of N rows, that see some of the M keys of a tile.
struct RowWalk {
  const Problem& p;
  const KeyTile& keys;
  RowTiles tiles;
  int M, N;

  __device__ RowWalk(const Problem& problem, const KeyTile& key_tile, int m, int n)
      : p(problem), keys(key_tile), tiles(key_tile.sequence.rows, problem.group(), n), M(m), N(n) {}
  __device__ RowTile tile(std::int64_t i) const {
    return {
        p, keys.sequence, keys.head_kv, i % tiles.per_head, static_cast<int>(i / tiles.per_head),
        N};
  }
  // The first one from number i on, -1 where there is none.
  __device__ std::int64_t find(std::int64_t i) const {
    for (; i < tiles.count; ++i) {
      if (tile(i).any(p).meet(keys.first, keys.first + M)) return i;
    }
    return -1;
  }
  __device__ std::int64_t first() const { return find(0); }
  __device__ int key0(std::int64_t) const { return keys.first; }
  __device__ bool whole(std::int64_t i) const {
    return tile(i).all(p).hold(keys.first, keys.first + M);
  }
};

// The tiles of N keys that some of the rows of a tile see.
struct KeyWalk {
  const RowTile& rows;
  Keys any, all;
  int head_kv, N;

  __device__ KeyWalk(const Problem& p, const RowTile& tile, int head, int n)
      : rows(tile), any(tile.any(p)), all(tile.all(p)), head_kv(head), N(n) {}
  __device__ KeyTile tile(std::int64_t i) const {
    return {rows.sequence, head_kv, static_cast<int>(i) * N};
  }
  __device__ std::int64_t find(std::int64_t i) const {
    return any.begin < any.end && i * N < any.end ? i : -1;
  }
  __device__ std::int64_t first() const { return find(any.begin / N); }
  __device__ int key0(std::int64_t i) const { return static_cast<int>(i) * N; }
  __device__ bool whole(std::int64_t i) const { return all.hold(key0(i), key0(i) + N); }
};

// Scores of a step become what multiplies the right operand: P for dv, else dS.
template <class T, int kDims, Of of>
__device__ void weigh(const Problem& p, Shared<T, kDims, of>& shared, int stage, int key0,
                      bool whole, float (&s)[Config<T, kDims>::kLines / 8][4]) {
  using S = Shared<T, kDims, of>;
  constexpr int N = Config<T, kDims>::kLines / 8;
  const auto& rows = shared.rows[S::kTables == 1 ? 0 : stage];
  const auto& sums = shared.sums[S::kTables == 1 ? 0 : stage];
  score<T, S::kTurned>(p, rows, key0, whole, s);
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float lse = sums.lse[Place<S::kTurned>(n, e).row];
      s[n][e] = lse == -INFINITY ? 0.0f : Base<T>::exp(s[n][e] - lse);
    }
  }
  if constexpr (of == Of::dv) {
    if (p.dropping) drop<true>(p, rows, key0, s);
  } else {
    float dP[N][4] = {};
    multiply_transposed(shared.a2, shared.b2[stage], p.dims_v, dP);
    if (p.dropping) drop<S::kTurned>(p, rows, key0, dP);
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float dS = s[n][e] * (dP[n][e] - sums.delta[Place<S::kTurned>(n, e).row]);
        s[n][e] = s[n][e] == 0.0f ? 0.0f : dS;
      }
    }
    if (p.softcap == 0) return;
    float again[N][4] = {};
    multiply_transposed(shared.a, shared.b[stage], p.dims, again);
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float tanh = tanhf(again[n][e] * p.scale), derivative = fmaf(-tanh, tanh, 1.0f);
        s[n][e] = s[n][e] == 0.0f ? 0.0f : s[n][e] * derivative;
      }
    }
  }
}

// The sums of a block's outer lines over the inner tiles of a walk; `load(number, stage)` brings one.
template <class T, int kDims, Of of, class Walk, class Load>
__device__ void run_walk(const Problem& p, Shared<T, kDims, of>& shared, const Walk& walk,
                         bool guarded, bool has_lines, const Load& load,
                         float (&sum)[kDims / 8][4]) {
  using C = Config<T, kDims>;
#pragma unroll
  for (int n = 0; n < kDims / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[n][e] = 0;
  }
  std::int64_t now = walk.first(), next;
  if (now >= 0 && C::kStages == 2) load(now, 0);
  gpu::cp_async_commit();
  for (int stage = 0; now >= 0; stage ^= C::kStages - 1, now = next) {
    next = walk.find(now + 1);
    if constexpr (C::kStages == 2) {
      if (next >= 0) load(next, stage ^ 1);
      gpu::cp_async_commit();
      gpu::cp_async_wait<1>();
    } else {
      load(now, 0);
      gpu::cp_async_commit();
      gpu::cp_async_wait<0>();
    }
    __syncthreads();
    if (has_lines) {
      float weights[C::kLines / 8][4] = {};
      multiply_transposed(shared.a, shared.b[stage], p.dims, weights);
      weigh<T, kDims, of>(p, shared, stage, walk.key0(now), walk.whole(now), weights);
      const Weights<T, C::kLines / 8, 1> left(shared.weights, weights);
      const auto& right = of == Of::dv ? shared.b2[stage] : shared.b[stage];
      if (guarded) {
        left.multiply_guarded(weights, right, sum);
      } else {
        left.multiply(right, sum);
      }
    }
    __syncthreads();
  }
  gpu::cp_async_wait<0>();
}

template <class T, int kDims>
__global__ void __launch_bounds__(Config<T, kDims>::kThreads, Config<T, kDims>::kLeastBlocks)
    attention_gradient_q_kernel(Problem p, Gradients g, Grid grid) {
  using C = Config<T, kDims>;
  auto& shared = gpu::shared_memory<Shared<T, kDims, Of::dq>>();
  const Job& job = shared_by_all(shared.job, Job::at(p, grid, C::M));
  const RowTile& tile = job.tile;
  if (tile.count() == 0) return;
  load_tile<C::kThreads>(shared.a, p.q, p.dims, [&](int r) { return tile.at(p.q, r); });
  load_tile<C::kThreads>(shared.a2, g.dout, p.dims_v, [&](int r) { return tile.at(g.dout, r); });
  shared.rows[0].fill(p, tile);
  shared.sums[0].fill(g, tile, Base<T>::kUnit);

  float sum[kDims / 8][4];
  const KeyWalk walk(p, tile, job.head_kv, C::kLines);
  const auto load = [&](std::int64_t i, int stage) {
    const KeyTile keys = walk.tile(i);
    const std::int64_t length = tile.sequence.length;
    load_tile<C::kThreads>(shared.b[stage], p.k, p.dims,
                           [&](int line) { return keys.at(p.k, line, length); });
    load_tile<C::kThreads>(shared.b2[stage], p.v, p.dims_v,
                           [&](int line) { return keys.at(p.v, line, length); });
  };
  const bool has_rows = warp_line() < tile.count();
  for (bool guarded = false;; guarded = true) {
    run_walk(p, shared, walk, guarded, has_rows, load, sum);
    if (!__syncthreads_or(!all_finite(sum)) || guarded) break;
  }
  store_tile(shared.result, sum, {g.scale, g.scale}, g.dq, p.dims,
             [&](int r) { return tile.at(g.dq, r); });
}

// dk or dv.
template <class T, int kDims, Of of>
__global__ void __launch_bounds__(Config<T, kDims>::kThreads)
    attention_gradient_kv_kernel(Problem p, Gradients g, std::int64_t slots) {
  using C = Config<T, kDims>;
  auto& shared = gpu::shared_memory<Shared<T, kDims, of>>();
  const Slot& slot =
      shared_by_all(shared.job, slot_at(p, p.ends_k, p.keys, C::M, blockIdx.x % slots));
  const Sequence& s = slot.sequence;
  if (slot.tile * C::M >= s.keys) return;
  const KeyTile keys{s, static_cast<int>(blockIdx.x / slots), static_cast<int>(slot.tile) * C::M};
  load_tile<C::kThreads>(shared.a, p.k, p.dims,
                         [&](int line) { return keys.at(p.k, line, s.length); });
  if constexpr (of == Of::dk) {
    load_tile<C::kThreads>(shared.a2, p.v, p.dims_v,
                           [&](int line) { return keys.at(p.v, line, s.length); });
  }

  float sum[kDims / 8][4];
  const RowWalk walk(p, keys, C::M, C::kLines);
  const auto load = [&](std::int64_t i, int stage) {
    const RowTile tile = walk.tile(i);
    load_tile<C::kThreads>(shared.b[stage], p.q, p.dims, [&](int r) { return tile.at(p.q, r); });
    load_tile<C::kThreads>(shared.b2[stage], g.dout, p.dims_v,
                           [&](int r) { return tile.at(g.dout, r); });
    shared.rows[stage].fill(p, tile);
    shared.sums[stage].fill(g, tile, Base<T>::kUnit);
  };
  for (bool guarded = false;; guarded = true) {
    run_walk(p, shared, walk, guarded, true, load, sum);
    if (!__syncthreads_or(!all_finite(sum)) || guarded) break;
  }
  const float scale = of == Of::dk ? g.scale : 1.0f;
  const Operand& to = of == Of::dk ? g.dk : g.dv;
  store_tile(shared.result, sum, {scale, scale}, to, of == Of::dk ? p.dims : p.dims_v,
             [&](int line) { return keys.at(to, line, s.keys); });
}

template <Of of, class T, int kDims>
void launch_kv(const Problem& p, const Gradients& g) {
  using C = Config<T, kDims>;
  const std::int64_t slots = slots_for(p, p.keys, C::M);
  if (slots * p.heads_kv == 0) return;
  gpu::launch(of == Of::dk ? "attention_gradient_k" : "attention_gradient_v",
              attention_gradient_kv_kernel<T, kDims, of>, dim3(blocks_for(slots * p.heads_kv, 1)),
              dim3(C::kThreads), sizeof(Shared<T, kDims, of>), gpu::current_stream(), p, g, slots);
}

void run(const Problem& p, Gradients g) {
  const std::int64_t batch = p.q.shape[0], rows = batch * p.heads * p.rows;
  const gpu::Workspace workspace(static_cast<std::size_t>(rows) * 4);
  g.delta = g.lse;
  g.delta.data = workspace.as<float>();
  g.delta.stride[0] = p.heads * p.rows, g.delta.stride[1] = p.rows, g.delta.stride[2] = 1;
  if (rows > 0) {
    gpu::launch("attention_delta", attention_delta_kernel, dim3(blocks_for(rows, kDeltaThreads)),
                dim3(kDeltaThreads), sizeof(DeltaRows[kDeltaThreads / 32]), gpu::current_stream(),
                g, rows);
  }
  const DType dtype = dtype_for({&p.q, &p.k, &p.v, &g.dout});
  with_config(dtype, std::max(p.dims, p.dims_v), [&]<class T, class Dims>(T, Dims) {
    constexpr int kDims = Dims::value;
    using C = Config<T, kDims>;
    if (g.dq && rows > 0) {
      const Grid grid(p, C::M);
      gpu::launch("attention_gradient_q", attention_gradient_q_kernel<T, kDims>,
                  dim3(blocks_for(grid.blocks(p.heads_kv), 1)), dim3(C::kThreads),
                  sizeof(Shared<T, kDims, Of::dq>), gpu::current_stream(), p, g, grid);
    }
    if (g.dk) launch_kv<Of::dk, T, kDims>(p, g);
    if (g.dv) launch_kv<Of::dv, T, kDims>(p, g);
  });
}

}  // namespace
}  // namespace attention

void attention_backward(const AttentionBackward& op) {
  using namespace attention;
  const Attention& f = op.forward;
  run(problem_of(f), {operand_of(op.dout),
                      operand_of(f.out),
                      operand_of(f.lse),
                      operand_of(op.dlse),
                      operand_of(op.dq),
                      operand_of(op.dk),
                      operand_of(op.dv),
                      {},
                      f.scores.scale});
}

void attention_varlen_backward(const AttentionVarlenBackward& op) {
  using namespace attention;
  const AttentionVarlen& f = op.forward;
  const auto rows = [](const View& v) { return operand_of(as_batch(v, true)); };
  const auto sums = [](const View& v) { return operand_of(as_batch(v, false)); };
  run(problem_of(f), {rows(op.dout),
                      rows(f.out),
                      sums(f.lse),
                      sums(op.dlse),
                      rows(op.dq),
                      rows(op.dk),
                      rows(op.dv),
                      {},
                      f.scores.scale});
}

}  // namespace tilewright::cuda
