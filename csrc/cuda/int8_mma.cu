// Integer products by tensor cores, exact, and what scales make of them
//
// The tiles are matmul_mma.cu's with 32 elements of K a step instead of 16: 16 x 8 sums an mma,
// fragments by ldmatrix from rows of 64 bytes. An operand that is not dense along K is turned while
// it is copied, as ldmatrix transposes 16 bits and not 8; weights of 4 bits are unpacked there.
//
//     K:  |<----- group 0 ----->|<----- group 1 ----->|      A step of 64 bytes never crosses into
//         | step | step | st.   | step | step | st.   |      the next group: the last one of a group
//                                                            is cut short, its rest is zero.
//
// One scale a column (kGrouped = false): the integers run through all of K. Groups, offsets: at the
// end of a group its integers join float sums by multiply-adds. What an offset of b needs, the sum of
// a row of a in the group, is the row's product with ones: one mma more for each 4.
//
// Parameter      bounded by                                     large      grouped   flat
// tile           registers: 128 integers, 32 of the operands    128 x 128  128 x 64  16 x 128
// a warp's       grouped: 32 integers, as many float sums;      64 x 64    32 x 32   16 x 32
//                shared memory, as in matmul_mma.cu
// 64 bytes of K  shared memory: 3 stages                        48 KiB     36 KiB    27 KiB
//
// Numerics: ops.h (QuantizedMatmul), step by step; integers wrap modulo 2^32. The bits are the CPU's
// up to the activation.
//
// Source: PTX ISA, "Matrix fragments for mma.m16n8k32".
#include <type_traits>

#include "cuda/int8.h"

namespace tilewright::cuda {
namespace {

constexpr int kStages = 3, kDepth = 64;

template <bool grouped>
using Large = std::conditional_t<grouped, MmaShape<4, 2, 2, 4>, MmaShape<2, 2, 4, 8>>;
using Flat = MmaShape<1, 4, 1, 4>;

template <int lines>
using ByteTile = Tile<std::uint8_t, Major::k, lines, kDepth, Swizzle::rows>;

template <class S>
struct Shared {
  struct Tiles {
    ByteTile<S::kRows> a[kStages];
    ByteTile<S::kColumns> b[kStages];
  };
  union {
    Tiles tiles;
    Staged<std::int32_t, S::kWarpColumns> staged[S::kWarps];
  };
};

// --- from sums to the output ---------------------------------------------------------------------

__device__ inline void store_integers(const Product& p, const Place& place, std::int64_t row,
                                      std::int64_t column, const std::int32_t (&x)[4]) {
  const std::int64_t at = place.out.at(row, column);
  const auto to = static_cast<std::int32_t*>(place.out.data) + at;
  if (place.out.fours && column + 3 < p.N) {
    return gpu::store(to, Four<std::int32_t>{x[0], x[1], x[2], x[3]});
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (column + e < p.N) to[e * place.out.col] = x[e];
  }
}

// y = activation(fma(float(qa @ qb), scale_a * scale_b, bias)) + residual.
__device__ inline void store_scaled(const ScaledProduct& q, const Place& place, std::int64_t row,
                                    std::int64_t column, const std::int32_t (&x)[4]) {
  const std::int64_t of_a = place.matrix * q.p.M + row;
  const float scale_a = q.scale_a.at(of_a);
  float y[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const std::int64_t j = min(column + e, q.p.N - 1);
    const float scale = scale_a * q.scale_b.at(0, j), number = static_cast<float>(x[e]);
    y[e] = q.p.bias ? fmaf(number, scale, bias_at(q.p, j)) : number * scale;
  }
  finish_four(q.p, place, row, column, y);
}

// y = activation(fma(scale_a, s, fma(offset_a, sum of b, bias))) + residual.
__device__ inline void store_grouped(const ScaledProduct& q, const Place& place, std::int64_t row,
                                     std::int64_t column, const std::int32_t (&x)[4]) {
  const std::int64_t of_a = place.matrix * q.p.M + row;
  const float scale_a = q.scale_a.at(of_a);
  float y[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const std::int64_t j = min(column + e, q.p.N - 1);
    float constant = q.p.bias ? bias_at(q.p, j) : 0.0f;
    if (q.offset_a.data) constant = fmaf(q.offset_a.at(of_a), q.column_sums[j], constant);
    y[e] = fmaf(scale_a, __int_as_float(x[e]), constant);
  }
  finish_four(q.p, place, row, column, y);
}

// --- the kernel ----------------------------------------------------------------------------------

template <class S, class A, class B, class Right, bool kGrouped>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    int8_kernel(const __grid_constant__ ScaledProduct q, const __grid_constant__ Right weights) {
  auto& shared = gpu::shared_memory<Shared<S>>();
  const Place place = place_of(q.p, S::kRows, S::kColumns);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int row0 = warp % S::kWarpsDown * S::kWarpRows;
  const int column0 = warp / S::kWarpsDown * S::kWarpColumns;
  constexpr int kDown = S::kTilesDown, kAcross = S::kTilesAcross;
  std::int32_t integers[kDown][kAcross][4] = {};
  float sum[kGrouped ? kDown : 1][kAcross][4] = {};
  std::int32_t row_sum[kGrouped ? kDown : 1][4] = {};
  const bool with_row_sums = kGrouped && q.offset_b.data;

  // 1. Steps of K, group by group.
  auto& tiles = shared.tiles;
  const std::int64_t in_group = (q.group + kDepth - 1) / kDepth;  // steps
  const std::int64_t last = q.p.K - (q.groups - 1) * q.group;     // elements of the last group
  const std::int64_t steps =
      q.p.K > 0 ? (q.groups - 1) * in_group + (last + kDepth - 1) / kDepth : 0;
  const auto load = [&](int stage, std::int64_t step) {
    const std::int64_t begin = step / in_group * q.group;
    const std::int64_t k = begin + step % in_group * kDepth, end = min(begin + q.group, q.p.K);
    tiles.a[stage].template copy<S::kThreads>(place.a, place.row, q.p.M, k, end);
    if constexpr (std::is_same_v<Right, Weights>) {
      tiles.b[stage].template copy<S::kThreads>(weights, place.column, q.p.N, k, end);
    } else {
      tiles.b[stage].template copy<S::kThreads>(place.b, place.column, q.p.N, k, end);
    }
  };
  for_steps<kStages>(steps, load, [&](int stage, std::int64_t step) {
#pragma unroll
    for (int h = 0; h < kDepth / 32; ++h) {
      std::uint32_t a[kDown][4], b[kAcross][2];
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        gpu::ldmatrix(a[i], tiles.a[stage].slot(row0 + 16 * i + lane % 16, 2 * h + lane / 16));
      }
#pragma unroll
      for (int j = 0; j < kAcross; j += 2) {
        std::uint32_t two[4];
        const int column = column0 + 8 * j + lane % 8 + lane / 16 * 8;
        gpu::ldmatrix(two, tiles.b[stage].slot(column, 2 * h + lane / 8 % 2));
        b[j][0] = two[0], b[j][1] = two[1], b[j + 1][0] = two[2], b[j + 1][1] = two[3];
      }
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
#pragma unroll
        for (int j = 0; j < kAcross; ++j) gpu::mma_int8<A, B>(integers[i][j], a[i], b[j]);
        if constexpr (kGrouped) {
          const std::uint32_t ones[2] = {0x01010101, 0x01010101};
          if (with_row_sums) gpu::mma_int8<A, std::uint8_t>(row_sum[i], a[i], ones);
        }
      }
    }
    if constexpr (kGrouped) {
      if ((step + 1) % in_group != 0 && step + 1 != steps) return;
      const std::int64_t group = step / in_group;
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const std::int64_t column =
              min(place.column + column0 + 8 * j + lane % 4 * 2 + e, q.p.N - 1);
          const float scale = q.scale_b.at(group, column);
          const float offset = with_row_sums ? q.offset_b.at(group, column) : 0.0f;
#pragma unroll
          for (int i = 0; i < kDown; ++i) {
#pragma unroll
            for (int r = e; r < 4; r += 2) {  // the fragment's rows
              float& s = sum[i][j][r];
              s = fmaf(static_cast<float>(integers[i][j][r]), scale, s);
              if (with_row_sums) s = fmaf(static_cast<float>(row_sum[i][r]), offset, s);
              integers[i][j][r] = 0;
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) row_sum[i][r] = 0;
      }
    }
  });

  // 2. Through shared memory and the epilogue to the output, 16 rows of a warp at a time.
  auto& staged = shared.staged[warp];
#pragma unroll
  for (int i = 0; i < kDown; ++i) {
#pragma unroll
    for (int j = 0; j < kAcross; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int2 pair = {integers[i][j][2 * h], integers[i][j][2 * h + 1]};
        if constexpr (kGrouped) {
          pair.x = __float_as_int(sum[i][j][2 * h]);
          pair.y = __float_as_int(sum[i][j][2 * h + 1]);
        }
        gpu::store(&staged.row[lane / 4 + 8 * h][8 * j + lane % 4 * 2], pair);
      }
    }
    staged.drain(q.p, place.row + row0 + 16 * i, place.column + column0, lane,
                 [&](std::int64_t row, std::int64_t column, Four<std::int32_t> x) {
                   if constexpr (kGrouped) {
                     store_grouped(q, place, row, column, x.x);
                   } else if (place.out.dtype == DType::s32) {
                     store_integers(q.p, place, row, column, x.x);
                   } else {
                     store_scaled(q, place, row, column, x.x);
                   }
                 });
  }
}

struct None {};  // b is an operand of bytes

template <class S, class A, class B, class Right, bool kGrouped>
void launch(const ScaledProduct& q, const Right& weights) {
  gpu::launch("int8_mma", int8_kernel<S, A, B, Right, kGrouped>,
              dim3(blocks_of(q.p, S::kRows, S::kColumns)), dim3(S::kThreads), sizeof(Shared<S>),
              gpu::current_stream(), q, weights);
}

template <class S, class Right, bool kGrouped>
void launch_for_signs(const ScaledProduct& q, const Right& weights) {
  using Signed = std::int8_t;
  using Unsigned = std::uint8_t;
  if constexpr (kGrouped) {  // always, where b has no sign: qgemm.cu
    if (!q.b_signed) {
      return q.a_signed ? launch<S, Signed, Unsigned, Right, true>(q, weights)
                        : launch<S, Unsigned, Unsigned, Right, true>(q, weights);
    }
  }
  return q.a_signed ? launch<S, Signed, Signed, Right, kGrouped>(q, weights)
                    : launch<S, Unsigned, Signed, Right, kGrouped>(q, weights);
}

template <class Right>
void launch_for_size(const ScaledProduct& q, const Right& weights) {
  if (q.p.M <= Flat::kRows) {
    return q.grouped ? launch_for_signs<Flat, Right, true>(q, weights)
                     : launch_for_signs<Flat, Right, false>(q, weights);
  }
  return q.grouped ? launch_for_signs<Large<true>, Right, true>(q, weights)
                   : launch_for_signs<Large<false>, Right, false>(q, weights);
}

}  // namespace

void int8_mma(const ScaledProduct& q) {
  launch_for_size(q, None{});
}
void int8_mma(const ScaledProduct& q, const Weights& nibbles) {
  launch_for_size(q, nibbles);
}

}  // namespace tilewright::cuda
