// Products by tensor cores:  out (M, N) = a (M, K) b (K, N), fused epilogue
//
//            columns                        A warp holds a grid of 16 x 8 sums, the shape of one mma.
//          +----+----+-- ... +              Each step of K (16 elements of 16 bits, 8 of 32) reads the
//     rows | 16 x 8  |       |              fragments of its rows and columns by ldmatrix, 16 x 16 or
//          +----+----+-- ... +              16 x 8 elements at once, and multiplies all pairs. With
//          :    :    :       :              64 x 64 a warp shared memory gives 32 wavefronts for 32
//          +----+----+-- ... +              mma, which take twice as many cycles.
//
// Parameter    bounded by                                                large      medium   flat
// tile         registers: 128 sums, 32 of the operands                   128 x 128  64 x 64  16 x 128
// a warp's     the same; shared memory, as above                         64 x 64    32 x 32  16 x 32
//   of TF32    the same, and the operands split                          64 x 32
// 64 bytes of  shared memory: 3 stages, 2 blocks a processor             48 KiB     24 KiB   27 KiB
//   K a stage
//
// Sums go through shared memory once more, 16 rows of a warp at a time: fragments have 8 bytes of a
// row side by side, the store wants whole sectors.
//
// Numerics: products are exact, sums float32 as tensor cores make them: in ascending order of k,
// some terms of one mma at a time, cut toward zero. An output's bits depend on its row and column
// alone. What float32 is split into:
//     tf32     x ~ h, h = x rounded to 11 bits                          relative error 2^-11 a product
//     tf32x3   x ~ h + l, l = x - h rounded likewise; l l' is dropped,  2^-21
//              the smaller products are added first
// tf32x3 computes an output that is not finite once more, by plain multiply-adds, since an infinite
// h has no l. The largest finite floats round to the largest finite h.
// Not handled: operands of unlike types (matmul_ffma.cu).
//
// Source: PTX ISA, "Matrix fragments for mma.m16n8k16"; Ootomo & Yokota, "Recovering single
// precision accuracy from Tensor Cores" (2022).
#include <type_traits>

#include "cuda/matmul.h"

namespace tilewright::cuda {
namespace {

constexpr int kStages = 3, kDepthBytes = 64;

template <Multiply kind>
constexpr bool kIsTf32 = kind == Multiply::tf32 || kind == Multiply::tf32x3;
template <Multiply kind>
using Large = std::conditional_t<kIsTf32<kind>, MmaShape<2, 4, 4, 4>, MmaShape<2, 2, 4, 8>>;
using Medium = MmaShape<2, 2, 2, 4>;
using Flat = MmaShape<1, 4, 1, 4>;

template <Multiply kind>
using Stored = std::conditional_t<kIsTf32<kind>, float, std::uint16_t>;

template <Multiply kind, Major major, int lines>
using OperandTile =
    Tile<Stored<kind>, major, lines, kDepthBytes / static_cast<int>(sizeof(Stored<kind>)),
         kIsTf32<kind> && major == Major::line ? Swizzle::words : Swizzle::rows>;

template <class S, Multiply kind, Major a_major, Major b_major>
struct Shared {
  struct Tiles {
    OperandTile<kind, a_major, S::kRows> a[kStages];
    OperandTile<kind, b_major, S::kColumns> b[kStages];
  };
  union {
    Tiles tiles;
    Staged<float, S::kWarpColumns> staged[S::kWarps];
  };
};

// --- fragments: `step` counts those of a stage, each two slots of a run along K ------------------

// Rows [line, line + 16) of a: registers (rows 0-7, first half of k), (8-15, first), (0-7, second),
// (8-15, second).
template <Multiply kind, Major major, int lines>
__device__ inline void read_a(OperandTile<kind, major, lines>& tile, int line, int step, int lane,
                              std::uint32_t (&r)[4]) {
  if constexpr (major == Major::k) {
    gpu::ldmatrix(r, tile.slot(line + lane % 16, 2 * step + lane / 16));
  } else if constexpr (!kIsTf32<kind>) {
    const int k = 16 * step + lane % 8 + lane / 16 * 8;
    gpu::ldmatrix_transposed(r, tile.slot(k, line / 8 + lane / 8 % 2));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      r[i] = tile.word(8 * step + lane % 4 + i / 2 * 4, line + lane / 4 + i % 2 * 8);
    }
  }
}

// Columns [line, line + 16) of b, two tiles: registers (first half of k), (second) of each.
template <Multiply kind, Major major, int lines>
__device__ inline void read_b(OperandTile<kind, major, lines>& tile, int line, int step, int lane,
                              std::uint32_t (*two)[2]) {
  std::uint32_t r[4];
  if constexpr (major == Major::k) {
    gpu::ldmatrix(r, tile.slot(line + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
  } else if constexpr (!kIsTf32<kind>) {
    gpu::ldmatrix_transposed(r, tile.slot(16 * step + lane % 16, line / 8 + lane / 16));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      r[i] = tile.word(8 * step + lane % 4 + i % 2 * 4, line + lane / 4 + i / 2 * 8);
    }
  }
  two[0][0] = r[0], two[0][1] = r[1], two[1][0] = r[2], two[1][1] = r[3];
}

// x rounded to TF32: to nearest, ties away from zero.
__device__ inline std::uint32_t tf32_of(float x) {
  constexpr std::uint32_t kUnused = 0x1fff, kLargest = 0x7f7fe000, kInfinity = 0x7f800000;
  const std::uint32_t bits = __float_as_uint(x), size = bits & 0x7fffffff;
  if (size >= kInfinity) return size > kInfinity ? 0x7fc00000 : bits;
  return (bits & 0x80000000) | min((size + (kUnused + 1) / 2) & ~kUnused, kLargest);
}

// Every register becomes its upper part; `low` takes the lower ones.
template <int n>
__device__ inline void split(std::uint32_t (&x)[n], std::uint32_t (&low)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const float whole = __uint_as_float(x[i]);
    x[i] = tf32_of(whole);
    low[i] = tf32_of(whole - __uint_as_float(x[i]));
  }
}

template <Multiply kind>
__device__ inline void mma(float (&d)[4], const std::uint32_t (&a)[4],
                           const std::uint32_t (&b)[2]) {
  if constexpr (kind == Multiply::bf16) {
    gpu::mma_bf16(d, a, b);
  } else if constexpr (kind == Multiply::f16) {
    gpu::mma_f16(d, a, b);
  } else {
    gpu::mma_tf32(d, a, b);
  }
}

// sum += a b for a warp's whole grid and one step of K.
template <Multiply kind, int down, int across>
__device__ inline void multiply_all(float (&sum)[down][across][4], std::uint32_t (&a)[down][4],
                                    std::uint32_t (&b)[across][2]) {
  if constexpr (kIsTf32<kind>) {
    std::uint32_t a_low[down][4], b_low[across][2];
#pragma unroll
    for (int i = 0; i < down; ++i) split(a[i], a_low[i]);
#pragma unroll
    for (int j = 0; j < across; ++j) split(b[j], b_low[j]);
    if constexpr (kind == Multiply::tf32x3) {
#pragma unroll
      for (int i = 0; i < down; ++i) {
#pragma unroll
        for (int j = 0; j < across; ++j) {
          mma<kind>(sum[i][j], a_low[i], b[j]);
          mma<kind>(sum[i][j], a[i], b_low[j]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < down; ++i) {
#pragma unroll
    for (int j = 0; j < across; ++j) mma<kind>(sum[i][j], a[i], b[j]);
  }
}

// --- the kernel ----------------------------------------------------------------------------------

// The sum of one output by plain multiply-adds.
__device__ inline float plain_sum(const Product& p, const Place& place, std::int64_t row,
                                  std::int64_t column) {
  float sum = 0.0f;
  for (std::int64_t k = 0; k < p.K; ++k) {
    const float a = place.a.at<float>(row, k), b = place.b.at<float>(column, k);
    sum = fmaf(a, b, sum);
  }
  return sum;
}

// Sums that are not finite once more, where the parts of infinity have made them NaN.
__device__ inline void replace_special(const Product& p, const Place& place, std::int64_t row,
                                       std::int64_t column, float (&y)[4]) {
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const bool finite = y[e] - y[e] == 0.0f;
    if (!finite && column + e < p.N) y[e] = plain_sum(p, place, row, column + e);
  }
}

template <class S, Multiply kind, Major a_major, Major b_major>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    mma_kernel(const __grid_constant__ Product p) {
  auto& shared = gpu::shared_memory<Shared<S, kind, a_major, b_major>>();
  const Place place = place_of(p, S::kRows, S::kColumns);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int row0 = warp % S::kWarpsDown * S::kWarpRows;
  const int column0 = warp / S::kWarpsDown * S::kWarpColumns;
  constexpr int kDepth = kDepthBytes / static_cast<int>(sizeof(Stored<kind>));
  float sum[S::kTilesDown][S::kTilesAcross][4] = {};

  // 1. Sums.
  auto& tiles = shared.tiles;
  const auto load = [&](int stage, std::int64_t step) {
    const std::int64_t k = step * kDepth;
    tiles.a[stage].template copy<S::kThreads>(place.a, place.row, p.M, k, p.K);
    tiles.b[stage].template copy<S::kThreads>(place.b, place.column, p.N, k, p.K);
  };
  const std::int64_t steps = (p.K + kDepth - 1) / kDepth;
  for_steps<kStages>(steps, load, [&](int stage, std::int64_t) {
#pragma unroll
    for (int step = 0; step < kDepthBytes / 32; ++step) {
      std::uint32_t a[S::kTilesDown][4], b[S::kTilesAcross][2];
#pragma unroll
      for (int i = 0; i < S::kTilesDown; ++i) {
        read_a<kind, a_major>(tiles.a[stage], row0 + 16 * i, step, lane, a[i]);
      }
#pragma unroll
      for (int j = 0; j < S::kTilesAcross; j += 2) {
        read_b<kind, b_major>(tiles.b[stage], column0 + 8 * j, step, lane, b + j);
      }
      multiply_all<kind>(sum, a, b);
    }
  });

  // 2. Through shared memory and the epilogue to the output, 16 rows of a warp at a time.
  auto& staged = shared.staged[warp];
#pragma unroll
  for (int i = 0; i < S::kTilesDown; ++i) {
#pragma unroll
    for (int j = 0; j < S::kTilesAcross; ++j) {
      for (int half = 0; half < 2; ++half) {
        const float2 pair = {sum[i][j][2 * half], sum[i][j][2 * half + 1]};
        gpu::store(&staged.row[lane / 4 + 8 * half][8 * j + lane % 4 * 2], pair);
      }
    }
    staged.drain(p, place.row + row0 + 16 * i, place.column + column0, lane,
                 [&](std::int64_t row, std::int64_t column, Four<float> y) {
                   if constexpr (kind == Multiply::tf32x3)
                     replace_special(p, place, row, column, y.x);
                   store_sums(p, place, row, column, y.x);
                 });
  }
}

template <class S, Multiply kind, Major a_major, Major b_major>
void launch(const Product& p) {
  gpu::launch("matmul_mma", mma_kernel<S, kind, a_major, b_major>,
              dim3(blocks_of(p, S::kRows, S::kColumns)), dim3(S::kThreads),
              sizeof(Shared<S, kind, a_major, b_major>), gpu::current_stream(), p);
}

template <class S, Multiply kind>
void launch_for_majors(const Product& p) {
  constexpr Major k = Major::k, line = Major::line;
  const bool b_by_k = p.b_major == k;
  if (p.a_major == k) return b_by_k ? launch<S, kind, k, k>(p) : launch<S, kind, k, line>(p);
  return b_by_k ? launch<S, kind, line, k>(p) : launch<S, kind, line, line>(p);
}

template <Multiply kind>
void launch_for_size(const Product& p, TileSize size) {
  switch (size) {
    case TileSize::large:
      return launch_for_majors<Large<kind>, kind>(p);
    case TileSize::medium:
      return launch_for_majors<Medium, kind>(p);
    case TileSize::flat:
      return launch_for_majors<Flat, kind>(p);
  }
}

}  // namespace

void matmul_mma(const Product& p, TileSize size, Multiply kind) {
  switch (kind) {
    case Multiply::bf16:
      return launch_for_size<Multiply::bf16>(p, size);
    case Multiply::f16:
      return launch_for_size<Multiply::f16>(p, size);
    case Multiply::tf32:
      return launch_for_size<Multiply::tf32>(p, size);
    case Multiply::tf32x3:
      return launch_for_size<Multiply::tf32x3>(p, size);
  }
}

}  // namespace tilewright::cuda
