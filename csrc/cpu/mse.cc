#include "cpu/mse.h"

#include <limits>

#include "core/dtype.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "cpu/rowwise.h"

namespace tilewright {
namespace {

constexpr int64_t kElements = 16384;  // of a task: about 2 us, and 64 KiB of each operand

// body(i, block) for blocks of consecutive elements, row-major; their number follows from the shape
// alone.
template <class Body>
void for_blocks(const Tiling& tiles, double elements, const Body& body) {
  parallel_for(tiles.count(), 0.14 * elements, [&](int64_t i) { body(i, tiles[i]); });
}

}  // namespace

// Sums of blocks are added up in their order, whoever made them.
void mse_forward(const MseForward& op, const KernelTable& table) {
  const Rows x(op.x, table.element, true), y(op.y, table.element, true);
  const Tiling tiles(x.count(), x.C(), kElements);
  const double n = double(op.x.size());
  if (op.reduction == Reduction::none) {
    const Rows loss(op.loss, table.element, true);
    for_blocks(tiles, n, [&](int64_t, const Block& b) {
      const Scratch x_room(x.room(b.rows, b.columns)), y_room(y.room(b.rows, b.columns));
      const Scratch room(loss.room(b.rows, b.columns));
      const FloatRows to = loss.open(b, room.as<float>());
      table.mse.squares(x.read(b, x_room.as<float>()).data, y.read(b, y_room.as<float>()).data,
                        b.rows * b.columns, to.data);
      loss.close(b, to);
    });
    return;
  }
  const Scratch partial(tiles.count() * 8);
  double* sums = partial.as<double>();
  for_blocks(tiles, n, [&](int64_t i, const Block& b) {
    const Scratch x_room(x.room(b.rows, b.columns)), y_room(y.room(b.rows, b.columns));
    sums[i] = table.mse.sum(x.read(b, x_room.as<float>()).data, y.read(b, y_room.as<float>()).data,
                            b.rows * b.columns);
  });
  double total = 0;
  for (int64_t i = 0; i < tiles.count(); ++i) total += sums[i];
  if (op.reduction == Reduction::mean) {
    total = n > 0 ? total / n : std::numeric_limits<double>::quiet_NaN();
  }
  *op.loss.ptr<float>() = float(total);
}

void mse_backward(const MseBackward& op, const KernelTable& table) {
  const Rows x(op.x, table.element, true), y(op.y, table.element, true);
  const Rows dx(op.dx, table.element, true);
  const bool one = op.dloss.rank == 0;
  const Rows dloss(one ? View{} : op.dloss, table.element, true);
  const float scale = op.scale * (one ? load_float(op.dloss.data, 0, op.dloss.dtype) : 1.0f);
  const Tiling tiles(x.count(), x.C(), kElements);
  for_blocks(tiles, double(op.x.size()), [&](int64_t, const Block& b) {
    const Scratch x_room(x.room(b.rows, b.columns)), y_room(y.room(b.rows, b.columns));
    const Scratch dx_room(dx.room(b.rows, b.columns)), up_room(dloss.room(b.rows, b.columns));
    const FloatRows to = dx.open(b, dx_room.as<float>());
    table.mse.backward(x.read(b, x_room.as<float>()).data, y.read(b, y_room.as<float>()).data,
                       dloss.read(b, up_room.as<float>()).data, scale, b.rows * b.columns, to.data);
    dx.close(b, to);
  });
}

}  // namespace tilewright
