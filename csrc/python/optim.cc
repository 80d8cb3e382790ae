// Optimizer steps and norms over lists of tensors.
#include <pybind11/stl.h>

#include <vector>

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
using Views = std::vector<View>;

ViewList list(const Views& views) {
  return {views.data(), int64_t(views.size())};
}

void adam_step(const Views& params, const Views& grads, const Views& m, const Views& v,
               const Views& largest, double lr, double beta1, double beta2, double eps,
               double weight_decay, int64_t step, bool decoupled, double grad_scale) {
  call(Adam{list(params), list(grads), list(m), list(v), list(largest), lr, beta1, beta2, eps,
            weight_decay, step, decoupled, grad_scale});
}

void sgd_step(const Views& params, const Views& grads, const Views& velocity, double lr,
              double momentum, double weight_decay, bool nesterov, double dampening,
              double grad_scale) {
  call(Sgd{list(params), list(grads), list(velocity), lr, momentum, weight_decay, nesterov,
           dampening, grad_scale});
}

void rmsprop_step(const Views& params, const Views& grads, const Views& square, const Views& mean,
                  const Views& velocity, double lr, double alpha, double eps, double weight_decay,
                  double momentum, double grad_scale) {
  call(Rmsprop{list(params), list(grads), list(square), list(mean), list(velocity), lr, alpha, eps,
               weight_decay, momentum, grad_scale});
}

void scale_tensors(const Views& tensors, double factor) {
  call(ScaleTensors{list(tensors), factor});
}

double sum_squares(const Views& tensors) {
  if (recording()) {
    throw UnsupportedError("sum_squares: a program has no place for a number that Python reads");
  }
  return run(SumSquares{list(tensors)});
}

void clip_norm(const Views& tensors, double max_norm, const View& norm) {
  call(ClipNorm{list(tensors), max_norm, norm});
}

}  // namespace

void register_optim(py::module_& m) {
  m.def("adam_step", &adam_step, py::arg("params"), py::arg("grads"), py::arg("m"), py::arg("v"),
        py::arg("largest"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
        py::arg("weight_decay"), py::arg("step"), py::arg("decoupled") = true,
        py::arg("grad_scale") = 1.0, Release());
  m.def("sgd_step", &sgd_step, py::arg("params"), py::arg("grads"), py::arg("velocity"),
        py::arg("lr"), py::arg("momentum"), py::arg("weight_decay"), py::arg("nesterov"),
        py::arg("dampening") = 0.0, py::arg("grad_scale") = 1.0, Release());
  m.def("rmsprop_step", &rmsprop_step, py::arg("params"), py::arg("grads"), py::arg("square"),
        py::arg("mean"), py::arg("velocity"), py::arg("lr"), py::arg("alpha"), py::arg("eps"),
        py::arg("weight_decay"), py::arg("momentum"), py::arg("grad_scale") = 1.0, Release());
  m.def("scale_tensors", &scale_tensors, py::arg("tensors"), py::arg("factor"), Release());
  m.def("clip_norm", &clip_norm, py::arg("tensors"), py::arg("max_norm"), py::arg("norm"),
        Release());
  m.def("sum_squares", &sum_squares, py::arg("tensors"), Release());
}

}  // namespace tilewright::python
