// Views to products: the host's part of every matrix product.
#include <algorithm>
#include <cstdint>

#include "cuda/product.h"

namespace tilewright::cuda {
namespace {

// v's leading axis `d` of `rank`, aligned right.
struct Axis {
  std::int64_t extent, stride;
};
Axis leading_axis(const View& v, int d, int rank) {
  const int own = v.rank - 2 - (rank - d);
  if (own < 0) return {1, 0};
  return {v.shape[own], v.shape[own] == 1 ? 0 : v.stride[own]};
}

bool aligned(const void* data, std::int64_t bytes) {
  return reinterpret_cast<std::uintptr_t>(data) % static_cast<std::uintptr_t>(bytes) == 0;
}

// Whether accesses of `n` neighbours along one axis are aligned, in every matrix of the batch.
bool in_steps_of(int n, const void* data, DType t, std::int64_t stride, const Batch& batch,
                 const std::int64_t* strides) {
  bool regular = stride % n == 0 && aligned(data, n * dtype_size(t));
  for (int d = 0; d < batch.rank; ++d) regular = regular && strides[d] % n == 0;
  return regular;
}

// The axes of a matrix of one line, or of one step of K, have no strides of their own.
Major settle(Operand& x, std::int64_t lines, std::int64_t K, DType tile, const Batch& batch,
             const std::int64_t* strides) {
  if (K == 1) x.k_stride = 1;
  if (lines == 1) x.line_stride = 0;
  const Major major = x.k_stride != 1 && x.line_stride == 1 ? Major::line : Major::k;
  const bool dense = major == Major::line || x.k_stride == 1;
  const std::int64_t other = major == Major::line ? x.k_stride : x.line_stride;
  const int n = static_cast<int>(16 / dtype_size(tile));
  const bool as_it_is = x.dtype == tile || dtype_size(tile) == 1;  // bytes of either sign
  x.async = dense && as_it_is && in_steps_of(n, x.data, tile, other, batch, strides);
  return major;
}

Matrix matrix_of(const View& v) {
  Matrix m;
  if (!v) return m;
  m.data = v.data, m.dtype = v.dtype;
  m.row = v.stride[v.rank - 2], m.col = v.stride[v.rank - 1];
  return m;
}

// Neighbouring leading axes along which b stays the same become rows.
void merge_rows(Product& p) {
  Batch& batch = p.batch;
  for (; batch.rank > 0; --batch.rank) {
    const int d = batch.rank - 1;
    const std::int64_t extent = batch.shape[d];
    if (batch.b[d] != 0) break;
    struct Rows {
      std::int64_t& stride;
      std::int64_t step;
      bool present;
    } const rows[] = {{p.a.line_stride, batch.a[d], true},
                      {p.residual.row, batch.residual[d], p.residual.data != nullptr},
                      {p.out.row, batch.out[d], true}};
    bool regular = true;
    for (const Rows& r : rows) {
      if (p.M == 1) r.stride = r.step;  // the row of a matrix of one has no stride of its own
      regular = regular && (!r.present || p.M == 1 || extent == 1 || r.step == p.M * r.stride);
    }
    if (!regular) break;
    p.M *= extent;
  }
}

}  // namespace

Product product_of(const View& a, const View& b, const View& residual, const View& out,
                   DType tile) {
  Product p;
  p.M = a.shape[a.rank - 2], p.K = a.shape[a.rank - 1], p.N = b.shape[b.rank - 1];
  p.a = {a.data, a.dtype, false, a.stride[a.rank - 2], a.stride[a.rank - 1]};
  p.b = {b.data, b.dtype, false, b.stride[b.rank - 1], b.stride[b.rank - 2]};
  p.residual = matrix_of(residual);
  p.out = matrix_of(out);
  Batch& batch = p.batch;
  batch.rank = out.rank - 2;
  for (int d = 0; d < batch.rank; ++d) {
    batch.shape[d] = out.shape[d];
    batch.a[d] = leading_axis(a, d, batch.rank).stride;
    batch.b[d] = leading_axis(b, d, batch.rank).stride;
    batch.residual[d] = residual ? residual.stride[d] : 0;
    batch.out[d] = out.stride[d];
  }
  merge_rows(p);
  for (int d = 0; d < batch.rank; ++d) batch.count *= batch.shape[d];
  p.a_major = settle(p.a, p.M, p.K, tile, batch, batch.a);
  p.b_major = settle(p.b, p.N, p.K, tile, batch, batch.b);
  const auto fours = [&](const Matrix& m, const std::int64_t* strides) {
    return m.data && m.col == 1 &&
           in_steps_of(4, m.data, m.dtype, p.M == 1 ? 0 : m.row, batch, strides);
  };
  p.out.fours = fours(p.out, batch.out);
  p.residual.fours = fours(p.residual, batch.residual);
  return p;
}

void set_bias(Product& p, const View& bias) {
  if (!bias) return;
  p.bias = bias.data, p.bias_dtype = bias.dtype, p.bias_stride = bias.stride[0];
}

unsigned blocks_of(const Product& p, int rows, int columns) {
  const std::int64_t down = (p.M + rows - 1) / rows, across = (p.N + columns - 1) / columns;
  // check_limits names what a grid may be: more than 2^31 - 1 blocks must not wrap around to fewer
  const std::int64_t most = 0x80000000;
  if (down > most / across || down * across > most / p.batch.count) return 0x80000000u;
  return static_cast<unsigned>(down * across * p.batch.count);
}

}  // namespace tilewright::cuda
