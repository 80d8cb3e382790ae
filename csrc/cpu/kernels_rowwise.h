// What a level provides for rows and elements. Every kernel reads and writes float32, contiguous
// along a row: cpu/rowwise.h turns other dtypes and strides into that. `ld` is the distance between
// rows in elements (any sign, 0 where a row is repeated).
#pragma once
#include <stdint.h>

#include "tilewright/ops.h"

namespace tilewright {

struct ElementKernels {
  // A float dtype to float32, exactly; the other way, to nearest even.
  void (*widen)(DType from, const void* x, float* y, int64_t n) = nullptr;
  void (*narrow)(DType to, const float* x, void* y, int64_t n) = nullptr;
  // y = activation(x); dx = dy * activation'(x). In place where the pointers are equal.
  void (*activate)(Activation kind, const float* x, float* y, int64_t n,
                   bool past_caches) = nullptr;
  void (*activate_backward)(Activation kind, const float* x, const float* dy, float* dx, int64_t n,
                            bool past_caches) = nullptr;
  void (*add)(const float* x, float* sum, int64_t n) = nullptr;  // sum += x
  // sum (C,) = the sum of the rows of x (rows, C), first to last.
  void (*sum_rows)(const float* x, int64_t ld, int64_t rows, int64_t C, float* sum) = nullptr;
};

// y (rows, C) = (s - mean) * rstd * gamma + beta, s = x + residual; rmsnorm: y = s * rstd * gamma
struct LayernormForwardRows {
  bool centred;  // layernorm; else rmsnorm
  int64_t rows, C;
  const float* x;
  int64_t ldx;
  const float* residual;  // (rows, C), or nullptr: s is x
  int64_t ldr;
  DType s_dtype;       // s is kept in it, and normalised after that rounding
  const float* gamma;  // (C,)
  const float* beta;   // (C,), not read by rmsnorm
  float eps;
  float* y;
  int64_t ldy;
  bool past_caches;  // y
  float* s;          // (rows, C), where residual is given
  int64_t lds;
  float* mean;  // (rows,)
  float* rstd;  // (rows,)
};

constexpr int kMaxLayernormRows = 64;  // of one backward call

// dx (rows, C), and this block's part of dgamma and dbeta.
struct LayernormBackwardRows {
  int64_t rows, C;
  const float* s;  // what was normalised
  int64_t lds;
  const float* dy;
  int64_t ldy;
  const float* ds;  // the gradient that reached s itself, or nullptr
  int64_t ldds;
  const float* gamma;  // (C,)
  const float* mean;   // (rows,), or nullptr: rmsnorm
  const float* rstd;   // (rows,)
  float* dx;
  int64_t ldx;
  float* dgamma;  // (C,)
  float* dbeta;   // (C,)
};

struct LayernormKernels {
  void (*forward)(const LayernormForwardRows& p) = nullptr;
  void (*backward)(const LayernormBackwardRows& p) = nullptr;
};

struct SoftmaxKernels {
  // y (rows, C) = e^(x - max) / sum, or its logarithm, rows > 0; dx = y (dy - sum(y dy)). In place
  // where the pointers are equal.
  void (*forward)(bool log, int64_t rows, int64_t C, const float* x, int64_t ldx, float* y,
                  int64_t ldy) = nullptr;
  void (*backward)(int64_t rows, int64_t C, const float* y, int64_t ldy, const float* dy,
                   int64_t lddy, float* dx, int64_t lddx) = nullptr;
  // dx (C,) = dy - e^y sum(dy). In place likewise.
  void (*log_backward)(const float* y, const float* dy, int64_t C, float* dx) = nullptr;
  // The largest element of a row, and the sum of e^(x - max): one pass over x.
  void (*max_and_sum)(const float* x, int64_t C, float* max, float* sum) = nullptr;
  // dx (C,) = scale e^(x - lse)
  void (*scaled_exp)(const float* x, int64_t C, float lse, float scale, float* dx) = nullptr;
  // q (C,) = weight (keep target + spread), and its sum; no target: 0, no weight: 1
  float (*soft_targets)(const float* target, const float* weight, int64_t C, float keep,
                        float spread, float* q) = nullptr;
  float (*soft_loss)(const float* x, const float* q, int64_t C, float max,
                     float log_sum) = nullptr;  // sum(q ((max - x) + log_sum))
  // dx (C,) = scale (total e^(x - lse) - q)
  void (*soft_gradient)(const float* x, const float* q, int64_t C, float lse, float total,
                        float scale, float* dx) = nullptr;
};

struct RopeKernels {
  // y (2 half,) = x rotated: pairs (i, i + half), or (2i, 2i + 1) interleaved, by the angle whose
  // cosine is cos[i] and sine sign * sin[i]. In place where the pointers are equal.
  void (*halves)(const float* x, const float* cos, const float* sin, float sign, int64_t half,
                 float* y) = nullptr;
  void (*interleaved)(const float* x, const float* cos, const float* sin, float sign, int64_t half,
                      float* y) = nullptr;
};

struct MseKernels {
  void (*squares)(const float* x, const float* y, int64_t n, float* loss) = nullptr;  // (x - y)^2
  double (*sum)(const float* x, const float* y, int64_t n) = nullptr;  // of the squares
  // dx = (x - y) * scale, times dloss (n,) where that is given
  void (*backward)(const float* x, const float* y, const float* dloss, float scale, int64_t n,
                   float* dx) = nullptr;
};

// One step; see simd/optim.cc for the formulas.
struct AdamStep {
  float grad_scale, beta1, rest1, beta2, rest2;  // rest = 1 - beta, rounded once
  float keep;                                    // 1 - lr weight_decay, or 1 where that is coupled
  float decay;                                   // weight_decay where it is coupled, else 0
  float rate;                                    // lr / (1 - beta1^step)
  float root;                                    // 1 / sqrt(1 - beta2^step)
  float eps;
};

struct SgdStep {
  float lr, momentum, rest, decay, grad_scale;  // rest = 1 - dampening
  bool nesterov;
};

struct RmspropStep {
  float lr, alpha, rest, eps, decay, momentum, grad_scale;  // rest = 1 - alpha
};

// Pointers to optional state may be nullptr: largest, velocity, mean.
struct OptimKernels {
  void (*adam)(const AdamStep& s, int64_t n, float* p, const float* g, float* m, float* v,
               float* largest) = nullptr;
  void (*sgd)(const SgdStep& s, int64_t n, float* p, const float* g, float* velocity) = nullptr;
  void (*rmsprop)(const RmspropStep& s, int64_t n, float* p, const float* g, float* square,
                  float* mean, float* velocity) = nullptr;
  void (*scale)(float factor, int64_t n, float* x) = nullptr;
  double (*sum_squares)(const float* x, int64_t n) = nullptr;
};

}  // namespace tilewright
