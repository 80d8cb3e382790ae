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
// Parameter       bounded by                                  (M, N, stages: attention_products.h)
// chunk           512 keys: what a split costs, a state of Dv + 2 words a row, against reading K and V
// kEnoughBlocks   two blocks for each of the 132 SMs of an H100
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

// What sums under the maximum `before` are worth under `after`.
template <class T>
__device__ float rescaled(float before, float after) {
  return before == after ? 1.0f : Base<T>::exp(before - (after == -INFINITY ? 0.0f : after));
}

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kWholeWarp, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(kWholeWarp, x, 1);
  return x + __shfl_xor_sync(kWholeWarp, x, 2);
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
template <class T, int kDims>
struct Total {
  float* words;  // (kDims / 2, threads)
  bool some = false;
  float max[2] = {}, sum[2] = {};

  __device__ float& word(int n, int e) const {
    return words[(n * 4 + e) * blockDim.x + threadIdx.x];
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

template <class T, int kDims>
struct Shared {
  using C = Config<T, kDims>;
  Tile<T, C::M, kDims> q;
  Tile<T, C::kLines, kDims> k[C::kStages], v[C::kStages];
  Tile<float, C::M, kDims> sums;  // the Total of the chunks so far, then the rows of the result
  typename Weights<T, C::kLines / 8, 2>::Memory weights[C::kWarps];
  RowTable<C::M> rows;
};

// All of a job's keys [first, last) of tiles, in order.
template <class T, int kDims>
__device__ void run_keys(const Problem& p, const Job& job, Keys seen, bool guarded,
                         Shared<T, kDims>& shared, State<T, kDims>& state) {
  using C = Config<T, kDims>;
  constexpr int N = C::kLines;
  const Sequence& s = job.tile.sequence;
  const int first = seen.begin / N, last = (seen.end + N - 1) / N;
  const Keys whole = job.tile.all(p);
  const bool has_rows = static_cast<int>(threadIdx.x) / 32 * 16 < job.tile.count();
  const auto load = [&](int tile, int stage) {
    const auto place_in = [&](const Operand& x) {
      return [&, tile](int line) -> std::int64_t {
        const std::int64_t key = std::int64_t(tile) * N + line;
        return key < s.length ? x.row(s.batch, job.head_kv, s.first_key + key) : kNowhere;
      };
    };
    load_tile(shared.k[stage], p.k, p.dims, place_in(p.k));
    load_tile(shared.v[stage], p.v, p.dims_v, place_in(p.v));
  };

  Total<T, kDims> total{shared.sums.element};
  state.clear();
  if (first >= last) return;
  load_tile(shared.q, p.q, p.dims, [&](int r) { return job.tile.at(p.q, r); });
  if constexpr (C::kStages == 2) {
    load(first, 0);
    gpu::cp_async_commit();
  }
  for (int tile = first; tile < last; ++tile) {
    // --- the next tiles are on their way, these have arrived
    const int stage = (tile - first) % C::kStages;
    if constexpr (C::kStages == 2) {
      if (tile + 1 < last) load(tile + 1, stage ^ 1);
      gpu::cp_async_commit();
      gpu::cp_async_wait<1>();
    } else {
      load(tile, 0);
      gpu::cp_async_commit();
      gpu::cp_async_wait<0>();
    }
    __syncthreads();

    // --- scores, weights, values
    if (has_rows) {  // uniform in a warp; the other warps only help with the copies
      const bool all = whole.hold(tile * N, tile * N + N);
      float weights[N / 8][4] = {};
      multiply_transposed(shared.q, shared.k[stage], p.dims, weights);
      score<T, false>(p, shared.rows, tile * N, all, weights);
      bool some = all && !p.mask;
      if (!some) {
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {
          for (int e = 0; e < 4; ++e) some = some || weights[n][e] != -INFINITY;
        }
      }
      if (__any_sync(kWholeWarp, some)) {
        state.weigh(weights);
        if (p.dropping) drop<false>(p, shared.rows, tile * N, weights);
        const Weights<T, N / 8, 2> left(shared.weights, weights);
        if (guarded) {
          left.multiply_guarded(weights, shared.v[stage], state.out);
        } else {
          left.multiply(shared.v[stage], state.out);
        }
      }
    }
    __syncthreads();

    // --- a chunk ends
    if ((tile + 1) * N % kChunk == 0 || tile + 1 == last) {
      for (int h = 0; h < 2; ++h) state.sum[h] = quad_sum(state.sum[h]);
      total.join(state);
      if (tile + 1 < last) {
        total.keep(state);
        state.clear();
      }
    }
  }
}

template <class T, int kDims>
__global__ void __launch_bounds__(Config<T, kDims>::kThreads)
    attention_forward_kernel(Problem p, Operand out, Operand lse, Grid grid) {
  using C = Config<T, kDims>;
  Shared<T, kDims>& shared = gpu::shared_memory<Shared<T, kDims>>();
  const Job job = Job::at(p, grid, C::M);
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

  const int lane = static_cast<int>(threadIdx.x) % 32,
            line = static_cast<int>(threadIdx.x) / 32 * 16;
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
template <class T, int kDims>
__global__ void __launch_bounds__(Config<T, kDims>::kThreads)
    attention_join_kernel(Problem p, Operand out, Operand lse, Grid grid) {
  constexpr int M = Config<T, kDims>::M;
  const Job job = Job::at(p, grid, M);
  const RowTile& tile = job.tile;
  if (tile.count() == 0) return;
  const Keys seen = tile.any(p);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int first = seen.begin / kChunk;
  const int last = min((seen.end + kChunk - 1) / kChunk, grid.chunks);
  const auto chunk_at = [&](int chunk) {
    return grid.partial + (job.number * grid.chunks + chunk) * (M * (kDims + 2));
  };
  for (int r = static_cast<int>(threadIdx.x) / 32; r < tile.count();
       r += static_cast<int>(blockDim.x) / 32) {
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

// `longest`: no sequence has more keys; 0 where that is not known.
void run(const Problem& p, const Operand& out, const Operand& lse, std::int64_t longest) {
  if (p.sequences * p.heads * p.rows == 0) return;
  const DType dtype = dtype_for({&p.q, &p.k, &p.v});
  with_config(dtype, std::max(p.dims, p.dims_v), [&]<class T, class Dims>(T, Dims) {
    constexpr int kDims = Dims::value;
    using C = Config<T, kDims>;
    Grid grid(p, C::M);
    const std::int64_t blocks = grid.blocks(p.heads_kv), chunks = (longest + kChunk - 1) / kChunk;
    if (chunks > 1 && blocks < kEnoughBlocks) grid.chunks = static_cast<int>(chunks);
    const std::int64_t states = blocks * grid.chunks;
    const gpu::Workspace workspace(static_cast<std::size_t>(states * C::M * (kDims + 2) * 4));
    grid.partial = workspace.as<float>();  // (blocks, chunks, M * (kDims + 2)): out, max, sum
    gpu::launch("attention_forward", attention_forward_kernel<T, kDims>,
                dim3(blocks_for(grid.chunks ? states : blocks, 1)), dim3(C::kThreads),
                sizeof(Shared<T, kDims>), gpu::current_stream(), p, out, lse, grid);
    if (!grid.chunks) return;
    gpu::launch("attention_join", attention_join_kernel<T, kDims>, dim3(blocks_for(blocks, 1)),
                dim3(C::kThreads), 0, gpu::current_stream(), p, out, lse, grid);
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
