// Row-wise and elementwise ops.
#include "core/check.h"
#include "python/arrays.h"
#include "python/context.h"
#include "python/module.h"
#include "python/program.h"
#include "tilewright/ops.h"

namespace py = pybind11;

namespace tilewright::python {
namespace {

using Release = py::call_guard<KernelCall>;

Activation activation_of(const std::string& kind) {
  if (kind == "relu") return Activation::relu;
  if (kind == "gelu") return Activation::gelu;
  if (kind == "gelu_tanh") return Activation::gelu_tanh;
  if (kind == "silu") return Activation::silu;
  if (kind == "tanh") return Activation::tanh;
  if (kind == "sigmoid") return Activation::sigmoid;
  throw UnsupportedError(
      "activation must be 'relu', 'gelu', 'gelu_tanh', 'silu', 'tanh' or 'sigmoid', got '" + kind +
      "'");
}

void activation_forward(const View& x, const View& y, const std::string& kind) {
  call(ActivationForward{x, y, activation_of(kind)});
}

void activation_backward(const View& x, const View& dy, const View& dx, const std::string& kind) {
  call(ActivationBackward{x, dy, dx, activation_of(kind)});
}

void sum_rows(const View& x, const View& out) {
  call(SumRows{x, out});
}

void sum(const View& a, const View& b, const View& out) {
  call(Sum{a, b, out});
}

void layernorm_forward(const View& x, const View& gamma, const View& beta, const View& residual,
                       float eps, const View& y, const View& s, const View& mean,
                       const View& rstd) {
  call(LayernormForward{x, gamma, beta, residual, eps, y, s, mean, rstd});
}

void layernorm_backward(const View& s, const View& gamma, const View& mean, const View& rstd,
                        const View& dy, const View& ds, const View& dx, const View& dgamma,
                        const View& dbeta) {
  call(LayernormBackward{s, gamma, mean, rstd, dy, ds, dx, dgamma, dbeta});
}

void rmsnorm_forward(const View& x, const View& gamma, const View& residual, float eps,
                     const View& y, const View& s, const View& rstd) {
  call(LayernormForward{x, gamma, View{}, residual, eps, y, s, View{}, rstd, false});
}

void rmsnorm_backward(const View& s, const View& gamma, const View& rstd, const View& dy,
                      const View& ds, const View& dx, const View& dgamma) {
  call(LayernormBackward{s, gamma, View{}, rstd, dy, ds, dx, dgamma, View{}});
}

void softmax_forward(const View& x, const View& y, bool log) {
  call(SoftmaxForward{x, y, log});
}

void softmax_backward(const View& y, const View& dy, const View& dx, bool log) {
  call(SoftmaxBackward{y, dy, dx, log});
}

void rope(const View& x, const View& cos, const View& sin, bool interleaved, bool inverse,
          const View& y) {
  call(Rope{x, cos, sin, interleaved, inverse, y});
}

Reduction reduction_of(const char* op, const std::string& reduction) {
  if (reduction == "mean") return Reduction::mean;
  if (reduction == "sum") return Reduction::sum;
  if (reduction == "none") return Reduction::none;
  throw UnsupportedError(std::string(op) + ": reduction must be 'mean', 'sum' or 'none', got '" +
                         reduction + "'");
}

void mse_forward(const View& x, const View& y, const std::string& reduction, const View& loss) {
  call(MseForward{x, y, reduction_of("mse", reduction), loss});
}

void mse_backward(const View& x, const View& y, const View& dloss, float scale, const View& dx) {
  call(MseBackward{x, y, dloss, scale, dx});
}

void dropout(const View& x, double p, uint64_t seed, const View& y) {
  call(Dropout{x, p, seed, y});
}

void embedding_forward(const View& ids, const View& table, const View& y) {
  call(EmbeddingForward{ids, table, y});
}

void embedding_backward(const View& ids, const View& dy, const View& dtable) {
  call(EmbeddingBackward{ids, dy, dtable});
}

void cross_entropy_forward(const View& logits, const View& target, const View& weight,
                           float label_smoothing, int64_t ignore_index,
                           const std::string& reduction, const View& loss, const View& lse,
                           const View& scale) {
  call(CrossEntropyForward{logits, target, ignore_index, reduction_of("cross_entropy", reduction),
                           loss, lse, weight, label_smoothing, scale});
}

void cross_entropy_backward(const View& logits, const View& target, const View& weight,
                            float label_smoothing, int64_t ignore_index, const View& lse,
                            const View& dloss, const View& scale, const View& dlogits) {
  call(CrossEntropyBackward{logits, target, lse, dloss, scale, ignore_index, dlogits, weight,
                            label_smoothing});
}

}  // namespace

void register_rowops(py::module_& m) {
  m.def("activation_forward", &activation_forward, py::arg("x"), py::arg("y"), py::arg("kind"),
        Release());
  m.def("activation_backward", &activation_backward, py::arg("x"), py::arg("dy"), py::arg("dx"),
        py::arg("kind"), Release());
  m.def("sum_rows", &sum_rows, py::arg("x"), py::arg("out"), Release());
  m.def("sum", &sum, py::arg("a"), py::arg("b"), py::arg("out"), Release());
  m.def("layernorm_forward", &layernorm_forward, py::arg("x"), py::arg("gamma"), py::arg("beta"),
        py::arg("residual"), py::arg("eps"), py::arg("y"), py::arg("s"), py::arg("mean"),
        py::arg("rstd"), Release());
  m.def("layernorm_backward", &layernorm_backward, py::arg("s"), py::arg("gamma"), py::arg("mean"),
        py::arg("rstd"), py::arg("dy"), py::arg("ds"), py::arg("dx"), py::arg("dgamma"),
        py::arg("dbeta"), Release());
  m.def("rmsnorm_forward", &rmsnorm_forward, py::arg("x"), py::arg("gamma"), py::arg("residual"),
        py::arg("eps"), py::arg("y"), py::arg("s"), py::arg("rstd"), Release());
  m.def("rmsnorm_backward", &rmsnorm_backward, py::arg("s"), py::arg("gamma"), py::arg("rstd"),
        py::arg("dy"), py::arg("ds"), py::arg("dx"), py::arg("dgamma"), Release());
  m.def("softmax_forward", &softmax_forward, py::arg("x"), py::arg("y"), py::arg("log"), Release());
  m.def("softmax_backward", &softmax_backward, py::arg("y"), py::arg("dy"), py::arg("dx"),
        py::arg("log"), Release());
  m.def("rope", &rope, py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("interleaved"),
        py::arg("inverse"), py::arg("y"), Release());
  m.def("mse_forward", &mse_forward, py::arg("x"), py::arg("y"), py::arg("reduction"),
        py::arg("loss"), Release());
  m.def("mse_backward", &mse_backward, py::arg("x"), py::arg("y"), py::arg("dloss"),
        py::arg("scale"), py::arg("dx"), Release());
  m.def("dropout", &dropout, py::arg("x"), py::arg("p"), py::arg("seed"), py::arg("y"), Release());
  m.def("embedding_forward", &embedding_forward, py::arg("ids"), py::arg("table"), py::arg("y"),
        Release());
  m.def("embedding_backward", &embedding_backward, py::arg("ids"), py::arg("dy"), py::arg("dtable"),
        Release());
  m.def("cross_entropy_forward", &cross_entropy_forward, py::arg("logits"), py::arg("target"),
        py::arg("weight"), py::arg("label_smoothing"), py::arg("ignore_index"),
        py::arg("reduction"), py::arg("loss"), py::arg("lse"), py::arg("scale"), Release());
  m.def("cross_entropy_backward", &cross_entropy_backward, py::arg("logits"), py::arg("target"),
        py::arg("weight"), py::arg("label_smoothing"), py::arg("ignore_index"), py::arg("lse"),
        py::arg("dloss"), py::arg("scale"), py::arg("dlogits"), Release());
}

}  // namespace tilewright::python
