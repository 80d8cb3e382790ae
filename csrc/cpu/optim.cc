#include "cpu/optim.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/parallel.h"
#include "core/scratch.h"
#include "cpu/rowwise.h"

namespace tilewright {
namespace {

constexpr int64_t kElements = 8192;  // of a task
constexpr int kMost = 5;             // tensors that a step walks for each parameter

// Tensors of one shape each that a step walks together: element by element, in any order.
struct Group {
  std::vector<Rows> operands;
  Tiling tiles;
  int64_t first_task;
};

// Lists of views that run in parallel; an absent list is an empty one.
class TensorLists {
 public:
  TensorLists(std::initializer_list<const ViewList*> lists, const KernelTable& table) {
    for (const ViewList* list : lists) present_.push_back(list->size > 0);
    for (int64_t i = 0; i < (*lists.begin())->size; ++i) {
      std::vector<View> views;
      for (const ViewList* list : lists) {
        if (list->size) views.push_back((*list)[i]);
      }
      if (views[0].size() == 0) continue;
      std::vector<View*> pointers;
      for (View& v : views) pointers.push_back(&v);
      merge_axes(pointers.data(), int(pointers.size()));
      Group group{{}, Tiling(1, 1, 1), tasks_};
      for (const View& v : views) group.operands.emplace_back(v, table.element, true);
      group.tiles = Tiling(group.operands[0].count(), group.operands[0].C(), kElements);
      tasks_ += group.tiles.count();
      elements_ += views[0].size();
      groups_.push_back(std::move(group));
    }
  }

  int64_t tasks() const { return tasks_; }

  // body(n, a float pointer for each list, task) for every block; the pointer of an absent list is
  // nullptr. The first `written` lists are written back.
  template <class Body>
  void for_each_block(int written, double ns_per_element, const Body& body) const {
    parallel_for(tasks_, ns_per_element * double(elements_), [&](int64_t task) {
      const auto after =
          std::upper_bound(groups_.begin(), groups_.end(), task,
                           [](int64_t t, const Group& g) { return t < g.first_task; });
      const Group& group = *(after - 1);
      const Block b = group.tiles[task - group.first_task];
      int64_t room = 0;
      for (const Rows& r : group.operands) room += r.room(b.rows, b.columns);
      const Scratch scratch(room);
      float* free = scratch.as<float>();
      float* data[kMost] = {};
      auto operand = group.operands.begin();
      for (size_t k = 0; k < present_.size(); ++k) {
        if (!present_[k]) continue;
        data[k] = operand->read(b, free).data;
        free += operand++->room(b.rows, b.columns) / 4;
      }
      body(b.rows * b.columns, data, task);
      operand = group.operands.begin();
      for (int k = 0; k < written; ++k) {
        if (present_[size_t(k)]) operand++->close(b, {data[k], b.columns});
      }
    });
  }

 private:
  std::vector<bool> present_;
  std::vector<Group> groups_;
  int64_t tasks_ = 0, elements_ = 0;
};

}  // namespace

void adam_step(const Adam& op, const KernelTable& table) {
  const TensorLists lists({&op.params, &op.m, &op.v, &op.largest, &op.grads}, table);
  const double correction1 = 1 - std::pow(op.beta1, double(op.step));
  const double correction2 = 1 - std::pow(op.beta2, double(op.step));
  const AdamStep step{float(op.grad_scale),
                      float(op.beta1),
                      float(1 - op.beta1),
                      float(op.beta2),
                      float(1 - op.beta2),
                      float(op.decoupled ? 1 - op.lr * op.weight_decay : 1.0),
                      float(op.decoupled ? 0.0 : op.weight_decay),
                      float(op.lr / correction1),
                      float(1 / std::sqrt(correction2)),
                      float(op.eps)};
  lists.for_each_block(4, 0.22, [&](int64_t n, float* const* t, int64_t) {
    table.optim.adam(step, n, t[0], t[4], t[1], t[2], t[3]);
  });
}

void sgd_step(const Sgd& op, const KernelTable& table) {
  const TensorLists lists({&op.params, &op.velocity, &op.grads}, table);
  const SgdStep step{float(op.lr),           float(op.momentum),   float(1 - op.dampening),
                     float(op.weight_decay), float(op.grad_scale), op.nesterov};
  lists.for_each_block(2, 0.14, [&](int64_t n, float* const* t, int64_t) {
    table.optim.sgd(step, n, t[0], t[2], t[1]);
  });
}

void rmsprop_step(const Rmsprop& op, const KernelTable& table) {
  const TensorLists lists({&op.params, &op.square, &op.mean, &op.velocity, &op.grads}, table);
  const RmspropStep step{float(op.lr),        float(op.alpha),        float(1 - op.alpha),
                         float(op.eps),       float(op.weight_decay), float(op.momentum),
                         float(op.grad_scale)};
  lists.for_each_block(4, 0.22, [&](int64_t n, float* const* t, int64_t) {
    table.optim.rmsprop(step, n, t[0], t[4], t[1], t[2], t[3]);
  });
}

void scale_tensors(const ScaleTensors& op, const KernelTable& table) {
  const TensorLists lists({&op.tensors}, table);
  lists.for_each_block(1, 0.1, [&](int64_t n, float* const* t, int64_t) {
    table.optim.scale(float(op.factor), n, t[0]);
  });
}

double sum_squares(const SumSquares& op, const KernelTable& table) {
  const TensorLists lists({&op.tensors}, table);
  std::vector<double> partial(size_t(lists.tasks()));
  lists.for_each_block(0, 0.1, [&](int64_t n, float* const* t, int64_t task) {
    partial[size_t(task)] = table.optim.sum_squares(t[0], n);
  });
  double total = 0;
  for (const double p : partial) total += p;
  return total;
}

}  // namespace tilewright
