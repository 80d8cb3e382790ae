#include "cpu/elementwise.h"

#include <string.h>

#include "core/parallel.h"
#include "core/scratch.h"
#include "core/size.h"

namespace tilewright {
namespace {

constexpr int64_t kElements = 8192;  // of a task: some us, and 32 KiB of each operand
constexpr int64_t kSumRows = 64;     // the longest chain of additions
constexpr int64_t kSumColumns = 2048;

double ns_per_element(Activation kind) {
  return kind == Activation::relu ? 0.08 : 0.25;
}

// relu's tasks would be shorter than what a task costs (of 6 MB in L3, 10 % of the time).
int64_t elements_per_task(Activation kind) {
  return kind == Activation::relu ? 4 * kElements : kElements;
}

}  // namespace

void activation_forward(const ActivationForward& op, const KernelTable& table) {
  View x = op.x, y = op.y;
  View* const views[] = {&y, &x};
  merge_axes(views, 2);
  const Rows xs(x, table.element, true), ys(y, table.element, true);
  const Tiling tiles(ys.count(), ys.C(), elements_per_task(op.activation));
  const double work = double(op.x.size()) * ns_per_element(op.activation);
  parallel_for(tiles.count(), work, [&](int64_t i) {
    const Block b = tiles[i];
    const Scratch x_room(xs.room(b.rows, b.columns)), y_room(ys.room(b.rows, b.columns));
    const FloatRows to = ys.open(b, y_room.as<float>());
    table.element.activate(op.activation, xs.read(b, x_room.as<float>()).data, to.data,
                           b.rows * b.columns, past_caches(op.y));
    ys.close(b, to);
  });
}

void activation_backward(const ActivationBackward& op, const KernelTable& table) {
  View x = op.x, dy = op.dy, dx = op.dx;
  View* const views[] = {&dx, &x, &dy};
  merge_axes(views, 3);
  const Rows xs(x, table.element, true), dys(dy, table.element, true), dxs(dx, table.element, true);
  const Tiling tiles(dxs.count(), dxs.C(), elements_per_task(op.activation));
  const double work = 1.5 * double(op.x.size()) * ns_per_element(op.activation);
  parallel_for(tiles.count(), work, [&](int64_t i) {
    const Block b = tiles[i];
    const Scratch x_room(xs.room(b.rows, b.columns)), dy_room(dys.room(b.rows, b.columns));
    const Scratch dx_room(dxs.room(b.rows, b.columns));
    const FloatRows to = dxs.open(b, dx_room.as<float>());
    table.element.activate_backward(op.activation, xs.read(b, x_room.as<float>()).data,
                                    dys.read(b, dy_room.as<float>()).data, to.data,
                                    b.rows * b.columns, past_caches(op.dx));
    dxs.close(b, to);
  });
}

// A block of a, converted to out's dtype on its only way through the registers.
void copy_block(const Rows& a, const Rows& out, const Block& block, float* room) {
  const FloatRows to = out.open(block, room), from = a.read(block, to.data);
  if (from.data != to.data && to.data != room) {
    memcpy(to.data, from.data, size_t(block.rows * block.columns) * sizeof(float));
  }
  out.close(block, from);
}

void sum(const Sum& op, const KernelTable& table) {
  View a = op.a, b = op.b, out = op.out;
  View* const views[] = {&out, &a, &b};
  merge_axes(views, op.b ? 3 : 2);
  const Rows as(a, table.element, true), bs(op.b ? b : a, table.element, true);
  const Rows outs(out, table.element, true);
  const Tiling tiles(outs.count(), outs.C(), kElements);
  parallel_for(tiles.count(), 0.1 * double(op.a.size()), [&](int64_t i) {
    const Block block = tiles[i];
    const Scratch out_room(outs.room(block.rows, block.columns));
    if (!op.b) return copy_block(as, outs, block, out_room.as<float>());
    const Scratch a_room(as.room(block.rows, block.columns));
    const Scratch b_room(bs.room(block.rows, block.columns));
    const FloatRows to = outs.open(block, out_room.as<float>());
    const float* const left = as.read(block, a_room.as<float>()).data;
    const float* const right = bs.read(block, b_room.as<float>()).data;
    const int64_t count = block.rows * block.columns;
    if (left == to.data) {
      table.element.add(right, to.data, count);
    } else {
      for (int64_t e = 0; e < count; ++e) to.data[e] = left[e] + right[e];
    }
    outs.close(block, to);
  });
}

void sum_rows(const Rows& x, float* out, const KernelTable& table) {
  const int64_t rows = x.count(), C = x.C();
  const int64_t blocks = rows > kSumRows ? (rows + kSumRows - 1) / kSumRows : 1;
  const int64_t strips = (C + kSumColumns - 1) / kSumColumns;
  const Scratch partial(blocks > 1 ? product_of({blocks, C, 4}) : 0);
  float* sums = blocks > 1 ? partial.as<float>() : out;
  parallel_for(blocks * strips, 0.08 * double(rows) * double(C), [&](int64_t i) {
    const int64_t row = i / strips * kSumRows, column = i % strips * kSumColumns;
    const Block b{row, rows - row < kSumRows ? rows - row : kSumRows, column,
                  C - column < kSumColumns ? C - column : kSumColumns};
    const Scratch room(x.room(b.rows, b.columns));
    const FloatRows from = x.read(b, room.as<float>());
    table.element.sum_rows(from.data, from.ld, b.rows, b.columns, sums + i / strips * C + column);
  });
  if (blocks == 1) return;
  View next;
  next.data = sums, next.dtype = DType::f32, next.present = true, next.rank = 2;
  next.shape[0] = blocks, next.shape[1] = C, next.stride[0] = C, next.stride[1] = 1;
  sum_rows(Rows(next, table.element), out, table);
}

}  // namespace tilewright
