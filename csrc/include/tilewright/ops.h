// The ops: plain descriptors of views, and one run() for each. Outputs are allocated by the caller.
//
// Every function checks its arguments first and throws ShapeError, DtypeError or UnsupportedError
// (errors.h) naming the op and the argument. Shapes in the comments; "T" is float32,
// bfloat16 or float16, each argument its own. A view that is optional may be absent.
#pragma once
#include "tilewright/view.h"

namespace tilewright {

enum class Activation : uint8_t { none, relu, gelu, gelu_tanh, silu, tanh, sigmoid };

class PackedMatrix;  // pack.h: a right-hand side, packed once
class KVCache;       // kvcache.h: keys and values of past tokens, in pages
class KVSnapshot;    // one layer of it at one moment
struct KVShape;

// out = activation(alpha * (a @ b) + bias) + residual, rounded once.
struct Matmul {
  View a;  // (..., M, K) T, any strides
  View b;  // (..., K, N) T; leading axes broadcast against a's. Absent when packed
  const PackedMatrix* packed = nullptr;  // stands for b
  View bias;                             // (N,) T, optional
  View residual;                         // like out, T, optional; may be out itself
  View out;                              // (..., M, N) T
  Activation activation = Activation::none;
  float alpha = 1.0f;
};
void run(const Matmul& op);
void check_operands(
    const Matmul& op);  // a and b have dtypes and ranks that a result shape can be read from

// y = activation(x), elementwise; y may be x itself.
struct ActivationForward {
  View x;  // (...) T
  View y;  // (...) T
  Activation activation = Activation::none;
};
void run(const ActivationForward& op);

// dx = dy * activation'(x); dx may be x or dy itself.
struct ActivationBackward {
  View x;   // (...) T, what went into the activation
  View dy;  // (...) T
  View dx;  // (...) T
  Activation activation = Activation::none;
};
void run(const ActivationBackward& op);

// out = sum over rows of x, accumulated in float32: fixed blocks of 64 rows, their sums likewise.
struct SumRows {
  View x;    // (rows, C) T
  View out;  // (C,) T
};
void run(const SumRows& op);

// out = a + b, or a copy of a, rounded once; out may be a or b itself.
struct Sum {
  View a;    // (...) T, any strides
  View b;    // like a, T, optional
  View out;  // like a, T
};
void run(const Sum& op);

// s = x + residual in s's dtype; y = (s - mean) / sqrt(var + eps) * gamma + beta over the last
// axis. Not centred, it is rmsnorm: y = s / sqrt(sum(s^2) / C + eps) * gamma.
struct LayernormForward {
  View x;         // (..., C) T
  View gamma;     // (C,) T, optional: 1
  View beta;      // (C,) T, optional: 0
  View residual;  // (..., C) T, optional: s is x
  float eps = 1e-5f;
  View y;               // (..., C) T; may be x or residual itself
  View s;               // (..., C) T, with residual; may be x or residual itself
  View mean;            // (rows,) float32, optional
  View rstd;            // (rows,) float32, optional
  bool centred = true;  // false: without beta and mean
};
void run(const LayernormForward& op);

struct LayernormBackward {
  View s;       // (..., C) T, what was normalised
  View gamma;   // (C,) T, optional
  View mean;    // (rows,) float32; absent for rmsnorm
  View rstd;    // (rows,) float32
  View dy;      // (..., C) T
  View ds;      // (..., C) T, optional: the gradient that reached s itself
  View dx;      // (..., C) T: of x, and of residual
  View dgamma;  // (C,) T, optional
  View dbeta;   // (C,) T, optional
};
void run(const LayernormBackward& op);

// x ~ scale * data + offset, over the whole array (axis -1) or for each index of `axis`:
//   symmetric    s = max |x| / L         data = clamp(rne(x / s), -L, L), L = 127 (4 bits: 7)
//   with offset  s = (max x - min x) / L   data = clamp(rne((x - min x) / s), 0, L), L = 255 (15)
// s is 1 where that is 0. Where x is not finite: data 0 and a scale that is not. With `group`, the
// same for every `group` neighbours along axis `along`; the last group may be shorter.
struct Quantize {
  View x;  // T, any shape and strides
  int axis = -1;
  View data;     // like x: int8, or uint8 with offset; 4 bits: two a byte along `along`, low first
  View scale;    // () or (extent of axis,) float32; with groups like x, but groups along `along`
  View offset;   // like scale, optional: min x
  int bits = 8;  // or 4
  int64_t group = 0;  // x has two axes, `axis` and `along`, or only `along`
  int along = -1;     // of groups and of 4 bits: another axis than `axis`
};
void run(const Quantize& op);

// out = scale * data, with offset fma(scale, data, offset).
struct Dequantize {
  View data;  // as Quantize writes it
  View scale, offset;
  int axis = -1;
  View out;  // T, any shape and strides
  int bits = 8;
  int64_t group = 0;
  int along = -1;
};
void run(const Dequantize& op);

// A quantized matrix (K, N): element (k, j) is scale * q(k, j) + offset.
struct QuantizedView {
  View data;      // (K, N) int8 or uint8; 4 bits: (ceil(K / 2), N), two along K a byte, low first
  View scale;     // (), (N,) or with groups (groups, N) float32
  View offset;    // like scale, optional
  int bits = 8;   // or 4: then the dtype says whether nibbles are signed
  int64_t K = 0;  // logical rows
  int64_t group = 0;  // neighbours along K that share a scale, 0: all; the last may be fewer
};

// out = a @ b in int32, modulo 2^32.
struct Int8Matmul {
  View a;                                // (..., M, K) int8 or uint8
  View b;                                // (..., K, N) int8, broadcast like matmul's
  const PackedMatrix* packed = nullptr;  // stands for b
  View out;                              // (..., M, N) int32
};
void run(const Int8Matmul& op);
void check_operands(const Int8Matmul& op);

enum class Compute : uint8_t { integers, floats };

// Weights b in 8 or 4 bits. By integers a float a is quantized row by row, and
//   one scale a column      y = activation(fma(float(qa @ qb), scale_a * scale_b, bias)) + residual
//   groups g, offsets, unsigned b
//                           s = sum over g of float(qa @ qb) * scale_b + float(sum of qa) * offset_b
//                           y = activation(fma(scale_a, s, fma(offset_a, sum of b, bias))) + residual
// where each step of s is an fma, in ascending order. By floats y = matmul(a, dequantized b), bit
// for bit. Rounded once.
struct QuantizedMatmul {
  View a;                                // (..., M, K) T; or int8 or uint8 with scale_a
  View scale_a;                          // () or (M,) float32; absent with a float a
  View offset_a;                         // like scale_a, optional
  QuantizedView b;                       // (K, N)
  const PackedMatrix* packed = nullptr;  // stands for b
  Compute compute = Compute::integers;
  View bias;      // (N,) T, optional
  View residual;  // like out, T, optional; may be out itself
  View out;       // (..., M, N) T
  Activation activation = Activation::none;
};
void run(const QuantizedMatmul& op);
void check_operands(const QuantizedMatmul& op);

// y = e^(x - max) / sum over the last axis, or its logarithm; y may be x itself.
struct SoftmaxForward {
  View x;  // (..., C) T
  View y;  // (..., C) T
  bool log = false;
};
void run(const SoftmaxForward& op);

struct SoftmaxBackward {
  View y;   // (..., C) T, what the forward pass returned
  View dy;  // (..., C) T
  View dx;  // (..., C) T; may be dy itself
  bool log = false;
};
void run(const SoftmaxBackward& op);

// y = x / (1 - p) where the element is kept, else 0: element n, counted in row-major order, is kept
// where its word of Philox4x32-10 with this key is at least round(p * 2^32). The gradient of x is
// the same op on that of y.
struct Dropout {
  View x;  // (...) T
  double p = 0.5;
  uint64_t seed = 0;
  View y;  // (...) T; may be x itself
};
void run(const Dropout& op);

// y = x with the first R elements of each row rotated by pairs, R twice the last axis of cos:
//   (a, b) -> (a cos - b sin, b cos + a sin)
// Pairs are (i, i + R/2), or (2i, 2i + 1) interleaved; `inverse` turns back, as the gradient does.
struct Rope {
  View x;    // (..., T, D) T
  View cos;  // (T, R/2) T, or (B, T, R/2) with x (B, ..., T, D)
  View sin;  // like cos
  bool interleaved = false;
  bool inverse = false;
  View y;  // like x; may be x itself
};
void run(const Rope& op);

// y[...] = table[ids[...]]; an id outside the table throws ShapeError naming it.
struct EmbeddingForward {
  View ids;    // (...) int32 or int64
  View table;  // (V, C) T
  View y;      // (..., C) T
};
void run(const EmbeddingForward& op);

// dtable[v] = sum of dy over the places where ids is v, in ascending order, accumulated in float32.
struct EmbeddingBackward {
  View ids;     // (...) int32 or int64
  View dy;      // (..., C) T
  View dtable;  // (V, C) T
};
void run(const EmbeddingBackward& op);

enum class Reduction : uint8_t { none, sum, mean };

// loss = (x - y)^2, reduced; sums are double.
struct MseForward {
  View x;  // (...) T
  View y;  // (...) T
  Reduction reduction = Reduction::mean;
  View loss;  // float32: () for sum and mean, (...) for none
};
void run(const MseForward& op);

// dx = scale dloss (x - y).
struct MseBackward {
  View x;      // (...) T
  View y;      // (...) T
  View dloss;  // T: () or (...)
  float scale = 2.0f;
  View dx;  // (...) T; may be x or y itself
};
void run(const MseBackward& op);

// loss = sum over classes c of q[c] (log(sum(e^logits)) - logits[c]), then reduced, where a target
// that is an id counts with q[target] = weight[target], and one of probabilities with q = weight *
// target; label_smoothing mixes the target with 1 / C first. The loss is 0 where the id is
// ignore_index.
struct CrossEntropyForward {
  View logits;  // (..., C) T
  View target;  // (...) int32 or int64, or (..., C) T
  int64_t ignore_index = -100;
  Reduction reduction = Reduction::mean;  // by the weights of the ids that count, or by rows
  View loss;                              // float32: () for sum and mean, (...) for none
  View lse;     // (rows,) float32, optional: log(sum(e^logits)), which the backward pass reads
  View weight;  // (C,) T, optional: 1
  float label_smoothing = 0.0f;
  View scale;  // () float32, optional: 1 / what "mean" divides by, which the backward pass reads
};
void run(const CrossEntropyForward& op);

// dlogits = scale * dloss * (sum(q) softmax(logits) - q), 0 where target is ignore_index.
struct CrossEntropyBackward {
  View logits;  // (..., C) T
  View target;  // (...) int32 or int64, or (..., C) T
  View lse;     // (rows,) float32
  View dloss;   // T: () or (...)
  View scale;   // () float32, optional: 1
  int64_t ignore_index = -100;
  View dlogits;  // (..., C) T; may be logits itself
  View weight;   // (C,) T, optional: 1
  float label_smoothing = 0.0f;
};
void run(const CrossEntropyBackward& op);

// Some views, owned by the caller.
struct ViewList {
  const View* data = nullptr;
  int64_t size = 0;
  const View& operator[](int64_t i) const { return data[i]; }
};

// One optimizer step over all tensors at once, in place. Lists run in parallel: tensor i of each
// has one shape; params and grads are T, state is float32.
// grad_scale multiplies every gradient as it is read: -1 maximizes.
struct Adam {
  ViewList params, grads, m, v;
  ViewList largest;  // of v so far (amsgrad), optional
  double lr, beta1, beta2, eps, weight_decay;
  int64_t step;           // 1 for the first
  bool decoupled = true;  // weight decay shrinks the parameter (AdamW), else joins its gradient
  double grad_scale = 1.0;
};
void run(const Adam& op);

struct Sgd {
  ViewList params, grads, velocity;  // velocity: empty where momentum is 0
  double lr, momentum, weight_decay;
  bool nesterov = false;
  double dampening = 0.0;  // share of the gradient that the velocity does not take
  double grad_scale = 1.0;
};
void run(const Sgd& op);

struct Rmsprop {
  ViewList params, grads, square;
  ViewList mean;      // centered: the running mean of the gradients, optional
  ViewList velocity;  // empty where momentum is 0
  double lr, alpha, eps, weight_decay, momentum;
  double grad_scale = 1.0;
};
void run(const Rmsprop& op);

// Every element times a factor, in place.
struct ScaleTensors {
  ViewList tensors;  // T
  double factor;
};
void run(const ScaleTensors& op);

// The sum of the squares of all elements, accumulated in double over fixed blocks.
struct SumSquares {
  ViewList tensors;  // T
};
double run(const SumSquares& op);

// norm = sqrt of the sum of all squares; where max_norm / (norm + 1e-6) is below 1 or NaN, every
// element times that, in place.
struct ClipNorm {
  ViewList tensors;  // T
  double max_norm;
  View norm;  // () float64
};
void run(const ClipNorm& op);

// out = softmax(t) v, t = scale * q k^T, then softcap * tanh(t / softcap), then ALiBi, then mask. Row
// i of a sequence of n keys stands at i + n - Tq (bottom-right), which causal, window and ALiBi count
// from. With three axes q, k, v, out (B, T, D) are one head; then mask, alibi_slopes and lse have no
// H either. Fully masked rows: out 0, lse -inf.
struct AttentionScores {
  bool causal = false;  // a row sees no key after its position
  float scale = 1.0f;
  int64_t left = -1, right = -1;  // nor one further before or after it than this; -1: all
  float softcap = 0;              // 0: none
  View alibi_slopes;              // (H,) or (B, H) float32: t -= slope * |position - key|; optional
  double dropout_p = 0;  // of a weight; which ones are dropped follows from seed and the number of
  uint64_t seed = 0;     // the weight in row-major order (varlen: sequence after sequence)
};
struct Attention {
  View q;           // (B, H, Tq, D) T
  View k;           // (B, Hkv, Tk, D) T, Hkv divides H
  View v;           // (B, Hkv, Tk, Dv) T
  View mask;        // broadcasts to (B, H, Tq, Tk): bool (true = attend) or T (added); optional
  View kv_lengths;  // (B,) int32 or int64: keys that exist, optional
  AttentionScores scores;
  View out;  // (B, H, Tq, Dv) T
  View lse;  // (B, H, Tq) float32: log of the sum of exponentials, optional
  const KVSnapshot* cache = nullptr;  // stands for k and v, and for kv_lengths where absent
  // Only where a level has matrix units: they are left alone, as for the keys of a cache, whose bits
  // the result then has. A row costs less so where there are few of them.
  bool latency = false;
};
void run(const Attention& op);

// k, v become the next tokens of each sequence of a layer.
struct KVAppend {
  KVCache* cache = nullptr;
  int64_t layer = 0;
  View k, v;  // (B, Hkv, T, D) T
};
void run(const KVAppend& op);
void check_operands(const KVAppend& op);
void check_sizes(const KVShape& shape);  // what a cache may be made with

// Gradients of q, k, v, with the probabilities recomputed from lse. `forward` as it was called,
// with its results `out` (float32 also where T has 16 bits, if it is at hand) and `lse`.
struct AttentionBackward {
  Attention forward;
  View dout;  // (B, H, Tq, Dv) T
  View dlse;  // (B, H, Tq) float32, optional
  View dq;    // like q, optional
  View dk;    // like k, optional
  View dv;    // like v, optional
};
void run(const AttentionBackward& op);

// Attention of sequences that lie one after the other: sequence i has the rows and keys from
// cu_seqlens[i] to cu_seqlens[i + 1], and the result that it has by itself.
struct AttentionVarlen {
  View q;                                        // (total_q, H, D) T
  View k;                                        // (total_k, Hkv, D) T
  View v;                                        // (total_k, Hkv, Dv) T
  View cu_seqlens_q, cu_seqlens_k;               // (B + 1,) int32 or int64: 0, ascending, total
  int64_t max_seqlen_q = -1, max_seqlen_k = -1;  // no sequence is longer; -1: not given
  AttentionScores scores;
  View out;  // (total_q, H, Dv) T
  View lse;  // (H, total_q) float32, optional
};
void run(const AttentionVarlen& op);

struct AttentionVarlenBackward {
  AttentionVarlen forward;
  View dout;  // (total_q, H, Dv) T
  View dlse;  // (H, total_q) float32, optional
  View dq;    // like q, optional
  View dk;    // like k, optional
  View dv;    // like v, optional
};
void run(const AttentionVarlenBackward& op);

}  // namespace tilewright
