// Quantization over any strides: an array is a stack of matrices whose rows are the channels.
//
//   axis kept      rows = that axis                   columns = the densest of the others
//   one scale      rows = any axis, scales combined   columns = the densest axis
//   4 bits                                            columns = the axis of the pairs
//
// What is left over is walked matrix by matrix. A block of rows x columns is one task; a maximum
// does not depend on the order in which it is taken, so neither do the bits. Maxima first, then the
// integers: block by block where a block's rows are whole, else after all maxima.
#include "cpu/quantize.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <span>

#include "core/dtype.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/size.h"

namespace tilewright::cpu {
namespace {

constexpr int64_t kRows = 64;          // rows of a task: whole vectors where lanes are rows
constexpr int64_t kColumns = 1 << 14;  // with kRows about 1 ms
constexpr int64_t kShort = 256;        // of shorter rows, as groups are, a task has more

int64_t blocks(int64_t n, int64_t size) {
  return (n + size - 1) / size;
}

// Extent of one axis, and its strides in the array of floats and in that of bytes.
struct Axis {
  int64_t extent = 1, floats = 0, bytes = 0;
};

// An array and its integers, axis by axis: matrices (rows, cols), one for each index of `outer`.
struct Grid {
  Axis rows, cols;
  Axis outer[kMaxRank];
  int rank = 0;
  int64_t skipped = 0;  // nibbles before column 0 in its byte; blocks begin at whole bytes

  int64_t matrices() const {
    int64_t n = 1;
    for (int d = 0; d < rank; ++d) n *= outer[d].extent;
    return n;
  }
  int64_t elements() const { return matrices() * rows.extent * cols.extent; }
  int64_t height() const {  // of a task
    return kRows * std::max<int64_t>(1, kShort / std::max<int64_t>(1, cols.extent));
  }
  int64_t row_blocks() const { return blocks(rows.extent, height()); }
  int64_t col_blocks() const { return blocks(cols.extent + skipped, kColumns); }
};

// The remaining axis along which the array is densest; an absent one if none remains.
Axis take_densest(Grid& grid) {
  int best = -1;
  for (int d = 0; d < grid.rank; ++d) {
    if (grid.outer[d].extent == 1) continue;
    if (best < 0 || std::abs(grid.outer[d].floats) <= std::abs(grid.outer[best].floats)) best = d;
  }
  if (best < 0) return {};
  const Axis found = grid.outer[best];
  grid.outer[best] = grid.outer[--grid.rank];
  return found;
}

// Whether stepping through `inner` to its end arrives at the next step of `outer`, in both arrays.
bool continues(const Axis& outer, const Axis& inner) {
  return outer.floats == inner.extent * inner.floats && outer.bytes == inner.extent * inner.bytes;
}

Grid grid_of(const View& x, const Integers& q) {
  Grid grid;
  const int along = q.bits == 4 ? q.along : -1;
  bool mergeable = false;
  for (int d = 0; d < x.rank; ++d) {
    const Axis a{x.shape[d], x.stride[d], q.data.stride[d]};
    if (d == q.axis) {
      grid.rows = a;
    } else if (d == along) {
      grid.cols = a;
    } else if (mergeable && continues(grid.outer[grid.rank - 1], a)) {
      grid.outer[grid.rank - 1] = {grid.outer[grid.rank - 1].extent * a.extent, a.floats, a.bytes};
    } else {
      grid.outer[grid.rank++] = a;
    }
    mergeable = d != q.axis && d != along;
  }
  if (along < 0) grid.cols = take_densest(grid);
  if (q.axis < 0) grid.rows = take_densest(grid);
  grid.skipped = along >= 0 && q.high_first;
  return grid;
}

// Block (i, j) of matrix `index` of the array whose strides are meant.
Matrix block(const View& v, const Grid& grid, int64_t Axis::* stride, int64_t index, int64_t i,
             int64_t j) {
  int64_t at = i * grid.rows.*stride + j * grid.cols.*stride;
  for (int d = 0; d < grid.rank; ++d) {
    at += index % grid.outer[d].extent * grid.outer[d].*stride;
    index /= grid.outer[d].extent;
  }
  return {v.ptr<char>() + at * dtype_size(v.dtype), v.dtype, grid.rows.*stride, grid.cols.*stride};
}

// The bytes in which column j's nibbles begin.
Matrix nibbles(const View& v, const Grid& grid, int64_t index, int64_t i, int64_t j) {
  return block(v, grid, &Axis::bytes, index, i, (j + grid.skipped) / 2);
}

// body(matrix, i, rows, j, cols) for every block, in parallel.
template <class Body>
void for_blocks(const Grid& grid, double ns_per_element, const Body& body) {
  const int64_t row_blocks = grid.row_blocks(), col_blocks = grid.col_blocks();
  const int64_t matrices = grid.matrices(), height = grid.height();
  const double work = double(grid.elements()) * ns_per_element;
  const double per_matrix =
      100 + work / double(std::max<int64_t>(1, row_blocks * col_blocks * matrices));
  parallel_for(row_blocks * col_blocks, work, [&](int64_t t) {
    const int64_t i = t % row_blocks * height, end = (t / row_blocks + 1) * kColumns - grid.skipped;
    const int64_t j = std::max<int64_t>(end - kColumns, 0);
    for (int64_t m = 0; m < matrices; ++m) {
      body(m, i, std::min(height, grid.rows.extent - i), j, std::min(end, grid.cols.extent) - j);
      poll_after(per_matrix);
    }
  });
}

float larger(float a, float b) {
  return a > b || a != a ? a : b;
}
float smaller(float a, float b) {
  return a < b || a != a ? a : b;
}

// A number found for each row: folded from its start by a kernel, and from parts of a row by pick.
struct Fold {
  void (*kernel)(const Matrix& x, int64_t rows, int64_t cols, float* found);
  float start;
  float (*pick)(float, float);
  float* found;
};

// Over all matrices and columns.
void fold_rows(const View& x, const Grid& grid, const Fold& fold) {
  const int64_t rows = grid.rows.extent, col_blocks = grid.col_blocks();
  const Scratch scratch(product_of({rows, col_blocks, 4}));  // (col_blocks, rows)
  const auto partial = scratch.as<float>();
  std::fill(partial, partial + rows * col_blocks, fold.start);
  for_blocks(grid, 0.1, [&](int64_t m, int64_t i, int64_t mr, int64_t j, int64_t nc) {
    fold.kernel(block(x, grid, &Axis::floats, m, i, j), mr, nc,
                partial + (j + grid.skipped) / kColumns * rows + i);
  });
  std::fill(fold.found, fold.found + rows, fold.start);
  for (int64_t t = 0; t < rows * col_blocks; ++t) {
    fold.found[t % rows] = fold.pick(fold.found[t % rows], partial[t]);
  }
}

// One scale for each row of the grid: the array's own, or its one number repeated.
void spread(const View& scale, int64_t rows, float* out) {
  for (int64_t i = 0; i < rows; ++i)
    out[i] = scale.ptr<float>()[scale.rank ? i * scale.stride[0] : 0];
}

}  // namespace

float scale_of(float range, float levels) {
  const float scale = range / levels;
  return scale == 0.0f ? 1.0f : scale;
}

namespace {

// One for all rows, in place; also where there are no rows.
void share(const Fold& fold, int64_t rows) {
  float all = fold.start;
  for (int64_t i = 0; i < rows; ++i) all = fold.pick(all, fold.found[i]);
  std::fill(fold.found, fold.found + std::max<int64_t>(rows, 1), all);
}

// A number for each row into the array that keeps them, or the one that all rows share.
void keep(const float* found, int64_t rows, const View& v) {
  if (v.rank == 0) {
    *v.ptr<float>() = found[0];
  } else {
    for (int64_t i = 0; i < rows; ++i) v.ptr<float>()[i * v.stride[0]] = found[i];
  }
}

}  // namespace

void quantize(const View& x, const Integers& q, const QuantizeKernels& kernels) {
  const Grid grid = grid_of(x, q);
  const int64_t rows = grid.rows.extent, count = std::max<int64_t>(rows, 1);
  const int64_t bytes = product_of({count, 4});
  const Scratch scratch(bytes), scratch_low(bytes), scratch_high(bytes);
  const auto scales = scratch.as<float>(), low = scratch_low.as<float>();
  const auto high = q.offset ? scratch_high.as<float>() : scales;
  const float top = float((1 << (q.bits - (q.offset ? 0 : 1))) - 1);
  const float start = x.size() ? std::numeric_limits<float>::infinity() : 0.0f;
  const Fold magnitude{kernels.amax, 0.0f, larger, scales};
  const Fold range[] = {{kernels.low, start, smaller, low}, {kernels.high, -start, larger, high}};
  const std::span<const Fold> folds = q.offset ? std::span(range) : std::span(&magnitude, 1);
  const Levels levels{q.offset ? 0.0f : -top, top};
  const auto set_scales = [&](int64_t i, int64_t n) {
    for (; n > 0; --n, ++i) scales[i] = scale_of(q.offset ? high[i] - low[i] : scales[i], top);
  };
  const auto round = [&](int64_t m, int64_t i, int64_t mr, int64_t j, int64_t nc) {
    const Matrix from = block(x, grid, &Axis::floats, m, i, j);
    const float* const offsets = q.offset ? low + i : nullptr;
    if (q.bits == 8) {
      kernels.quantize(from, mr, nc, scales + i, offsets, levels,
                       block(q.data, grid, &Axis::bytes, m, i, j));
    } else {
      kernels.quantize_nibbles(from, mr, nc, scales + i, offsets, levels,
                               nibbles(q.data, grid, m, i, j), q.high_first && j == 0);
    }
  };
  if (q.axis >= 0 && grid.matrices() == 1 && grid.col_blocks() == 1) {
    // A task's rows are whole: it rounds them while they are in L2.
    for_blocks(grid, 0.3, [&](int64_t m, int64_t i, int64_t mr, int64_t j, int64_t nc) {
      for (const Fold& fold : folds) {
        std::fill(fold.found + i, fold.found + i + mr, fold.start);
        fold.kernel(block(x, grid, &Axis::floats, m, i, j), mr, nc, fold.found + i);
      }
      set_scales(i, mr);
      round(m, i, mr, j, nc);
    });
  } else {
    for (const Fold& fold : folds) {
      fold_rows(x, grid, fold);
      if (q.axis < 0) share(fold, rows);
    }
    set_scales(0, count);
    for_blocks(grid, 0.2, round);
  }
  keep(scales, rows, q.scale);
  if (q.offset) keep(low, rows, q.offset);
}

void dequantize(const Integers& q, const View& out, const QuantizeKernels& kernels) {
  const Grid grid = grid_of(out, q);
  const int64_t rows = grid.rows.extent;
  const Scratch scratch(product_of({rows, 4}));
  const Scratch scratch_offset(q.offset ? product_of({rows, 4}) : 0);
  const auto scales = scratch.as<float>(), offsets = scratch_offset.as<float>();
  spread(q.scale, rows, scales);
  if (q.offset) spread(q.offset, rows, offsets);
  for_blocks(grid, 0.05, [&](int64_t m, int64_t i, int64_t mr, int64_t j, int64_t nc) {
    const Matrix to = block(out, grid, &Axis::floats, m, i, j);
    const float* const block_offsets = q.offset ? offsets + i : nullptr;
    if (q.bits == 8) {
      kernels.dequantize(block(q.data, grid, &Axis::bytes, m, i, j), mr, nc, scales + i,
                         block_offsets, to);
    } else {
      kernels.dequantize_nibbles(nibbles(q.data, grid, m, i, j), mr, nc, scales + i, block_offsets,
                                 to, q.high_first && j == 0);
    }
  });
}

void quantize_rows(const View& x, int8_t* data, float* scale, const QuantizeKernels& kernels) {
  const int64_t row_axis = x.rank - 2, K = x.last(), per_matrix = x.shape[row_axis];
  const int64_t row_blocks = blocks(per_matrix, kRows);
  int64_t rows = 1;
  for (int d = 0; d <= row_axis; ++d) rows *= x.shape[d];
  if (rows == 0) return;
  parallel_for(rows / per_matrix * row_blocks, double(x.size()) * 0.25, [&](int64_t t) {
    const int64_t first = t % row_blocks * kRows;
    const int64_t count = std::min(kRows, per_matrix - first);
    int64_t at = first * x.stride[row_axis], index = t / row_blocks;
    const int64_t row = index * per_matrix + first;
    for (int d = x.rank - 3; d >= 0; --d) {
      at += index % x.shape[d] * x.stride[d];
      index /= x.shape[d];
    }
    const Matrix source{x.ptr<char>() + at * dtype_size(x.dtype), x.dtype, x.stride[row_axis],
                        x.stride[x.rank - 1]};
    std::fill(scale + row, scale + row + count, 0.0f);
    kernels.amax(source, count, K, scale + row);
    for (int64_t i = row; i < row + count; ++i) scale[i] = scale_of(scale[i], 127.0f);
    kernels.quantize(source, count, K, scale + row, nullptr, {-127.0f, 127.0f},
                     {data + row * K, DType::s8, K, 1});
  });
}

}  // namespace tilewright::cpu
