// loss = sum over classes of q (lse - x), dx = scale (sum(q) softmax(x) - q). A class counts
//
//   ids             q = keep weight at the target, and spread weight at every class
//   probabilities   q = weight (keep target + spread)        keep = 1 - smoothing, spread = smoothing / C
//
// Where spread is 0, an id's row takes one class alone and never multiplies the others by 0.
#include "cpu/cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/dtype.h"
#include "core/scratch.h"
#include "core/size.h"
#include "cpu/rowwise.h"

namespace tilewright {
namespace {

// Element i of v in row-major order.
int64_t element_offset(const View& v, int64_t i) {
  int64_t at = 0;
  for (int d = v.rank - 1; d >= 0; --d) {
    at += i % v.shape[d] * v.stride[d];
    i /= v.shape[d];
  }
  return at;
}

// What the classes count.
class Shares {
 public:
  Shares(const View& target, const int64_t* ids, const View& weight, float smoothing, int64_t C,
         const KernelTable& table)
      : table_(table),
        ids_(ids),
        target_(ids ? View{} : target, table.element),
        C_(C),
        keep_(1.0f - smoothing),
        spread_(C > 0 ? smoothing / float(C) : 0.0f),
        room_(product_of({2, C, 4})),
        weight_(weight ? float_vector(weight, C, 1.0f, room_.as<float>(), table.element)
                       : nullptr) {
    if (ids && spread_ > 0) base_ = room_.as<float>() + C;
    if (base_) base_sum_ = table.softmax.soft_targets(nullptr, weight_, C, keep_, spread_, base_);
  }

  // Of one row: q where every class counts, else nullptr; `at` a class that counts `own` more.
  struct Row {
    const float* q;
    float sum;  // of q and own
    int64_t at;
    float own;
  };
  // Bytes of scratch that a block of so many rows needs.
  int64_t room(int64_t rows) const {
    return ids_ ? 0 : product_of({C_, 4}) + target_.room(rows, C_);
  }
  // body(i, row) for the rows of a block that count.
  template <class Body>
  void for_rows(const Block& b, float* room, const Body& body) const {
    const FloatRows soft = target_.read(b, room + C_);
    for (int64_t i = 0; i < b.rows; ++i) {
      if (!ids_) {
        const float sum =
            table_.softmax.soft_targets(soft.data + i * soft.ld, weight_, C_, keep_, spread_, room);
        body(i, Row{room, sum, kIgnored, 0.0f});
      } else {
        const int64_t id = ids_[b.row + i];
        const float own = id == kIgnored ? 0.0f : keep_ * weight_of(id);
        body(i,
             id == kIgnored ? Row{nullptr, 0.0f, id, own} : Row{base_, base_sum_ + own, id, own});
      }
    }
  }

  double divisor(int64_t rows) const {
    if (!ids_) return double(rows);
    double sum = 0;
    for (int64_t i = 0; i < rows; ++i) sum += ids_[i] == kIgnored ? 0.0f : weight_of(ids_[i]);
    return sum;
  }

 private:
  float weight_of(int64_t id) const { return weight_ ? weight_[id] : 1.0f; }

  const KernelTable& table_;
  const int64_t* ids_;
  Rows target_;
  int64_t C_;
  float keep_, spread_;
  Scratch room_;
  const float* weight_;
  float* base_ = nullptr;  // (C,) spread weight
  float base_sum_ = 0.0f;
};

}  // namespace

// The losses are summed in double, row after row, whoever computed them.
void cross_entropy_forward(const CrossEntropyForward& op, const int64_t* targets,
                           const KernelTable& table) {
  const Rows logits(op.logits, table.element);
  const int64_t C = logits.C(), rows = logits.count();
  const Shares shares(op.target, targets, op.weight, op.label_smoothing, C, table);
  const Scratch room(product_of({rows, 4}));
  float* losses = room.as<float>();
  for_row_blocks(rows, C, 8192, 0.24, [&](const Block& b) {
    const Scratch x_room(logits.room(b.rows, C)), q_room(shares.room(b.rows));
    const FloatRows x = logits.read(b, x_room.as<float>());
    shares.for_rows(b, q_room.as<float>(), [&](int64_t i, const Shares::Row& share) {
      const float* row = x.data + i * x.ld;
      float max, sum;
      table.softmax.max_and_sum(row, C, &max, &sum);
      const float log_sum = std::log(sum);
      if (op.lse) op.lse.ptr<float>()[b.row + i] = max + log_sum;
      float loss = 0.0f;
      if (share.at != kIgnored) loss = share.own * ((max - row[share.at]) + log_sum);
      if (share.q) loss += table.softmax.soft_loss(row, share.q, C, max, log_sum);
      losses[b.row + i] = loss;
    });
  });
  if (op.reduction == Reduction::none) {
    for (int64_t i = 0; i < rows; ++i) op.loss.ptr<float>()[element_offset(op.loss, i)] = losses[i];
    return;
  }
  double total = 0;
  for (int64_t i = 0; i < rows; ++i) total += losses[i];
  if (op.reduction == Reduction::mean) {
    const double divisor = shares.divisor(rows);
    total = divisor != 0 ? total / divisor : std::numeric_limits<double>::quiet_NaN();
    if (op.scale) *op.scale.ptr<float>() = divisor != 0 ? float(1.0 / divisor) : 1.0f;
  }
  *op.loss.ptr<float>() = float(total);
}

void cross_entropy_backward(const CrossEntropyBackward& op, const int64_t* targets,
                            const KernelTable& table) {
  const Rows logits(op.logits, table.element), dlogits(op.dlogits, table.element);
  const int64_t C = logits.C();
  const Shares shares(op.target, targets, op.weight, op.label_smoothing, C, table);
  const float of_all = op.scale ? *op.scale.ptr<float>() : 1.0f;
  for_row_blocks(logits.count(), C, 8192, 0.16, [&](const Block& b) {
    const Scratch x_room(logits.room(b.rows, C)), dx_room(dlogits.room(b.rows, C));
    const Scratch q_room(shares.room(b.rows));
    const FloatRows x = logits.read(b, x_room.as<float>());
    const FloatRows dx = dlogits.open(b, dx_room.as<float>());
    shares.for_rows(b, q_room.as<float>(), [&](int64_t i, const Shares::Row& share) {
      const float* from = x.data + i * x.ld;
      float* to = dx.data + i * dx.ld;
      if (share.at == kIgnored && !share.q) {
        std::fill(to, to + C, 0.0f);
        return;
      }
      const int64_t row = b.row + i, at = op.dloss.rank ? element_offset(op.dloss, row) : 0;
      const float scale = of_all * load_float(op.dloss.data, at, op.dloss.dtype);
      const float lse = op.lse.ptr<float>()[row];
      if (share.q) {
        table.softmax.soft_gradient(from, share.q, C, lse, share.sum, scale, to);
      } else {
        table.softmax.scaled_exp(from, C, lse, scale * share.own, to);
      }
      if (share.at != kIgnored) to[share.at] -= scale * share.own;
    });
    dlogits.close(b, dx);
  });
}

}  // namespace tilewright
