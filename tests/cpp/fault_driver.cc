// What fault_library.py calls through ctypes: ops by name on views, in a library without
// Python. Returns nullptr, or the message of the exception.
#include <stdexcept>
#include <string>

#include "cpu/isa.h"
#include "tilewright/ops.h"

using namespace tilewright;

namespace {

Activation activation(double code) {
  return static_cast<Activation>(int(code));
}

Attention attention(const View* v, const double* numbers) {
  Attention a;
  a.q = v[0], a.k = v[1], a.v = v[2], a.mask = v[3], a.kv_lengths = v[4], a.out = v[5];
  a.lse = v[6], a.scores.alibi_slopes = v[7];
  a.scores.causal = numbers[0] != 0;
  a.scores.scale = float(numbers[1]);
  a.scores.left = int64_t(numbers[2]), a.scores.right = int64_t(numbers[3]);
  a.scores.softcap = float(numbers[4]);
  a.scores.dropout_p = numbers[5], a.scores.seed = uint64_t(numbers[6]);
  return a;
}

void dispatch(const std::string& op, const View* v, const double* numbers) {
  if (op == "matmul") {
    Matmul m;
    m.a = v[0], m.b = v[1], m.bias = v[2], m.residual = v[3], m.out = v[4];
    m.activation = activation(numbers[0]);
    m.alpha = float(numbers[1]);
    return run(m);
  }
  if (op == "activation") return run(ActivationForward{v[0], v[1], activation(numbers[0])});
  if (op == "layernorm") {
    LayernormForward l;
    l.x = v[0], l.gamma = v[1], l.beta = v[2], l.residual = v[3], l.y = v[4], l.s = v[5];
    l.mean = v[6], l.rstd = v[7];
    l.eps = float(numbers[0]);
    return run(l);
  }
  if (op == "layernorm_backward") {
    return run(LayernormBackward{v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8]});
  }
  if (op == "rmsnorm") {
    LayernormForward l;
    l.x = v[0], l.gamma = v[1], l.residual = v[2], l.y = v[3], l.s = v[4], l.rstd = v[5];
    l.centred = false;
    l.eps = float(numbers[0]);
    return run(l);
  }
  if (op == "rope") return run(Rope{v[0], v[1], v[2], numbers[0] != 0, numbers[1] != 0, v[3]});
  if (op == "dropout") {
    const uint64_t seed = uint64_t(numbers[2]) << 32 | uint64_t(numbers[1]);
    return run(Dropout{v[0], numbers[0], seed, v[1]});
  }
  if (op == "softmax") return run(SoftmaxForward{v[0], v[1]});
  if (op == "softmax_backward") return run(SoftmaxBackward{v[0], v[1], v[2]});
  if (op == "attention") return run(attention(v, numbers));
  if (op == "attention_backward") {
    return run(AttentionBackward{attention(v, numbers), v[8], v[9], v[10], v[11], v[12]});
  }
  if (op == "int8_matmul") {
    Int8Matmul m;
    m.a = v[0], m.b = v[1], m.out = v[2];
    return run(m);
  }
  if (op == "qmatmul") {
    QuantizedMatmul m;
    m.a = v[0], m.bias = v[4], m.residual = v[5], m.out = v[6];
    m.b = {v[1], v[2], v[3], int(numbers[1]), v[0].last(), int64_t(numbers[2])};
    m.activation = activation(numbers[0]);
    m.compute = numbers[3] != 0 ? Compute::floats : Compute::integers;
    return run(m);
  }
  throw std::invalid_argument("no op " + op);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* run_op(const char* op,
                                                                     const View* views,
                                                                     const double* numbers) {
  static thread_local std::string message;
  try {
    dispatch(op, views, numbers);
    return nullptr;
  } catch (const std::exception& e) {
    message = e.what();
    return message.c_str();
  }
}
