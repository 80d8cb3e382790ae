// The kernels of one ISA level: function pointers and blocking constants, filled level by level.
//
// fill_generic … fill_<best> run in order, each overriding only what it improves. Included by
// csrc/simd, hence free of the standard library.
#pragma once
#include "cpu/kernels_attention.h"
#include "cpu/kernels_dropout.h"
#include "cpu/kernels_gemm.h"
#include "cpu/kernels_quantize.h"
#include "cpu/kernels_roofline.h"
#include "cpu/kernels_rowwise.h"
#include "cpu/kernels_weights.h"

namespace tilewright {

struct KernelTable {
  const char* isa = "";
  GemmKernels gemm_f32;       // operands of any float dtype, float32 accumulation
  GemmKernels gemm_split[3];  // the same by terms, for each Precision; absent without matrix units
  // bfloat16 times float32 in two terms: the weights of attention; absent without matrix units
  GemmKernels gemm_bf16_weights;
  GemmKernels gemm_bf16;     // bfloat16 times bfloat16; absent without instructions for it
  GemmKernels gemm_s8;       // int8 times int8, int32 accumulation
  GemmKernels gemm_u8;       // uint8 times int8, on the same panels
  GemmKernels gemm_s8_once;  // the same where sums are scaled once, at the end of K
  GemmKernels gemm_u8_once;
  WeightKernels weights;  // quantized right-hand sides, by floats or group by group
  QuantizeKernels quantize;
  AttentionKernels attention;
  DecodeKernels decode;
  RooflineKernels roofline;
  ElementKernels element;
  LayernormKernels layernorm;
  SoftmaxKernels softmax;
  OptimKernels optim;
  DropoutKernels dropout;
  RopeKernels rope;
  MseKernels mse;
};

#define TILEWRIGHT_DECLARE_LEVEL(level) \
  namespace level {                     \
  void fill_gemm(KernelTable&);         \
  void fill_qgemm(KernelTable&);        \
  void fill_weights(KernelTable&);      \
  void fill_quantize(KernelTable&);     \
  void fill_attention(KernelTable&);    \
  void fill_decode(KernelTable&);       \
  void fill_roofline(KernelTable&);     \
  void fill_roofline_dot(KernelTable&); \
  void fill_elementwise(KernelTable&);  \
  void fill_layernorm(KernelTable&);    \
  void fill_softmax(KernelTable&);      \
  void fill_optim(KernelTable&);        \
  void fill_dropout(KernelTable&);      \
  void fill_rope(KernelTable&);         \
  void fill_mse(KernelTable&);          \
  }
TILEWRIGHT_DECLARE_LEVEL(generic)
TILEWRIGHT_DECLARE_LEVEL(avx2)
TILEWRIGHT_DECLARE_LEVEL(avx512)
TILEWRIGHT_DECLARE_LEVEL(neon)
#undef TILEWRIGHT_DECLARE_LEVEL

// Levels that are another one's but for a few kernels.
namespace neon_dot {
void fill_qgemm_dot(KernelTable&);
}
namespace avx512_vnni {
void fill_qgemm(KernelTable&);
void fill_qgemm_vnni(KernelTable&);
void fill_roofline_dot(KernelTable&);
}  // namespace avx512_vnni
namespace avx512_bf16 {
void fill_gemm_bf16(KernelTable&);
void fill_roofline_dot(KernelTable&);
}  // namespace avx512_bf16
namespace amx {
void fill_gemm_amx(KernelTable&);
void fill_gemm_split(KernelTable&);
void fill_attention_amx(KernelTable&);
void fill_roofline_amx(KernelTable&);
}  // namespace amx

}  // namespace tilewright
