// What the kernels of matmul share with their launcher (matmul.cu).
#pragma once
#include "cuda/gpu/stream.h"
#include "cuda/product.h"
#include "cuda/weights.h"
#include "tilewright/ops.h"

namespace tilewright::cuda {

// Blocks compute tiles of these sizes. A product's bits are the same with each: an output's terms are
// added in one order, whatever its neighbours.
enum class TileSize : std::uint8_t {
  large,   // 128 x 128
  medium,  // 64 x 64: more blocks, where large ones would leave processors idle
  flat,    // 16 x 128: few rows
};
TileSize tile_size(const Product& p);

// How float32 is multiplied by tensor cores: as one TF32 term, or as two, three of whose four
// products count.
enum class Multiply : std::uint8_t { bf16, f16, tf32, tf32x3 };

// Multiply-adds of float32 that are one sum; an output is the sum of such chains, in order of k.
constexpr std::int64_t kChain = 256;

void matmul_ffma(const Product& p, TileSize size);
void matmul_ffma(const Product& p, TileSize size, const Weights& b);  // instead of p.b
void matmul_mma(const Product& p, TileSize size, Multiply kind);

// matmul_ffma for few rows and weights that lie along K (qgemm_decode.cu): its bits, from each byte of
// the weights once.
bool is_decode(const Product& p, const Weights& b);
void qgemm_decode(const Product& p, const Weights& b);

// matmul() with tiles of a given size.
void matmul(const Matmul& op, TileSize size);

}  // namespace tilewright::cuda
