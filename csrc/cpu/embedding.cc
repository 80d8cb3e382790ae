#include "cpu/embedding.h"

#include <algorithm>
#include <cstring>

#include "core/parallel.h"
#include "core/scratch.h"
#include "core/size.h"
#include "cpu/rowwise.h"

namespace tilewright {
namespace {

constexpr int64_t kElements = 16384;  // of a forward task
constexpr int64_t kIds = 8;           // of a backward task: frequent ids often are neighbours
constexpr int64_t kColumns = 256;     // of a backward task: a very frequent id is split this way

// Where both sides have the same dtype and contiguous rows, and y is one block of them.
bool plain(const EmbeddingForward& op) {
  return op.table.dtype == op.y.dtype && op.y.contiguous() && op.table.stride[1] == 1;
}

void copy_rows(const EmbeddingForward& op, const int64_t* ids, int64_t first, int64_t last) {
  const int64_t size = dtype_size(op.y.dtype), C = op.table.shape[1];
  char* to = op.y.ptr<char>() + first * C * size;
  for (int64_t r = first; r < last; ++r, to += C * size) {
    std::memcpy(to, op.table.ptr<char>() + ids[r] * op.table.stride[0] * size, size_t(C * size));
  }
}

}  // namespace

void embedding_forward(const EmbeddingForward& op, const int64_t* ids, const KernelTable& table) {
  const Rows from(op.table, table.element), to(op.y, table.element);
  const int64_t C = to.C(), rows = to.count();
  const int64_t height = rows_per_block(C, kElements, 256);
  parallel_for((rows + height - 1) / height, 0.06 * double(rows) * double(C), [&](int64_t i) {
    const int64_t last = std::min(rows, (i + 1) * height);
    if (plain(op)) return copy_rows(op, ids, i * height, last);
    const Scratch from_room(from.room(1, C)), to_room(to.room(1, C));
    for (int64_t r = i * height; r < last; ++r) {
      const Block b{r, 1, 0, C};
      const FloatRows row = from.read({ids[r], 1, 0, C}, from_room.as<float>());
      const FloatRows place = to.open(b, to_room.as<float>());
      std::memcpy(place.data, row.data, size_t(C) * 4);
      to.close(b, place);
    }
  });
}

// Positions are sorted by id, counting and stable, so that each id's rows are added in ascending
// order by one task, whichever it is.
void embedding_backward(const EmbeddingBackward& op, const int64_t* ids, const KernelTable& table) {
  const Rows dy(op.dy, table.element), to(op.dtable, table.element);
  const int64_t C = to.C(), V = to.count(), rows = dy.count();
  const Scratch start_room(product_of({V + 1, 8})), order_room(product_of({rows, 8}));
  int64_t* start = start_room.as<int64_t>();  // start[v]: the first of id v's places in `order`
  int64_t* order = order_room.as<int64_t>();
  std::fill(start, start + V + 1, int64_t(0));
  for (int64_t i = 0; i < rows; ++i) ++start[ids[i] + 1];
  for (int64_t v = 0; v < V; ++v) start[v + 1] += start[v];
  for (int64_t i = 0; i < rows; ++i) order[start[ids[i]]++] = i;
  // Each start has run up to its successor's: id v's places are now [start[v - 1], start[v]).
  const int64_t groups = (V + kIds - 1) / kIds, strips = (C + kColumns - 1) / kColumns;
  const double work = 0.12 * double(rows + V) * double(C);
  parallel_for(groups * strips, work, [&](int64_t task) {
    const int64_t column = task % strips * kColumns, columns = std::min(kColumns, C - column);
    const int64_t first = task / strips * kIds, last = std::min(V, first + kIds);
    const Scratch dy_room(dy.room(1, columns)), to_room(to.room(1, columns));
    for (int64_t v = first; v < last; ++v) {
      const Block b{v, 1, column, columns};
      const FloatRows sum = to.open(b, to_room.as<float>());
      std::fill(sum.data, sum.data + columns, 0.0f);
      for (int64_t k = v ? start[v - 1] : 0; k < start[v]; ++k) {
        const Block row{order[k], 1, column, columns};
        table.element.add(dy.read(row, dy_room.as<float>()).data, sum.data, columns);
      }
      to.close(b, sum);
    }
  });
}

}  // namespace tilewright
