// The CUDA side of the front doors: one function for each op descriptor, called once its checks are
// done, with views of a GPU's memory. Each launches on the calling thread's stream (gpu/stream.h) and
// returns without waiting, but for the one that returns a number.
#pragma once
#include "tilewright/kvcache.h"
#include "tilewright/ops.h"

namespace tilewright::cuda {

// attention_forward.cu, attention_backward.cu: every view with all its axes, by strides that may be 0:
// q (B, H, Tq, D), mask (B, H, Tq, Tk), slopes (B, H), of varlen (sequences, H)
void attention_forward(const Attention& op);
void attention_backward(const AttentionBackward& op);
void attention_varlen_forward(const AttentionVarlen& op);
void attention_varlen_backward(const AttentionVarlenBackward& op);

// kvcache.cu
struct Memory {
  char* data;
  void* stream;  // in whose order it is given back
};
Memory allocate(std::int64_t bytes);
void release(const Memory& memory);
void fill_pages(const KVCache::Append& append, const PagedKeys& layout, const View& k,
                const View& v);

// matmul.cu
void matmul(const Matmul& op);

// activation.cu
void activation_forward(const ActivationForward& op);
void activation_backward(const ActivationBackward& op);

// cross_entropy.cu: a bad id gives NaN, in its loss and its row of the gradient
void cross_entropy_forward(const CrossEntropyForward& op);
void cross_entropy_backward(const CrossEntropyBackward& op);

// dropout.cu
void dropout(const Dropout& op);

// embedding.cu: a bad id gives NaN, and is passed over by the gradient
void embedding_forward(const EmbeddingForward& op);
void embedding_backward(const EmbeddingBackward& op);

// layernorm.cu
void layernorm_forward(const LayernormForward& op);
void layernorm_backward(const LayernormBackward& op);

// qgemm.cu
void int8_matmul(const Int8Matmul& op);
void quantized_matmul(const QuantizedMatmul& op);

// quantize.cu
void quantize(const Quantize& op);
void dequantize(const Dequantize& op);

// mse.cu
void mse_forward(const MseForward& op);
void mse_backward(const MseBackward& op);

// optim.cu: sum_squares waits until the sum is there, clip_norm does not
void adam_step(const Adam& op);
void sgd_step(const Sgd& op);
void rmsprop_step(const Rmsprop& op);
void scale_tensors(const ScaleTensors& op);
double sum_squares(const SumSquares& op);
void clip_norm(const ClipNorm& op);

// rope.cu
void rope(const Rope& op);

// softmax.cu
void softmax_forward(const SoftmaxForward& op);
void softmax_backward(const SoftmaxBackward& op);

// sum.cu
void sum(const Sum& op);

// sum_rows.cu
void sum_rows(const SumRows& op);

}  // namespace tilewright::cuda
