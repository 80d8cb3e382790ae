// Attention, forward, on the GPU:
//
//   out = softmax(t) V      lse = log(sum(exp(t)))      t = scale * Q K^T, with softcap, ALiBi, masks
//
//   q (B, H, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv), D and Dv up to 256; or sequences one after
//   the other (varlen). Any strides. All of one 16-bit dtype: tensor cores; else float32 by FFMA.
//
//            keys ->   tile 0   tile 1   ...  | tile 8 ...        a block: M rows of a unit against
//          +--------+--------+--------+-------|-----------+       their keys, N at a time; a warp: 16
//   rows   | warp 0 |  S = Q K^T      |  ...  |           |       rows, whose softmax needs only the
//    |     | warp 1 |  P = exp(t - m) |       |           |       four lanes of a quad
//    v     | ...    |  O = a O + P V  |       |           |
//          +--------+--------+--------+-------|-----------+
//                       chunk 0 of 512 keys     chunk 1: begins anew, then joins what is before it
//
// Where there are fewer blocks than a card wants and more than one chunk (decode), each chunk is a
// block of its own and a second kernel joins them, in the same order by the same formula: the bits
// don't change. Tiles outside a row tile's range are never loaded; where the mask hides a tile from a
// warp, it skips the softmax and the second product.
//
// Parameter       bounded by                                                     16 bits       float32
// warps           16 rows each. Shared memory: a warp takes 16 wavefronts of K     8, 8, 2       4, 2, 2
//                 and V for each 24 mma, 2 cycles each, all warps together 16
//                 more for the copy, and Q none, since its fragments stay in
//                 registers (heads up to 128): with 8 warps tensor cores take 4/3
//                 of its time. 2 warps for units of few rows: decode.
// keys N a tile   registers: N / 2 for scores beside Dv / 2 for sums            64, 32, 16   32, 32, 8
// chunk           512 keys: what a split costs, a state of Dv + 2 words a row, against reading K and V
// kEnoughBlocks   two blocks for each of the 132 SMs of an H100
//                                                        (three numbers: heads up to 64, 128 and 256)
// V of a tile arrives during its first product, K of the next one during its second. 99 KiB of shared
// memory (sm_86, sm_89, sm_120) hold every block.
//
// Numerics: float32 throughout, in 16 bits products of P are of two terms (attention_products.h); one
// rounding at the end. Inf or NaN among the values makes NaN of weights that are zero; a block that
// finds any in its sums does its work again with guarded products, which have the same bits elsewhere.
// Keys in pages: a line's place is looked up (kvcache.cu has the table); the bits are the same.
// Not handled: more than 256 dimensions.
//
// Method: Dao (2023), FlashAttention-2; Dao et al. (2023), Flash-Decoding.
#include "cuda/attention_products.h"
#include "cuda/gpu/stream.h"
#include "cuda/kernels.h"
#include "cuda/kvcache.h"

namespace tilewright::cuda {
namespace attention {
namespace {

constexpr std::int64_t kEnoughBlocks = 264;
constexpr int kFewRows = 32;

template <class T, int kDims>
constexpr bool kQInRegisters = sizeof(T) == 2 && kDims <= 128;

// `few`: for units of at most kFewRows rows. The lines, on which bits depend, are the same.
template <class T, int kDims, bool few>
struct Config {
  static constexpr bool kHalf = sizeof(T) == 2, kInRegisters = kQInRegisters<T, kDims>;
  static constexpr int kWarps = kInRegisters ? (few ? 2 : 8) : kDims == 64 ? 4 : 2;
  static constexpr int kLines = kHalf ? (kDims == 64    ? 64
                                         : kDims == 128 ? 32
                                                        : 16)
                                      : (kDims == 256 ? 8 : 32);
  static constexpr int M = 16 * kWarps, kThreads = 32 * kWarps;
  static_assert(kChunk % kLines == 0, "a chunk is whole tiles");
};

// What sums under the maximum `before` are worth under `after`.
template <class T>
__device__ float rescaled(float before, float after) {
  return before == after ? 1.0f : Base<T>::exp(before - (after == -INFINITY ? 0.0f : after));
}

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// What some keys say about a warp's rows, by accumulators: h is 0 for line g and 1 for line g + 8.
template <class T, int kDims>
struct State {
  float max[2], sum[2], out[kDims / 8][4];

  __device__ void clear() {
    for (int h = 0; h < 2; ++h) max[h] = -INFINITY, sum[h] = 0;
#pragma unroll
    for (int n = 0; n < kDims / 8; ++n) {
      for (int e = 0; e < 4; ++e) out[n][e] = 0;
    }
  }

  // Scores become weights; the sums join the state, the values have to be added. `sum` is that of a
  // lane's own keys until the chunk ends.
  template <int N>
  __device__ void weigh(float (&s)[N][4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = -INFINITY, added = 0;
#pragma unroll
      for (int n = 0; n < N; ++n) top = fmaxf(top, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
      const float after = fmaxf(max[h], quad_max(top)), factor = rescaled<T>(max[h], after);
      const float shift = after == -INFINITY ? 0.0f : after;
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) {
          s[n][e] = Base<T>::exp(s[n][e] - shift);
          added += s[n][e];
        }
      }
      max[h] = after;
      sum[h] = fmaf(sum[h], factor, added);
#pragma unroll
      for (int n = 0; n < kDims / 8; ++n) out[n][2 * h] *= factor, out[n][2 * h + 1] *= factor;
    }
  }
};

// Chunks (maximum, sum) joined in ascending order: `before` times the first factor plus `chunk` times
// the second one.
template <class T>
struct Joined {
  float max, before, chunk;

  __device__ Joined(float max_before, float max_chunk) : max(fmaxf(max_before, max_chunk)) {
    before = rescaled<T>(max_before, max), chunk = rescaled<T>(max_chunk, max);
  }
  __device__ float operator()(float a, float b) const { return fmaf(a, before, b * chunk); }
};

// The chunks before the current one, in shared memory: only the thread that owns it touches a word.
template <class T, int kDims, int kThreads>
struct Total {
  float* words;  // (kDims / 2, kThreads)
  bool some = false;
  float max[2] = {}, sum[2] = {};

  __device__ float& word(int n, int e) const {
    return words[(n * 4 + e) * kThreads + static_cast<int>(threadIdx.x)];
  }
  __device__ void join(State<T, kDims>& chunk) {
    if (!some) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Joined<T> joined(max[h], chunk.max[h]);
      chunk.max[h] = joined.max, chunk.sum[h] = joined(sum[h], chunk.sum[h]);
#pragma unroll
      for (int n = 0; n < kDims / 8; ++n) {
        for (int e = 2 * h; e < 2 * h + 2; ++e)
          chunk.out[n][e] = joined(word(n, e), chunk.out[n][e]);
      }
    }
  }
  __device__ void keep(const State<T, kDims>& state) {
    some = true;
    for (int h = 0; h < 2; ++h) max[h] = state.max[h], sum[h] = state.sum[h];
#pragma unroll
    for (int n = 0; n < kDims / 8; ++n) {
      for (int e = 0; e < 4; ++e) word(n, e) = state.out[n][e];
    }
  }
};

template <class T>
__device__ float log_sum(float max, float sum) {
  return sum == 0 ? -INFINITY : (max + Base<T>::log(sum)) * Base<T>::kLog;
}

// Q, until it is in registers where it goes there, and the Total of the chunks so far, which becomes
// the rows of the result.
template <class T, int M, int kDims, bool apart>
struct QAndSums {
  Tile<T, M, kDims> q;
  Tile<float, M, kDims> sums;
};
template <class T, int M, int kDims>
struct QAndSums<T, M, kDims, false> {
  union {
    Tile<T, M, kDims> q;
    Tile<float, M, kDims> sums;
  };
};

template <class T, int kDims, class C>
struct Shared : QAndSums<T, C::M, kDims, !C::kInRegisters> {
  Tile<T, C::kLines, kDims> k, v;
  typename Weights<T, C::kLines / 8, 2>::Memory weights[C::kWarps];
  RowTable<C::M> rows;
  Job job;
};

// All of a job's keys [first, last) of tiles, in order. V of a tile arrives during the first product,
// K of the next tile during the second one.
template <class T, int kDims, class C>
__device__ void run_keys(const Problem& p, const Job& job, Keys seen, bool guarded,
                         Shared<T, kDims, C>& shared, State<T, kDims>& state) {
  constexpr int N = C::kLines;
  const Sequence& s = job.tile.sequence;
  const int first = seen.begin / N, last = (seen.end + N - 1) / N;
  const Keys whole = job.tile.all(p);
  const bool has_rows = warp_line() < job.tile.count();
  const int length = static_cast<int>(s.length);
  const KeyPlaces of_k(p.k, s.batch, job.head_kv, s.first_key),
      of_v(p.v, s.batch, job.head_kv, s.first_key);
  const auto load = [&](Tile<T, N, kDims>& to, const Operand& x, const KeyPlaces& of_x, int dims,
                        int tile) {
    load_tile<C::kThreads>(to, x, dims, [&](int line) -> std::int64_t {
      const int key = tile * N + line;
      return key < length ? of_x(key) : kNowhere;
    });
    gpu::cp_async_commit();
  };
  const auto arrived = [] {
    gpu::cp_async_wait<0>();
    __syncthreads();
  };

  Total<T, kDims, C::kThreads> total{shared.sums.element};
  state.clear();
  if (first >= last) return;
  load_tile<C::kThreads>(shared.q, p.q, p.dims, [&](int r) { return job.tile.at(p.q, r); });
  load(shared.k, p.k, of_k, p.dims, first);
  arrived();
  using Q = std::conditional_t<C::kInRegisters, Fragments<T, kDims>, const Tile<T, C::M, kDims>&>;
  const Q q(shared.q);
  for (int tile = first; tile < last; ++tile) {
    load(shared.v, p.v, of_v, p.dims_v, tile);
    float weights[N / 8][4] = {};
    if (has_rows) {  // uniform in a warp; the other warps only help with the copies
      multiply_transposed(q, shared.k, p.dims, weights);
    }
    arrived();
    if (tile + 1 < last) load(shared.k, p.k, of_k, p.dims, tile + 1);
    if (has_rows) {
      const bool all = whole.hold(tile * N, tile * N + N);
      score<T, false>(p, shared.rows, tile * N, all, weights);
      bool some = all && !p.mask;
      if (!some) {
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {
          for (int e = 0; e < 4; ++e) some = some || weights[n][e] != -INFINITY;
        }
      }
      if (__any_sync(kAllLanes, some)) {
        state.weigh(weights);
        if (p.dropping) drop<false>(p, shared.rows, tile * N, weights);
        const Weights<T, N / 8, 2> left(shared.weights, weights);
        if (guarded) {
          left.multiply_guarded(weights, shared.v, state.out);
        } else {
          left.multiply(shared.v, state.out);
        }
      }
    }
    if ((tile + 1) * N % kChunk == 0 || tile + 1 == last) {
      for (int h = 0; h < 2; ++h) state.sum[h] = quad_sum(state.sum[h]);
      total.join(state);
      if (tile + 1 < last) {
        total.keep(state);
        state.clear();
      }
    }
    arrived();
  }
}

template <class T, int kDims, class C>
__global__ void __launch_bounds__(C::kThreads)
    attention_forward_kernel(Problem p, Operand out, Operand lse, Grid grid) {
  auto& shared = gpu::shared_memory<Shared<T, kDims, C>>();
  const Job& job = shared_by_all(shared.job, Job::at(p, grid, C::M));
  const RowTile& tile = job.tile;
  if (tile.count() == 0) return;
  Keys seen = tile.any(p);
  if (grid.chunks) {
    seen = {max(seen.begin, job.chunk * kChunk), min(seen.end, (job.chunk + 1) * kChunk)};
    if (seen.begin >= seen.end) return;
  }
  shared.rows.fill(p, tile);
  __syncthreads();

  State<T, kDims> state;
  for (bool guarded = false;; guarded = true) {
    run_keys(p, job, seen, guarded, shared, state);
    if (!__syncthreads_or(!all_finite(state.out)) || guarded) break;
  }

  const int lane = lane_id(), line = warp_line();
  if (grid.chunks) {
    float* const to = grid.partial + (job.number * grid.chunks + job.chunk) * (C::M * (kDims + 2));
    for (int h = 0; h < 2; ++h) {
      const int r = line + lane / 4 + 8 * h;
#pragma unroll
      for (int n = 0; n < kDims / 8; ++n) {
        gpu::store(to + r * kDims + n * 8 + lane % 4 * 2,
                   make_float2(state.out[n][2 * h], state.out[n][2 * h + 1]));
      }
      if (lane % 4 == 0) {
        to[C::M * kDims + r] = state.max[h];
        to[C::M * (kDims + 1) + r] = state.sum[h];
      }
    }
    return;
  }
  float factor[2];
  for (int h = 0; h < 2; ++h) {
    const int r = line + lane / 4 + 8 * h;
    factor[h] = state.sum[h] == 0 ? 0.0f : 1 / state.sum[h];
    if (!lse || lane % 4 != 0 || r >= tile.count()) continue;
    static_cast<float*>(lse.data)[tile.at(lse, r)] = log_sum<T>(state.max[h], state.sum[h]);
  }
  store_tile(shared.sums, state.out, factor, out, p.dims_v, [&](int r) { return tile.at(out, r); });
}

// The second kernel of a split: a warp joins the chunks of some rows of a tile.
template <class T, int kDims, class C>
__global__ void __launch_bounds__(C::kThreads)
    attention_join_kernel(Problem p, Operand out, Operand lse, Grid grid) {
  constexpr int M = C::M;
  const Job job = Job::at(p, grid, M);
  const RowTile& tile = job.tile;
  if (tile.count() == 0) return;
  const Keys seen = tile.any(p);
  const int lane = lane_id();
  const int first = seen.begin / kChunk;
  const int last = min((seen.end + kChunk - 1) / kChunk, grid.chunks);
  const auto chunk_at = [&](int chunk) {
    return grid.partial + (job.number * grid.chunks + chunk) * (M * (kDims + 2));
  };
  for (int r = warp_line() / 16; r < tile.count(); r += C::kWarps) {
    float top = -INFINITY, sum = 0, o[kDims / 32] = {};
    for (int chunk = first; chunk < last && seen.begin < seen.end; ++chunk) {
      const float* const from = chunk_at(chunk);
      const float own_max = from[M * kDims + r], own_sum = from[M * (kDims + 1) + r];
      const Joined<T> joined(top, own_max);
      const bool begins = chunk == first;
      sum = begins ? own_sum : joined(sum, own_sum);
      top = joined.max;
#pragma unroll
      for (int i = 0; i < kDims / 32; ++i) {
        const float own = from[r * kDims + i * 32 + lane];
        o[i] = begins ? own : joined(o[i], own);
      }
    }
    const float factor = sum == 0 ? 0.0f : 1 / sum;
    const std::int64_t at = tile.at(out, r);
    for (int i = 0; i < kDims / 32; ++i) {
      const int d = i * 32 + lane;
      if (d < p.dims_v) out.store<Mixed>(at + d * out.stride[3], o[i] * factor + 0.0f);
    }
    if (lse && lane == 0) static_cast<float*>(lse.data)[tile.at(lse, r)] = log_sum<T>(top, sum);
  }
}

template <class T, int kDims, bool few>
void run_with(const Problem& p, const Operand& out, const Operand& lse, std::int64_t longest) {
  using C = Config<T, kDims, few>;
  Grid grid(p, C::M);
  const std::int64_t blocks = grid.blocks(p.heads_kv), chunks = (longest + kChunk - 1) / kChunk;
  if (chunks > 1 && blocks < kEnoughBlocks) grid.chunks = static_cast<int>(chunks);
  const std::int64_t states = blocks * grid.chunks;
  const gpu::Workspace workspace(static_cast<std::size_t>(states * C::M * (kDims + 2) * 4));
  grid.partial = workspace.as<float>();  // (blocks, chunks, M * (kDims + 2)): out, max, sum
  gpu::launch("attention_forward", attention_forward_kernel<T, kDims, C>,
              dim3(blocks_for(grid.chunks ? states : blocks, 1)), dim3(C::kThreads),
              sizeof(Shared<T, kDims, C>), gpu::current_stream(), p, out, lse, grid);
  if (!grid.chunks) return;
  gpu::launch("attention_join", attention_join_kernel<T, kDims, C>, dim3(blocks_for(blocks, 1)),
              dim3(C::kThreads), 0, gpu::current_stream(), p, out, lse, grid);
}

// `longest`: no sequence has more keys; 0 where that is not known.
void run(const Problem& p, const Operand& out, const Operand& lse, std::int64_t longest) {
  if (p.sequences * p.heads * p.rows == 0) return;
  const DType dtype = dtype_for({&p.q, &p.k, &p.v});
  const std::int64_t rows = p.varlen() ? p.rows / p.sequences : p.rows;
  const bool few = rows * p.group() <= kFewRows;
  with_config(dtype, std::max(p.dims, p.dims_v), [&]<class T, class Dims>(T, Dims) {
    if constexpr (kQInRegisters<T, Dims::value>) {  // else both are one
      if (few) return run_with<T, Dims::value, true>(p, out, lse, longest);
    }
    run_with<T, Dims::value, false>(p, out, lse, longest);
  });
}

}  // namespace
}  // namespace attention

void attention_forward(const Attention& op) {
  using namespace attention;
  const Operand out = operand_of(op.out), lse = operand_of(op.lse);
  if (!op.cache) return run(problem_of(op), out, lse, op.k.shape[2]);
  const CachedKeys keys(*op.cache);
  Problem p = problem_of(op, keys.k, keys.v);
  if (!p.lengths) p.lengths = keys.lengths;
  run(p, out, lse, p.keys);
}

void attention_varlen_forward(const AttentionVarlen& op) {
  using namespace attention;
  run(problem_of(op), operand_of(as_batch(op.out, true)), operand_of(as_batch(op.lse, false)),
      std::max<std::int64_t>(op.max_seqlen_k, 0));
}

}  // namespace tilewright::cuda
