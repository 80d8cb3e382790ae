#include "cpu/layernorm.h"

#include <algorithm>

#include "core/parallel.h"
#include "core/scratch.h"
#include "core/size.h"
#include "cpu/elementwise.h"
#include "cpu/rowwise.h"

namespace tilewright {
namespace {

constexpr int64_t kForwardElements = 16384;   // a task's rows: 64 KiB of each array, about 5 us
constexpr int64_t kBackwardElements = 32768;  // three arrays of 128 KiB, read twice: L2

Block row_block(int64_t i, int64_t height, int64_t rows, int64_t C) {
  return {i * height, std::min(height, rows - i * height), 0, C};
}

void store_vector(const View& v, const float* from, int64_t C, const KernelTable& table) {
  if (!v) return;
  const Rows to(v, table.element);
  const Block all{0, 1, 0, C};
  const FloatRows place = to.open(all, const_cast<float*>(from));
  if (place.data != from) std::copy(from, from + C, place.data);
  to.close(all, place);
}

}  // namespace

void layernorm_forward(const LayernormForward& op, const KernelTable& table) {
  const Rows x(op.x, table.element), residual(op.residual, table.element);
  const Rows y(op.y, table.element), s(op.s, table.element);
  const int64_t C = x.C(), rows = x.count();
  const int64_t height = rows_per_block(C, kForwardElements, kMaxLayernormRows);
  const Scratch vectors(product_of({2, C, 4}));
  const float* gamma = float_vector(op.gamma, C, 1.0f, vectors.as<float>(), table.element);
  const float* beta = float_vector(op.beta, C, 0.0f, vectors.as<float>() + C, table.element);
  const int64_t blocks = (rows + height - 1) / height;
  parallel_for(blocks, 0.15 * double(rows) * double(C), [&](int64_t i) {
    const Block b = row_block(i, height, rows, C);
    const Scratch x_room(x.room(b.rows, C)), r_room(residual.room(b.rows, C));
    const Scratch y_room(y.room(b.rows, C)), s_room(s.room(b.rows, C));
    float statistics[2][kMaxLayernormRows];
    LayernormForwardRows p{};
    p.centred = op.centred, p.rows = b.rows, p.C = C;
    p.gamma = gamma, p.beta = beta, p.eps = op.eps;
    p.s_dtype = op.s.dtype;
    const FloatRows from = x.read(b, x_room.as<float>());
    const FloatRows add = residual.read(b, r_room.as<float>());
    const FloatRows to = y.open(b, y_room.as<float>()), sum = s.open(b, s_room.as<float>());
    p.x = from.data, p.ldx = from.ld, p.residual = add.data, p.ldr = add.ld;
    p.past_caches = past_caches(op.y), p.y = to.data, p.ldy = to.ld, p.s = sum.data, p.lds = sum.ld;
    p.mean = op.mean ? op.mean.ptr<float>() + b.row : statistics[0];
    p.rstd = op.rstd ? op.rstd.ptr<float>() + b.row : statistics[1];
    table.layernorm.forward(p);
    y.close(b, to);
    s.close(b, sum);
  });
}

void layernorm_backward(const LayernormBackward& op, const KernelTable& table) {
  const Rows s(op.s, table.element), dy(op.dy, table.element), ds(op.ds, table.element);
  const Rows dx(op.dx, table.element);
  const int64_t C = s.C(), rows = s.count();
  const int64_t height =
      std::max<int64_t>(8, rows_per_block(C, kBackwardElements, kMaxLayernormRows));
  const int64_t blocks = (rows + height - 1) / height;
  const Scratch vector(product_of({3, C, 4})), partial(product_of({2, blocks, C, 4}));
  const float* gamma = float_vector(op.gamma, C, 1.0f, vector.as<float>(), table.element);
  parallel_for(blocks, 0.27 * double(rows) * double(C), [&](int64_t i) {
    const Block b = row_block(i, height, rows, C);
    const Scratch s_room(s.room(b.rows, C)), dy_room(dy.room(b.rows, C));
    const Scratch ds_room(ds.room(b.rows, C)), dx_room(dx.room(b.rows, C));
    LayernormBackwardRows p{};
    const FloatRows from = s.read(b, s_room.as<float>()), up = dy.read(b, dy_room.as<float>());
    const FloatRows also = ds.read(b, ds_room.as<float>());
    const FloatRows to = dx.open(b, dx_room.as<float>());
    p.rows = b.rows, p.C = C, p.gamma = gamma;
    p.s = from.data, p.lds = from.ld, p.dy = up.data, p.ldy = up.ld;
    p.ds = also.data, p.ldds = also.ld, p.dx = to.data, p.ldx = to.ld;
    p.mean = op.mean ? op.mean.ptr<float>() + b.row : nullptr;
    p.rstd = op.rstd.ptr<float>() + b.row;
    p.dgamma = partial.as<float>() + 2 * i * C, p.dbeta = p.dgamma + C;
    table.layernorm.backward(p);
    dx.close(b, to);
  });
  if (!op.dgamma && !op.dbeta) return;
  float* sums = vector.as<float>() + C;  // (2, C)
  View both;
  both.data = partial.as<float>(), both.dtype = DType::f32, both.present = true, both.rank = 2;
  both.shape[0] = blocks, both.shape[1] = 2 * C, both.stride[0] = 2 * C, both.stride[1] = 1;
  sum_rows(Rows(both, table.element), sums, table);
  store_vector(op.dgamma, sums, C, table);
  store_vector(op.dbeta, sums + C, C, table);
}

}  // namespace tilewright
