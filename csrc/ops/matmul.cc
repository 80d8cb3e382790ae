// matmul: the dtypes, then a product (ops/batch.h).
#include "core/check.h"
#include "core/device.h"
#include "core/dtype.h"
#include "core/options.h"
#include "core/scratch.h"
#include "core/size.h"
#include "core/trace.h"
#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cuda/kernels.h"
#include "ops/batch.h"
#include "tilewright/ops.h"

namespace tilewright {
namespace {

const Check check{"matmul", Check::on_gpu_too};

// Few rows are bound by reading B: up to here the float32 kernel is faster, where the number of rows
// may count (tw.options(batch_invariant=False)).
constexpr int64_t kFewRows = 8;

// From this size on float32 is multiplied by terms, where a level can. It depends on B alone: a row
// has the same bits however many others there are.
bool worth_splitting(const Product& p) {
  return p.K >= 64 && double(p.N) * double(p.K) >= 65536;
}

const GemmKernels& split_kernels(const KernelTable& table) {
  return table.gemm_split[int(precision()) - int(Precision::highest)];
}

const GemmKernels& kernels_for(const Matmul& op, const Product& p, const KernelTable& table) {
  const DType b = op.packed ? op.packed->dtype : op.b.dtype;
  if (op.a.dtype == DType::bf16 && b == DType::bf16 && table.gemm_bf16.tile) return table.gemm_bf16;
  const bool latency = op.packed && op.packed->latency;
  if (latency || (!batch_invariant() && p.M <= kFewRows)) return table.gemm_f32;
  const GemmKernels& split = split_kernels(table);
  return split.tile && worth_splitting(p) ? split : table.gemm_f32;
}

// Of the options and the machine: what they change about the choice, or why nothing.
void explain_choice(const GemmKernels& chosen, const Product& p, const KernelTable& table) {
  if (!Trace::described()) return;
  const GemmKernels& split = split_kernels(table);
  if (precision() != Precision::highest && &chosen != &split) {
    Trace::note(std::string("precision ") + precision_name(precision()) +
                ": no kernel of this level is faster and less exact for this product");
  }
  if (!batch_invariant()) {
    const bool used = split.tile && p.M <= kFewRows && worth_splitting(p);
    Trace::note(used ? "batch_invariant=False: few rows take the float32 kernel"
                     : "batch_invariant=False: it makes no difference to this product");
  }
  if (refusal()) Trace::note(refusal());
}

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
  const GemmKernels& chosen = kernels_for(op, product, table);
  explain_choice(chosen, product, table);
  const bool widens = op.packed && op.packed->narrow() && chosen.k_per_word == 1;
  run_product(product, views, epilogue, chosen, widens ? &table.weights : nullptr);
}

}  // namespace tilewright
