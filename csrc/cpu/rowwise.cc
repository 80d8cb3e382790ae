#include "cpu/rowwise.h"

#include <algorithm>
#include <cstdlib>

#include "core/dtype.h"
#include "core/size.h"

namespace tilewright {
namespace {

// Removes axis d of every view by making axis d - 1 that much longer.
void fuse(View& v, int d) {
  v.shape[d - 1] *= v.shape[d];
  v.stride[d - 1] = v.stride[d];
  for (int i = d; i + 1 < v.rank; ++i) {
    v.shape[i] = v.shape[i + 1];
    v.stride[i] = v.stride[i + 1];
  }
  --v.rank;
}

// Axes d - 1 and d are one axis of v: extents of 1 have any stride.
bool fusible(const View& v, int d) {
  return v.shape[d - 1] == 1 || v.shape[d] == 1 || v.stride[d - 1] == v.shape[d] * v.stride[d];
}

void fuse_any(View& v, int d) {
  if (v.shape[d] == 1) v.stride[d] = v.stride[d - 1];
  fuse(v, d);
}

// rows x columns elements of src, `row` and `column` apart, to dst with rows ld apart. The shorter
// stride runs in the inner loop.
template <class From, class To, class Convert>
void copy_strided(const From* src, int64_t row, int64_t column, To* dst, int64_t dst_row,
                  int64_t dst_column, int64_t rows, int64_t columns, Convert convert) {
  const bool rows_inside =
      std::min(std::abs(row), std::abs(dst_row)) < std::min(std::abs(column), std::abs(dst_column));
  if (rows_inside && rows > 1) {
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t i = 0; i < rows; ++i) {
        dst[i * dst_row + j * dst_column] = convert(src[i * row + j * column]);
      }
    }
    return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      dst[i * dst_row + j * dst_column] = convert(src[i * row + j * column]);
    }
  }
}

}  // namespace

Rows::Rows(const View& v, const ElementKernels& kernels, bool packed)
    : view_(v), kernels_(kernels), packed_(packed) {
  if (!v) return;
  if (view_.rank == 0) view_.rank = 1, view_.shape[0] = 1, view_.stride[0] = 1;
  for (int d = view_.rank - 2; d > 0; --d) {
    if (fusible(view_, d)) fuse_any(view_, d);
  }
  C_ = view_.last();
  count_ = 1;
  for (int d = 0; d < view_.rank - 1; ++d) count_ *= view_.shape[d];
  if (C_ == 1) view_.stride[view_.rank - 1] = 1;
}

bool Rows::in_place(const Block& b) const {
  if (view_.dtype != DType::f32 || view_.stride[view_.rank - 1] != 1) return false;
  if (b.rows == 1 || view_.rank == 1) return true;
  return view_.rank == 2 && (!packed_ || view_.stride[0] == b.columns);
}

int64_t Rows::room(int64_t rows, int64_t columns) const {
  if (!view_) return 0;
  return in_place({0, rows, 0, columns}) ? 0 : product_of({rows, columns, 4});
}

int64_t Rows::offset(int64_t row) const {
  int64_t at = 0;
  for (int d = view_.rank - 2; d >= 0; --d) {
    if (d == 0) return at + row * view_.stride[0];
    at += row % view_.shape[d] * view_.stride[d];
    row /= view_.shape[d];
  }
  return at;
}

// f(first, rows, offset) for each run of rows of the block that one stride leads through.
template <class F>
void Rows::for_each_run(const Block& b, F f) const {
  const int64_t extent = view_.rank > 1 ? view_.shape[view_.rank - 2] : 1;
  int64_t run;
  for (int64_t i = 0; i < b.rows; i += run) {
    run = std::min(b.rows - i, extent - (b.row + i) % extent);
    f(i, run, offset(b.row + i) + b.column * view_.stride[view_.rank - 1]);
  }
}

FloatRows Rows::read(const Block& b, float* buffer) const {
  if (!view_) return {nullptr, 0};
  if (in_place(b)) return open(b, buffer);
  const int64_t column = view_.stride[view_.rank - 1];
  const int64_t row = view_.rank > 1 ? view_.stride[view_.rank - 2] : 0;
  for_each_run(b, [&](int64_t first, int64_t rows, int64_t at) {
    float* dst = buffer + first * b.columns;
    with_type(view_.dtype, view_.data, [&](const auto* data) {
      const auto* src = data + at;
      if (view_.dtype == DType::f32 || column != 1) {
        copy_strided(src, row, column, dst, b.columns, 1, rows, b.columns,
                     [](auto x) { return to_float(x); });
        return;
      }
      for (int64_t i = 0; i < rows; ++i) {
        kernels_.widen(view_.dtype, src + i * row, dst + i * b.columns, b.columns);
      }
    });
  });
  return {buffer, b.columns};
}

FloatRows Rows::open(const Block& b, float* buffer) const {
  if (!view_) return {nullptr, 0};
  if (!in_place(b)) return {buffer, b.columns};
  float* data = view_.ptr<float>() + offset(b.row) + b.column;
  return {data, view_.rank > 1 ? view_.stride[0] : 0};
}

void Rows::close(const Block& b, const FloatRows& from) const {
  if (!view_ || in_place(b)) return;
  const int64_t column = view_.stride[view_.rank - 1];
  const int64_t row = view_.rank > 1 ? view_.stride[view_.rank - 2] : 0;
  for_each_run(b, [&](int64_t first, int64_t rows, int64_t at) {
    const float* src = from.data + first * from.ld;
    with_type(view_.dtype, view_.data, [&]<class T>(T* data) {
      T* dst = data + at;
      if (view_.dtype == DType::f32 || column != 1) {
        copy_strided(src, from.ld, 1, dst, row, column, rows, b.columns, from_float<T>);
        return;
      }
      for (int64_t i = 0; i < rows; ++i) {
        kernels_.narrow(view_.dtype, src + i * from.ld, dst + i * row, b.columns);
      }
    });
  });
}

void merge_axes(View* const* views, int count) {
  View& lead = *views[0];
  if (lead.rank == 0) {
    for (int k = 0; k < count; ++k) {
      views[k]->rank = 1, views[k]->shape[0] = 1, views[k]->stride[0] = 1;
    }
    return;
  }
  // Insertion sort, longest stride first: every view's axes move together.
  for (int d = 1; d < lead.rank; ++d) {
    for (int e = d; e > 0 && std::abs(lead.stride[e - 1]) < std::abs(lead.stride[e]); --e) {
      for (int k = 0; k < count; ++k) {
        std::swap(views[k]->shape[e - 1], views[k]->shape[e]);
        std::swap(views[k]->stride[e - 1], views[k]->stride[e]);
      }
    }
  }
  for (int d = lead.rank - 1; d > 0; --d) {
    bool all = true;
    for (int k = 0; all && k < count; ++k) all = fusible(*views[k], d);
    for (int k = 0; all && k < count; ++k) fuse_any(*views[k], d);
  }
}

const float* float_vector(const View& v, int64_t C, float fill, float* buffer,
                          const ElementKernels& kernels) {
  if (!v) {
    std::fill(buffer, buffer + C, fill);
    return buffer;
  }
  return Rows(v, kernels).read({0, 1, 0, C}, buffer).data;
}

}  // namespace tilewright
