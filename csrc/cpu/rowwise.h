// Any view as blocks of float32 rows: what stands between strided arrays of any float dtype and
// kernels that know contiguous float32 alone.
//
//     Rows x(view, table);                        // (rows, C): the leading axes, and the last
//     Scratch room(x.room(block));
//     FloatRows f = x.read(block, room.as<float>());   // in place where memory is already like
//     that
//
// For outputs: open() gives the place to write to, close() rounds and scatters it.
#pragma once
#include <initializer_list>

#include "core/parallel.h"
#include "cpu/kernel_table.h"
#include "tilewright/view.h"

namespace tilewright {

// Rows [row, row + rows), columns [column, column + columns) of a matrix.
struct Block {
  int64_t row, rows, column, columns;
};

struct FloatRows {
  float* data;  // nullptr for an absent view
  int64_t ld;   // between rows, in elements
};

class Rows {
 public:
  // An absent view has nothing to read, write or convert. `packed`: blocks are always contiguous.
  Rows(const View& v, const ElementKernels& kernels, bool packed = false);

  int64_t count() const { return count_; }
  int64_t C() const { return C_; }
  // Bytes of scratch that blocks of this size need: 0 where they are used in place.
  int64_t room(int64_t rows, int64_t columns) const;
  FloatRows read(const Block& b, float* buffer) const;
  FloatRows open(const Block& b, float* buffer) const;
  void close(const Block& b, const FloatRows& rows) const;

 private:
  bool in_place(const Block& b) const;
  int64_t offset(int64_t row) const;
  template <class F>
  void for_each_run(const Block& b, F f) const;

  View view_;  // leading axes merged as far as strides allow; the last axis is the row
  const ElementKernels& kernels_;
  bool packed_;
  int64_t count_ = 0, C_ = 0;
};

// Whether an output is so large that what of it stays in the caches is not worth what its lines cost
// there: each is read before it is written. No cache of a core's share keeps 64 MB; below, the next op
// often finds the end of it (at 32 MB streaming lost up to 30 %, from 64 MB on it won 10 to 30 %).
inline bool past_caches(const View& out) {
  return out.dtype == DType::f32 && out.size() >= (int64_t{16} << 20);
}

// Rows per task: about `elements` of them, from C alone, so that blocks never depend on threads.
inline int64_t rows_per_block(int64_t C, int64_t elements, int64_t most) {
  const int64_t rows = C > 0 ? elements / C : most;
  return rows < 1 ? 1 : rows > most ? most : rows;
}

// body(block) in parallel over whole rows, about `elements` elements or one row each: some us.
template <class Body>
void for_row_blocks(int64_t rows, int64_t C, int64_t elements, double ns_per_element,
                    const Body& body) {
  const int64_t height = rows_per_block(C, elements, 256);
  parallel_for((rows + height - 1) / height, ns_per_element * double(rows) * double(C),
               [&](int64_t i) {
                 const int64_t row = i * height, left = rows - row;
                 body(Block{row, left < height ? left : height, 0, C});
               });
}

// A matrix cut into blocks of about `elements` elements, whole rows where a row is shorter.
class Tiling {
 public:
  Tiling(int64_t rows, int64_t C, int64_t elements)
      : rows_(rows),
        C_(C),
        width_(C < elements ? C : elements),
        height_(rows_per_block(C, elements, rows)),
        across_(C > 0 ? (C + width_ - 1) / width_ : 0) {}
  int64_t count() const { return height_ > 0 ? across_ * ((rows_ + height_ - 1) / height_) : 0; }
  int64_t rows() const { return height_; }  // of the largest block
  int64_t columns() const { return width_; }
  Block operator[](int64_t i) const {
    const int64_t row = i / across_ * height_, column = i % across_ * width_;
    const int64_t rows = rows_ - row, columns = C_ - column;
    return {row, rows < height_ ? rows : height_, column, columns < width_ ? columns : width_};
  }

 private:
  int64_t rows_, C_, width_, height_, across_;
};

// Views of one shape for a walk over their elements in any order: axes sorted by the strides of
// views[0] and merged where every view allows it. An axis of extent 1 is left if there is no other.
void merge_axes(View* const* views, int count);

// gamma, beta, bias (C,) as contiguous float32: in place, or in buffer (C floats); absent: `fill`.
const float* float_vector(const View& v, int64_t C, float fill, float* buffer,
                          const ElementKernels& kernels);

}  // namespace tilewright
