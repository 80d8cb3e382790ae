// Float32 product by fused multiply-adds:  out (M, N) = a (M, K) b (K, N), fused epilogue
//
//            columns: 2 groups of 4            A warp holds 32 x 64 sums, a thread 8 x 8 of them, in
//          +------+--- ... +------+            groups of 4 x 4 that lie 16 rows and 32 columns apart:
//     rows | 4x4  |        | 4x4  |            8 lanes side by side read 128 bytes of b at once, and
//          +------+        +------+            share 16 bytes of a. Four steps of K are read from
//          :      :        :      :            shared memory at a time: 16 loads of 16 bytes for 256
//          +------+        +------+            multiply-adds.
//
// Parameter      bounded by                                                 large      medium   flat
// tile           registers: 64 sums + 64 of the chain + 64 of the operands  128 x 128  64 x 64  16 x 128
// warps                                                                     4 x 2      2 x 2    1 x 4
// kDepth = 16    shared memory: 2 stages x 2 operands x 16 x 128 floats     32 KiB     16 KiB   18 KiB
// kChain = 256   rounding (below)
//
// Numerics: an output is the sum, in ascending order, of chains of kChain fused multiply-adds, in
// ascending order of k. No other order exists: a row's bits depend on that row alone. 16-bit
// operands, where they meet float32, are widened exactly on their way into shared memory; quantized
// weights become the floats that dequantize makes of them.
// Not handled: tensor cores (matmul_mma.cu), packed operands.
//
// Method: Volkov & Demmel, "Benchmarking GPUs to tune dense linear algebra" (2008); the chains are
// those of csrc/simd/gemm_kernel.cc.
#include <type_traits>

#include "cuda/matmul.h"

namespace tilewright::cuda {
namespace {

constexpr int kDepth = 16, kStages = 2;
static_assert(kChain % kDepth == 0);

// Warps of a block, and groups of 4 x 4 sums of a thread.
template <int down, int across, int groups_down, int groups_across>
struct Shape {
  static constexpr int kWarpsDown = down, kWarps = down * across, kThreads = 32 * kWarps;
  static constexpr int kBlocks = kThreads > 128 ? 1 : 2;  // of a processor, by their registers
  static constexpr int kGroupsDown = groups_down, kGroupsAcross = groups_across;
  static constexpr int kWarpRows = 16 * groups_down, kWarpColumns = 32 * groups_across;
  static constexpr int kRows = down * kWarpRows, kColumns = across * kWarpColumns;
};
using Large = Shape<4, 2, 2, 2>;
using Medium = Shape<2, 2, 2, 1>;
using Flat = Shape<1, 4, 1, 1>;

template <Major major, int lines>
using FloatTile =
    Tile<float, major, lines, kDepth, major == Major::k ? Swizzle::quads : Swizzle::none>;

template <class S, Major a_major, Major b_major>
struct Shared {
  struct Tiles {
    FloatTile<a_major, S::kRows> a[kStages];
    FloatTile<b_major, S::kColumns> b[kStages];
  };
  union {
    Tiles tiles;
    Staged<float, S::kWarpColumns> staged[S::kWarps];
  };
};

// x[line][k] = four lines from `line` on, four steps of K from k4 * 4 on.
template <Major major, int lines>
__device__ inline void read_four(FloatTile<major, lines>& tile, int line, int k4, float (*x)[4]) {
  Four<float> run[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool by_k = major == Major::k;
    run[i] = gpu::load<Four<float>>(tile.slot(by_k ? line + i : 4 * k4 + i, by_k ? k4 : line / 4));
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if constexpr (major == Major::k) {
        x[i][e] = run[i].x[e];
      } else {
        x[e][i] = run[i].x[e];
      }
    }
  }
}

template <class S, class Right, Major a_major, Major b_major>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    ffma_kernel(const __grid_constant__ Product p, const __grid_constant__ Right weights) {
  auto& shared = gpu::shared_memory<Shared<S, a_major, b_major>>();
  const Place place = place_of(p, S::kRows, S::kColumns);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warp_row = warp % S::kWarpsDown * S::kWarpRows;
  const int warp_column = warp / S::kWarpsDown * S::kWarpColumns;
  constexpr int kRows = 4 * S::kGroupsDown, kColumns = 4 * S::kGroupsAcross;
  float sum[kRows][kColumns] = {}, chain[kRows][kColumns] = {};

  auto& tiles = shared.tiles;
  const auto load = [&](int stage, std::int64_t step) {
    const std::int64_t k = step * kDepth;
    tiles.a[stage].template copy<S::kThreads>(place.a, place.row, p.M, k, p.K);
    if constexpr (std::is_same_v<Right, Weights>) {
      tiles.b[stage].template copy<S::kThreads>(weights, place.column, p.N, k, p.K);
    } else {
      tiles.b[stage].template copy<S::kThreads>(place.b, place.column, p.N, k, p.K);
    }
  };
  const std::int64_t steps = (p.K + kDepth - 1) / kDepth;
  for_steps<kStages>(steps, load, [&](int stage, std::int64_t step) {
#pragma unroll 1  // more at a time would need more registers than there are
    for (int k4 = 0; k4 < kDepth / 4; ++k4) {
      float a[kRows][4], b[kColumns][4];
#pragma unroll
      for (int g = 0; g < S::kGroupsDown; ++g) {
        read_four<a_major>(tiles.a[stage], warp_row + lane / 8 * 4 + 16 * g, k4, a + 4 * g);
      }
#pragma unroll
      for (int g = 0; g < S::kGroupsAcross; ++g) {
        read_four<b_major>(tiles.b[stage], warp_column + lane % 8 * 4 + 32 * g, k4, b + 4 * g);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
          for (int j = 0; j < kColumns; ++j) chain[i][j] = fmaf(a[i][k], b[j][k], chain[i][j]);
        }
      }
    }
    if ((step + 1) % (kChain / kDepth) != 0 && step + 1 != steps) return;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum[i][j] += chain[i][j], chain[i][j] = 0.0f;
    }
  });

  auto& staged = shared.staged[warp];
#pragma unroll
  for (int i = 0; i < S::kGroupsDown; ++i) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int g = 0; g < S::kGroupsAcross; ++g) {
        Four<float> four;
#pragma unroll
        for (int e = 0; e < 4; ++e) four.x[e] = sum[4 * i + r][4 * g + e];
        gpu::store(&staged.row[lane / 8 * 4 + r][lane % 8 * 4 + 32 * g], four);
      }
    }
    staged.drain(p, place.row + warp_row + 16 * i, place.column + warp_column, lane,
                 [&](std::int64_t row, std::int64_t column, Four<float> y) {
                   store_sums(p, place, row, column, y.x);
                 });
  }
}

struct None {};  // b is p's own operand

template <class S, class Right, Major a_major, Major b_major>
void launch(const Product& p, const Right& weights) {
  gpu::launch("matmul_ffma", ffma_kernel<S, Right, a_major, b_major>,
              dim3(blocks_of(p, S::kRows, S::kColumns)), dim3(S::kThreads),
              sizeof(Shared<S, a_major, b_major>), gpu::current_stream(), p, weights);
}

template <class S, class Right>
void launch_for_majors(const Product& p, const Right& weights) {
  constexpr Major k = Major::k, line = Major::line;
  if (p.a_major == k) {
    return p.b_major == k ? launch<S, Right, k, k>(p, weights)
                          : launch<S, Right, k, line>(p, weights);
  }
  return p.b_major == k ? launch<S, Right, line, k>(p, weights)
                        : launch<S, Right, line, line>(p, weights);
}

template <class Right>
void launch_for_size(const Product& p, TileSize size, const Right& weights) {
  switch (size) {
    case TileSize::large:
      return launch_for_majors<Large>(p, weights);
    case TileSize::medium:
      return launch_for_majors<Medium>(p, weights);
    case TileSize::flat:
      return launch_for_majors<Flat>(p, weights);
  }
}

}  // namespace

void matmul_ffma(const Product& p, TileSize size) {
  launch_for_size(p, size, None{});
}
void matmul_ffma(const Product& p, TileSize size, const Weights& b) {
  launch_for_size(p, size, b);
}

}  // namespace tilewright::cuda
