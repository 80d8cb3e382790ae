#include "cpu/dropout.h"

#include <cmath>

#include "core/parallel.h"
#include "core/scratch.h"
#include "cpu/rowwise.h"

namespace tilewright {
namespace {

constexpr int64_t kElements = 8192;  // of a task, about 5 us

}  // namespace

DropoutRule dropout_rule(double p, uint64_t seed) {
  const double threshold = std::nearbyint(p * 4294967296.0);
  if (threshold > 4294967295.0) return {seed, UINT32_MAX, 0.0f};
  return {seed, uint32_t(threshold), float(1.0 / (1.0 - p))};
}

// A block is whole rows or a part of one, hence a run of elements in row-major order.
void dropout(const Dropout& op, const KernelTable& table) {
  const DropoutRule rule = dropout_rule(op.p, op.seed);
  const Rows x(op.x, table.element, true), y(op.y, table.element, true);
  const Tiling tiles(y.count(), y.C(), kElements);
  parallel_for(tiles.count(), 0.6 * double(op.x.size()), [&](int64_t i) {
    const Block b = tiles[i];
    const Scratch x_room(x.room(b.rows, b.columns)), y_room(y.room(b.rows, b.columns));
    const FloatRows to = y.open(b, y_room.as<float>());
    table.dropout.apply(rule, uint64_t(b.row * y.C() + b.column),
                        x.read(b, x_room.as<float>()).data, to.data, b.rows * b.columns);
    y.close(b, to);
  });
}

}  // namespace tilewright
