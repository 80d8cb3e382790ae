// matmul: which kernel, and with which tiles.
//
//     operands                  by                                        kernel
//     both bfloat16, float16    tensor cores                              matmul_mma.cu
//     both float32              precision highest: multiply-adds          matmul_ffma.cu
//                               high, medium: tensor cores, TF32          matmul_mma.cu
//     of unlike types           multiply-adds, in float32                 matmul_ffma.cu
//
// The kernel follows from dtypes and precision alone, the tiles from the size: those don't change an
// output's bits.
#include "cuda/kernels.h"
#include "cuda/matmul.h"
#include "tilewright/errors.h"
#include "tilewright/options.h"

namespace tilewright::cuda {
namespace {

// Large tiles keep every processor of the smaller cards at work from this number on.
constexpr std::int64_t kManyBlocks = 64;
constexpr std::int64_t kFewRows = 16;

}  // namespace

TileSize tile_size(const Product& p) {
  if (p.M <= kFewRows) return TileSize::flat;
  return blocks_of(p, 128, 128) >= kManyBlocks ? TileSize::large : TileSize::medium;
}

void matmul(const Matmul& op, TileSize size) {
  const bool alike = op.a.dtype == op.b.dtype, wide = op.a.dtype == DType::f32;
  Product p = product_of(op.a, op.b, op.residual, op.out, alike ? op.a.dtype : DType::f32);
  set_bias(p, op.bias);
  p.alpha = op.alpha, p.activation = op.activation;
  const Precision exact = precision();
  if (!alike || (wide && exact == Precision::highest)) return matmul_ffma(p, size);
  matmul_mma(p, size,
             op.a.dtype == DType::bf16  ? Multiply::bf16
             : op.a.dtype == DType::f16 ? Multiply::f16
             : exact == Precision::high ? Multiply::tf32x3
                                        : Multiply::tf32);
}

void matmul(const Matmul& op) {
  if (op.packed) {
    throw UnsupportedError(
        "matmul: b must not be packed on a GPU: packing is for the CPU's caches");
  }
  if (op.out.size() == 0) return;
  const Product p = product_of(op.a, op.b, op.residual, op.out, op.a.dtype);
  matmul(op, tile_size(p));
}

}  // namespace tilewright::cuda
