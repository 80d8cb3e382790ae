// matmul: the dtypes, then a product (ops/batch.h).
#include "core/check.h"
#include "core/device.h"
#include "core/dtype.h"
#include "core/scratch.h"
#include "core/size.h"
#include "core/trace.h"
#include "cpu/isa.h"
#include "cuda/kernels.h"
#include "ops/batch.h"
#include "tilewright/ops.h"

namespace tilewright {
namespace {

const Check check{"matmul", Check::on_gpu_too};

}  // namespace

void check_operands(const Matmul& op) {
  check.dtype("a", op.a, kFloats);
  check.rank("a", op.a, 2, "(..., M, K)");
  if (op.packed) {
    if (op.packed->dtype != DType::s8) return;
    check.dtype_error("b must be packed from floats, got one packed from int8");
  }
  check.dtype("b", op.b, kFloats);
  check.rank("b", op.b, 2, "(..., K, N)");
}

void run(const Matmul& op) {
  check_operands(op);
  const ProductViews views{op.a, op.b, op.packed, op.residual, op.out};
  const Product product = check_product(check, views, kFloats);
  check_bias(check, op.bias, product, op.out);
  const KernelTable& table = kernels();
  const Trace trace("matmul", level_of(op.a, table.isa), [&] { return format_product(product); });
  if constexpr (kHasGpu) {
    if (on_gpu(op.a)) return cuda::matmul(op);
  }
  check_packed_level(check, op.packed, table.isa);

  Epilogue epilogue;
  epilogue.alpha = op.alpha;
  epilogue.activation = op.activation;
  const Scratch bias(op.bias ? product_of({product.N, 4}) : 0);
  if (op.bias) epilogue.bias = widen(op.bias, bias.as<float>());
  run_product(product, views, epilogue, table.gemm_f32);
}

}  // namespace tilewright
