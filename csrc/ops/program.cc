// Programs: the fields of every descriptor, the plan of the arena, and the run.
#include "ops/program.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#include "core/device.h"
#include "core/pages.h"
#include "core/parallel.h"
#include "core/trace.h"
#include "cpu/isa.h"
#include "tilewright/errors.h"

namespace tilewright {
namespace {

// The fields of each descriptor, all of them: a structured binding of too few does not compile.

template <class V>
void fields(V& v, Matmul& op) {
  auto& [a, b, packed, bias, residual, out, activation, alpha] = op;
  v(a, b, packed, bias, residual, out, activation, alpha);
}
template <class V>
void fields(V& v, ActivationForward& op) {
  auto& [x, y, activation] = op;
  v(x, y, activation);
}
template <class V>
void fields(V& v, ActivationBackward& op) {
  auto& [x, dy, dx, activation] = op;
  v(x, dy, dx, activation);
}
template <class V>
void fields(V& v, SumRows& op) {
  auto& [x, out] = op;
  v(x, out);
}
template <class V>
void fields(V& v, Sum& op) {
  auto& [a, b, out] = op;
  v(a, b, out);
}
template <class V>
void fields(V& v, LayernormForward& op) {
  auto& [x, gamma, beta, residual, eps, y, s, mean, rstd, centred] = op;
  v(x, gamma, beta, residual, eps, y, s, mean, rstd, centred);
}
template <class V>
void fields(V& v, LayernormBackward& op) {
  auto& [s, gamma, mean, rstd, dy, ds, dx, dgamma, dbeta] = op;
  v(s, gamma, mean, rstd, dy, ds, dx, dgamma, dbeta);
}
template <class V>
void fields(V& v, Quantize& op) {
  auto& [x, axis, data, scale, offset, bits, group, along] = op;
  v(x, axis, data, scale, offset, bits, group, along);
}
template <class V>
void fields(V& v, Dequantize& op) {
  auto& [data, scale, offset, axis, out, bits, group, along] = op;
  v(data, scale, offset, axis, out, bits, group, along);
}
template <class V>
void fields(V& v, Int8Matmul& op) {
  auto& [a, b, packed, out] = op;
  v(a, b, packed, out);
}
template <class V>
void fields(V& v, QuantizedView& op) {
  auto& [data, scale, offset, bits, K, group] = op;
  v(data, scale, offset, bits, K, group);
}
template <class V>
void fields(V& v, QuantizedMatmul& op) {
  auto& [a, scale_a, offset_a, b, packed, compute, bias, residual, out, activation] = op;
  v(a, scale_a, offset_a, packed, compute, bias, residual, out, activation);
  fields(v, b);
}
template <class V>
void fields(V& v, SoftmaxForward& op) {
  auto& [x, y, log] = op;
  v(x, y, log);
}
template <class V>
void fields(V& v, SoftmaxBackward& op) {
  auto& [y, dy, dx, log] = op;
  v(y, dy, dx, log);
}
template <class V>
void fields(V& v, Dropout& op) {
  auto& [x, p, seed, y] = op;
  v(x, p, seed, y);
}
template <class V>
void fields(V& v, Rope& op) {
  auto& [x, cos, sin, interleaved, inverse, y] = op;
  v(x, cos, sin, interleaved, inverse, y);
}
template <class V>
void fields(V& v, EmbeddingForward& op) {
  auto& [ids, table, y] = op;
  v(ids, table, y);
}
template <class V>
void fields(V& v, EmbeddingBackward& op) {
  auto& [ids, dy, dtable] = op;
  v(ids, dy, dtable);
}
template <class V>
void fields(V& v, MseForward& op) {
  auto& [x, y, reduction, loss] = op;
  v(x, y, reduction, loss);
}
template <class V>
void fields(V& v, MseBackward& op) {
  auto& [x, y, dloss, scale, dx] = op;
  v(x, y, dloss, scale, dx);
}
template <class V>
void fields(V& v, CrossEntropyForward& op) {
  auto& [logits, target, ignore, reduction, loss, lse, weight, smoothing, scale] = op;
  v(logits, target, ignore, reduction, loss, lse, weight, smoothing, scale);
}
template <class V>
void fields(V& v, CrossEntropyBackward& op) {
  auto& [logits, target, lse, dloss, scale, ignore, dlogits, weight, smoothing] = op;
  v(logits, target, lse, dloss, scale, ignore, dlogits, weight, smoothing);
}
template <class V>
void fields(V& v, Adam& op) {
  auto& [params, grads, m, s, largest, lr, beta1, beta2, eps, decay, step, decoupled, scale] = op;
  v(params, grads, m, s, largest, lr, beta1, beta2, eps, decay, step, decoupled, scale);
}
template <class V>
void fields(V& v, Sgd& op) {
  auto& [params, grads, velocity, lr, momentum, decay, nesterov, dampening, scale] = op;
  v(params, grads, velocity, lr, momentum, decay, nesterov, dampening, scale);
}
template <class V>
void fields(V& v, Rmsprop& op) {
  auto& [params, grads, square, mean, velocity, lr, alpha, eps, decay, momentum, scale] = op;
  v(params, grads, square, mean, velocity, lr, alpha, eps, decay, momentum, scale);
}
template <class V>
void fields(V& v, ScaleTensors& op) {
  auto& [tensors, factor] = op;
  v(tensors, factor);
}
template <class V>
void fields(V& v, ClipNorm& op) {
  auto& [tensors, max_norm, norm] = op;
  v(tensors, max_norm, norm);
}
template <class V>
void fields(V& v, AttentionScores& op) {
  auto& [causal, scale, left, right, softcap, alibi_slopes, dropout_p, seed] = op;
  v(causal, scale, left, right, softcap, alibi_slopes, dropout_p, seed);
}
template <class V>
void fields(V& v, Attention& op) {
  auto& [q, k, value, mask, kv_lengths, scores, out, lse, cache, latency] = op;
  v(q, k, value, mask, kv_lengths, out, lse, cache, latency);
  fields(v, scores);
}
template <class V>
void fields(V& v, AttentionBackward& op) {
  auto& [forward, dout, dlse, dq, dk, dv] = op;
  fields(v, forward);
  v(dout, dlse, dq, dk, dv);
}
template <class V>
void fields(V& v, AttentionVarlen& op) {
  auto& [q, k, value, cu_q, cu_k, max_q, max_k, scores, out, lse] = op;
  v(q, k, value, cu_q, cu_k, max_q, max_k, out, lse);
  fields(v, scores);
}
template <class V>
void fields(V& v, AttentionVarlenBackward& op) {
  auto& [forward, dout, dlse, dq, dk, dv] = op;
  fields(v, forward);
  v(dout, dlse, dq, dk, dv);
}
template <class V>
void fields(V& v, CachedAttention& op) {
  fields(v, op.op);
  v(op.cache, op.layer);
}
template <class V>
void fields(V& v, CachedAppend& op) {
  v(op.k, op.v, op.cache, op.layer);
}

// What a step is called in messages: the op's name where Python has one.
template <class Op>
constexpr const char* kName = nullptr;
template <>
constexpr const char* kName<Matmul> = "matmul";
template <>
constexpr const char* kName<ActivationForward> = "activation";
template <>
constexpr const char* kName<ActivationBackward> = "activation, backward";
template <>
constexpr const char* kName<SumRows> = "sum_rows";
template <>
constexpr const char* kName<Sum> = "sum of two gradients";
template <>
constexpr const char* kName<LayernormForward> = "layernorm";
template <>
constexpr const char* kName<LayernormBackward> = "layernorm, backward";
template <>
constexpr const char* kName<Quantize> = "quantize";
template <>
constexpr const char* kName<Dequantize> = "dequantize";
template <>
constexpr const char* kName<Int8Matmul> = "int8_matmul";
template <>
constexpr const char* kName<QuantizedMatmul> = "qmatmul";
template <>
constexpr const char* kName<SoftmaxForward> = "softmax";
template <>
constexpr const char* kName<SoftmaxBackward> = "softmax, backward";
template <>
constexpr const char* kName<Dropout> = "dropout";
template <>
constexpr const char* kName<Rope> = "rope";
template <>
constexpr const char* kName<EmbeddingForward> = "embedding";
template <>
constexpr const char* kName<EmbeddingBackward> = "embedding, backward";
template <>
constexpr const char* kName<MseForward> = "mse";
template <>
constexpr const char* kName<MseBackward> = "mse, backward";
template <>
constexpr const char* kName<CrossEntropyForward> = "cross_entropy";
template <>
constexpr const char* kName<CrossEntropyBackward> = "cross_entropy, backward";
template <>
constexpr const char* kName<Adam> = "Adam";
template <>
constexpr const char* kName<Sgd> = "SGD";
template <>
constexpr const char* kName<Rmsprop> = "RMSprop";
template <>
constexpr const char* kName<ScaleTensors> = "scale_tensors";
template <>
constexpr const char* kName<ClipNorm> = "clip_grad_norm_";
template <>
constexpr const char* kName<Attention> = "attention";
template <>
constexpr const char* kName<AttentionBackward> = "attention, backward";
template <>
constexpr const char* kName<AttentionVarlen> = "attention_varlen";
template <>
constexpr const char* kName<AttentionVarlenBackward> = "attention_varlen, backward";
template <>
constexpr const char* kName<CachedAttention> = "attention to a KVCache";
template <>
constexpr const char* kName<CachedAppend> = "KVCache.append";

template <class T>
constexpr Number::Kind kind_of() {
  if constexpr (std::is_pointer_v<T>) return Number::pointer;
  if constexpr (std::is_enum_v<T>) return Number::choice;
  if constexpr (std::is_same_v<T, bool>) return Number::boolean;
  if constexpr (std::is_same_v<T, float>) return Number::f32;
  if constexpr (std::is_same_v<T, double>) return Number::f64;
  if constexpr (std::is_same_v<T, int>) return Number::s32;
  if constexpr (std::is_same_v<T, int64_t>) return Number::s64;
  if constexpr (std::is_same_v<T, uint64_t>) return Number::u64;
}

// Tells a Fields about every field; lists as their views.
struct Telling {
  Fields& fields;
  template <class... T>
  void operator()(T&... field) {
    (tell(field), ...);
  }
  void tell(View& view) { fields.view(view); }
  void tell(ViewList& list) {
    for (int64_t i = 0; i < list.size; ++i) fields.view(const_cast<View&>(list.data[i]));
  }
  template <class T>
  void tell(T& number) {
    fields.number({kind_of<T>(), const_cast<void*>(static_cast<const void*>(&number))});
  }
};

// Makes a descriptor's lists the step's own.
struct Owning {
  std::vector<std::vector<View>>& lists;
  template <class... T>
  void operator()(T&... field) {
    (own(field), ...);
  }
  void own(ViewList& list) {
    lists.emplace_back(list.data, list.data + list.size);
    list.data = lists.back().data();
  }
  template <class T>
  void own(T&) {}
};

template <class Op>
class StepOf final : public ProgramStep {
 public:
  explicit StepOf(const Op& op) : op_(op) {
    Owning owning{lists_};
    fields(owning, op_);
  }
  const char* name() const override { return kName<Op>; }
  void run() const override { tilewright::run(op_); }
  bool is_the_same_each_time() const override {
    return !std::is_same_v<Op, CachedAttention> && !std::is_same_v<Op, CachedAppend>;
  }
  void visit(Fields& told) override {
    Telling telling{told};
    fields(telling, op_);
  }

 private:
  Op op_;
  std::vector<std::vector<View>> lists_;
};

template <class Each>
class EachView final : public Fields {
 public:
  explicit EachView(const Each& each) : each_(each) {}
  void view(View& v) override {
    if (v.present && v.data && v.size() > 0) each_(v);
  }

 private:
  const Each& each_;
};

// A temporary: the steps that use it, first to last, and its place in the arena.
struct Placed {
  int64_t first = -1, last = -1, bytes = 0, offset = 0;
  bool meets(const Placed& other) const { return first <= other.last && other.first <= last; }
};

constexpr int64_t kLine = 64;  // bytes: places begin at cache lines

// The lowest place that is free for as long as each lives, the largest first; returns the end.
int64_t place(std::vector<Placed*> order) {
  std::stable_sort(order.begin(), order.end(),
                   [](const Placed* a, const Placed* b) { return a->bytes > b->bytes; });
  std::vector<const Placed*> placed;  // by offset
  int64_t end = 0;
  for (Placed* p : order) {
    int64_t at = 0;
    for (const Placed* other : placed) {
      if (!other->meets(*p)) continue;
      if (at + p->bytes <= other->offset) break;
      at = std::max(at, other->offset + other->bytes);
    }
    p->offset = at;
    end = std::max(end, at + p->bytes);
    placed.insert(
        std::upper_bound(placed.begin(), placed.end(), p,
                         [](const Placed* a, const Placed* b) { return a->offset < b->offset; }),
        p);
  }
  return end;
}

int64_t find(const std::vector<Memory>& list, const void* p) {
  for (size_t i = 0; i < list.size(); ++i) {
    if (list[i].holds(p)) return int64_t(i);
  }
  return -1;
}

}  // namespace

void Number::set(double value) const {
  switch (kind) {
    case f32:
      *static_cast<float*>(at) = float(value);
      break;
    case f64:
      *static_cast<double*>(at) = value;
      break;
    case s32:
      *static_cast<int*>(at) = int(value);
      break;
    case s64:
      *static_cast<int64_t*>(at) = int64_t(value);
      break;
    case boolean:
      *static_cast<bool*>(at) = value != 0;
      break;
    default:
      break;
  }
}

size_t Number::size() const {
  switch (kind) {
    case f32:
    case s32:
      return 4;
    case boolean:
    case choice:
      return 1;
    default:
      return 8;
  }
}

void run(const CachedAttention& op) {
  const KVSnapshot keys = op.keys();
  Attention attention = op.op;
  attention.cache = &keys;
  run(attention);
}

void run(const CachedAppend& op) {
  op.append(op.k, op.v);
}

void Program::Free::operator()(void* p) const {
  std::free(p);
}

template <class Op>
void Program::add(const Op& op) {
  steps_.push_back(std::make_unique<StepOf<Op>>(op));
}

template void Program::add(const Matmul&);
template void Program::add(const ActivationForward&);
template void Program::add(const ActivationBackward&);
template void Program::add(const SumRows&);
template void Program::add(const Sum&);
template void Program::add(const LayernormForward&);
template void Program::add(const LayernormBackward&);
template void Program::add(const Quantize&);
template void Program::add(const Dequantize&);
template void Program::add(const Int8Matmul&);
template void Program::add(const QuantizedMatmul&);
template void Program::add(const SoftmaxForward&);
template void Program::add(const SoftmaxBackward&);
template void Program::add(const Dropout&);
template void Program::add(const Rope&);
template void Program::add(const EmbeddingForward&);
template void Program::add(const EmbeddingBackward&);
template void Program::add(const MseForward&);
template void Program::add(const MseBackward&);
template void Program::add(const CrossEntropyForward&);
template void Program::add(const CrossEntropyBackward&);
template void Program::add(const Adam&);
template void Program::add(const Sgd&);
template void Program::add(const Rmsprop&);
template void Program::add(const ScaleTensors&);
template void Program::add(const ClipNorm&);
template void Program::add(const Attention&);
template void Program::add(const AttentionBackward&);
template void Program::add(const AttentionVarlen&);
template void Program::add(const AttentionVarlenBackward&);
template void Program::add(const CachedAttention&);
template void Program::add(const CachedAppend&);

void Program::plan(const std::vector<Memory>& inputs, const std::vector<Memory>& temporaries,
                   const Allocate& on_gpu) {
  inputs_.assign(inputs.size(), {});
  may_be_graph_ = size() > 0;
  std::vector<Placed> placed(temporaries.size());
  std::vector<std::pair<View*, int64_t>> moved;  // and which temporary it lies in
  for (int64_t i = 0; i < size(); ++i) {
    may_be_graph_ = may_be_graph_ && step(i).is_the_same_each_time();
    const auto note = [&](View& v) {
      may_be_graph_ = may_be_graph_ && v.device == Device::gpu;
      if (const int64_t k = find(inputs, v.data); k >= 0) {
        const auto* const start = static_cast<const char*>(inputs[size_t(k)].data);
        inputs_[size_t(k)].emplace_back(&v, v.ptr<char>() - start);
      } else if (const int64_t t = find(temporaries, v.data); t >= 0) {
        Placed& p = placed[size_t(t)];
        if (p.first < 0) p.first = i;
        p.last = i;
        p.bytes = (temporaries[size_t(t)].bytes + kLine - 1) / kLine * kLine;
        moved.emplace_back(&v, t);
      }
    };
    EachView each(note);
    step(i).visit(each);
  }
  const auto used_on = [&](Device device) {
    std::vector<Placed*> used;
    for (size_t t = 0; t < placed.size(); ++t) {
      if (placed[t].first >= 0 && temporaries[t].device == device) used.push_back(&placed[t]);
    }
    return used;
  };
  arena_bytes_ = place(used_on(Device::cpu));
  gpu_arena_bytes_ = place(used_on(Device::gpu));
  if (arena_bytes_ > 0) {
    arena_.reset(static_cast<char*>(allocate_pages(size_t(arena_bytes_))));
    if (!arena_) throw std::bad_alloc();
  }
  char* const gpu_arena =
      gpu_arena_bytes_ > 0 ? static_cast<char*>(on_gpu(gpu_arena_bytes_)) : nullptr;
  for (const auto& [view, t] : moved) {
    const Memory& from = temporaries[size_t(t)];
    char* const arena = from.device == Device::gpu ? gpu_arena : arena_.get();
    const int64_t at = view->ptr<const char>() - static_cast<const char*>(from.data);
    view->data = arena + placed[size_t(t)].offset + at;
  }
}

void Program::rebind(int64_t input, void* data) {
  for (const auto& [view, offset] : inputs_[size_t(input)]) {
    void* const place = static_cast<char*>(data) + offset;
    if (view->data != place) changed();
    view->data = place;
  }
}

void Program::poison() {
  if (arena_) std::memset(arena_.get(), 0xff, size_t(arena_bytes_));
}

void Program::run(const char* kind) {
  const Trace trace("program", kernels().isa,
                    [&] { return std::to_string(steps_.size()) + " steps"; });
  Trace::kernel(kind);
  done_ = 0;
  if constexpr (kHasGpu) {
    if (unchanged_++ > 0 && run_as_graph()) return;
  }
  const CloseRegions close;
  run_steps();
}

void Program::run_steps() {
  for (done_ = 0; done_ < size(); ++done_) steps_[size_t(done_)]->run();
}

// Where a Recording or a trace asks for the calls, they are made.
bool Program::run_as_graph() {
  if constexpr (kHasGpu) {
    if (!may_be_graph_ || Trace::described()) return false;
    try {
      if (!graph_) graph_ = cuda::Graph::capture([&] { run_steps(); });
    } catch (const DeviceError&) {
      Trace::fallback("launched call by call: CUDA could not capture the calls of a program");
    }
    may_be_graph_ = graph_ != nullptr;
    if (!graph_) return false;
    Trace::kernel("graph");
    graph_->launch();
    done_ = size();
    return true;
  }
  return false;
}

}  // namespace tilewright
