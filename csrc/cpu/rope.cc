#include "cpu/rope.h"

#include <algorithm>

#include "core/scratch.h"
#include "cpu/rowwise.h"

namespace tilewright {
void rope(const Rope& op, const KernelTable& table) {
  const Rows x(op.x, table.element), y(op.y, table.element);
  const Rows cos(op.cos, table.element), sin(op.sin, table.element);
  const int64_t D = x.C(), half = cos.C(), rows = x.count();
  const int64_t T = op.cos.shape[op.cos.rank - 2];
  const int64_t sequence = op.cos.rank == 3 ? rows / op.x.shape[0] : rows;  // rows of one table
  // The tables as float32 rows: in place, or converted once, as every head reads them.
  const Block all{0, cos.count(), 0, half};
  const Scratch cos_room(cos.room(all.rows, half)), sin_room(sin.room(all.rows, half));
  const FloatRows c = cos.read(all, cos_room.as<float>()), s = sin.read(all, sin_room.as<float>());
  const auto rotate = op.interleaved ? table.rope.interleaved : table.rope.halves;
  const float sign = op.inverse ? -1.0f : 1.0f;
  for_row_blocks(rows, D, 8192, 0.5, [&](const Block& b) {
    const Scratch x_room(x.room(b.rows, D)), y_room(y.room(b.rows, D));
    const FloatRows from = x.read(b, x_room.as<float>()), to = y.open(b, y_room.as<float>());
    for (int64_t r = 0; r < b.rows; ++r) {
      const int64_t row = b.row + r, at = row / sequence * T + row % T;
      const float* source = from.data + r * from.ld;
      float* target = to.data + r * to.ld;
      rotate(source, c.data + at * c.ld, s.data + at * s.ld, sign, half, target);
      if (target != source) std::copy(source + 2 * half, source + D, target + 2 * half);
    }
    y.close(b, to);
  });
}

}  // namespace tilewright
