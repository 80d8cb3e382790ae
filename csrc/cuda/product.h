// A batch of matrix products as its kernels see it: where the operands, the output and what is
// fused into its store lie; which block computes which tile.
#pragma once
#include "cuda/activation.h"
#include "cuda/tiles.h"
#include "tilewright/ops.h"

namespace tilewright::cuda {

// Element (i, j) at data + i * row + j * col.
struct Matrix {
  void* data = nullptr;
  DType dtype = DType::f32;
  bool fours = false;  // four neighbours in a row are one aligned access
  std::int64_t row = 0, col = 0;

  __device__ std::int64_t at(std::int64_t i, std::int64_t j) const { return i * row + j * col; }
};

// Leading axes: their extents, and each view's stride along them, 0 where it is broadcast.
struct Batch {
  int rank = 0;
  std::int64_t count = 1;
  std::int64_t shape[kMaxRank], a[kMaxRank], b[kMaxRank], residual[kMaxRank], out[kMaxRank];
};

struct Product {
  std::int64_t M, N, K;
  Operand a, b;
  Major a_major, b_major;  // a template parameter of the kernels
  Matrix residual, out;    // residual: without data where there is none
  const void* bias = nullptr;
  DType bias_dtype = DType::f32;
  std::int64_t bias_stride = 0;
  float alpha = 1.0f;
  Activation activation = Activation::none;
  Batch batch;
};

// From checked views (ops/batch.h). Rows of neighbouring leading axes become one tall matrix where
// strides allow: a product with weights is one product, however its batch is shaped. `tile` is the
// type that tiles have: operands of another one are converted on their way.
Product product_of(const View& a, const View& b, const View& residual, const View& out, DType tile);
void set_bias(Product& p, const View& bias);

// Blocks of `rows` x `columns` of every output matrix; DeviceError beyond a grid's limit.
unsigned blocks_of(const Product& p, int rows, int columns);

__device__ inline std::int64_t bytes_of(DType t) {
  return t == DType::f32 || t == DType::s32 ? 4 : t == DType::bf16 || t == DType::f16 ? 2 : 1;
}
template <class M>
__device__ inline M moved(const M& m, std::int64_t elements) {
  M other = m;
  other.data = const_cast<char*>(static_cast<const char*>(m.data)) + elements * bytes_of(m.dtype);
  return other;
}

// What a block works on: a matrix of the batch, and a tile of it. Tiles follow each other down
// columns of 8: what runs at one time shares operands in the L2 cache.
struct Place {
  std::int64_t matrix;       // counted through the batch
  std::int64_t row, column;  // of the tile's first element
  Operand a, b;
  Matrix residual, out;
};

__device__ inline Place place_of(const Product& p, int rows, int columns) {
  constexpr std::int64_t kGroup = 8;
  const std::int64_t down = (p.M + rows - 1) / rows, across = (p.N + columns - 1) / columns;
  const std::int64_t matrix = static_cast<std::int64_t>(blockIdx.x) / (down * across);
  const std::int64_t tile = static_cast<std::int64_t>(blockIdx.x) % (down * across);
  std::int64_t a = 0, b = 0, residual = 0, out = 0, index = matrix;
  for (int d = p.batch.rank - 1; d >= 0; --d) {
    const std::int64_t i = index % p.batch.shape[d];
    index /= p.batch.shape[d];
    a += i * p.batch.a[d], b += i * p.batch.b[d];
    residual += i * p.batch.residual[d], out += i * p.batch.out[d];
  }
  const std::int64_t group = tile / (kGroup * across), within = tile % (kGroup * across);
  const std::int64_t height = min(kGroup, down - group * kGroup);
  return {matrix,
          (group * kGroup + within % height) * rows,
          within / height * columns,
          moved(p.a, a),
          moved(p.b, b),
          moved(p.residual, residual),
          moved(p.out, out)};
}

// --- what happens to sums on their way to memory -------------------------------------------------

// y = activation(y) + residual for columns [column, column + 4) of a row, as far as they exist,
// rounded once.
__device__ inline void finish_four(const Product& p, const Place& place, std::int64_t row,
                                   std::int64_t column, float (&y)[4]) {
  const Matrix &given = place.residual, &out = place.out;
  const int n = static_cast<int>(min(std::int64_t{4}, p.N - column));
#pragma unroll
  for (int e = 0; e < 4; ++e) y[e] = activate(p.activation, y[e]);
  if (given.data) {
    float residual[4] = {};
    const std::int64_t at = given.at(row, column);
    if (given.fours && n == 4) {
      get_four(given.data, at, given.dtype, residual);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (e < n) residual[e] = get_float(given.data, at + e * given.col, given.dtype);
      }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) y[e] = y[e] + residual[e];
  }
  const std::int64_t at = out.at(row, column);
  if (out.fours && n == 4) return put_four(out.data, at, out.dtype, y);
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (e < n) put_float(out.data, at + e * out.col, out.dtype, y[e]);
  }
}

__device__ inline float bias_at(const Product& p, std::int64_t column) {
  return column < p.N ? get_float(p.bias, column * p.bias_stride, p.bias_dtype) : 0.0f;
}

// y = activation(alpha * sum + bias) + residual.
__device__ inline void store_sums(const Product& p, const Place& place, std::int64_t row,
                                  std::int64_t column, float (&y)[4]) {
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (p.alpha != 1.0f) y[e] = y[e] * p.alpha;
    if (p.bias) y[e] = y[e] + bias_at(p, column + e);
  }
  finish_four(p, place, row, column, y);
}

// A block of tensor-core sums: its warps, and each warp's tiles of 16 x 8, the shape of one mma.
template <int down, int across, int tiles_down, int tiles_across>
struct MmaShape {
  static constexpr int kWarpsDown = down, kWarps = down * across, kThreads = 32 * kWarps;
  static constexpr int kBlocks = kThreads > 128 ? 1 : 2;  // of a processor, by their registers
  static constexpr int kTilesDown = tiles_down, kTilesAcross = tiles_across;
  static constexpr int kWarpRows = 16 * tiles_down, kWarpColumns = 8 * tiles_across;
  static constexpr int kRows = down * kWarpRows, kColumns = across * kWarpColumns;
  static_assert(tiles_across % 2 == 0, "two columns of tiles come by one ldmatrix");
};

// 16 rows of a warp's sums in shared memory, between threads that hold parts of many rows and
// threads that store four neighbours each, a row's 32 bytes and more at once. The padding spreads
// what is written over the banks.
template <class T, int columns>
struct Staged {
  T row[16][columns + 8];

  // store(row, column, four sums) for all that lies inside of out, by the lanes of a warp. `row0`
  // and `column0` are where the first one belongs.
  template <class Store>
  __device__ void drain(const Product& p, std::int64_t row0, std::int64_t column0, int lane,
                        const Store& store) {
    constexpr int kLanes = columns / 4;  // of a row
    static_assert(32 % kLanes == 0);
    const std::int64_t column = column0 + lane % kLanes * 4;
    __syncwarp();
#pragma unroll 1
    for (int r = lane / kLanes; r < 16; r += 32 / kLanes) {
      if (row0 + r >= p.M || column >= p.N) break;
      store(row0 + r, column, gpu::load<Four<T>>(&row[r][lane % kLanes * 4]));
    }
    __syncwarp();
  }
};

}  // namespace tilewright::cuda
