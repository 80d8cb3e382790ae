// pack: a right-hand side checked, then put into the panels of the active ISA level.
#include "tilewright/pack.h"

#include <utility>

#include "core/check.h"
#include "core/device.h"
#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "ops/batch.h"
#include "ops/qgemm.h"

namespace tilewright {

namespace {

const Check check{"pack", Check::on_gpu_too};

// By whose words a matrix is packed. Floats of 16 bits keep them: those of kernels_weights.h.
GemmKernels layout_of(DType dtype, const KernelTable& table) {
  if (dtype == DType::s8) return table.gemm_s8;
  GemmKernels g = table.gemm_f32;
  if (dtype != DType::f32) g.k_per_word = 2, g.pack_b = table.weights.pack;
  return g;
}

void refuse_gpu(const View& b) {
  if (!on_gpu(b)) return;
  check.unsupported("b must be on the CPU; kernels of a GPU read matrices as they are, unpacked");
}

}  // namespace

PackedMatrix packed_matrix(const View& b, Prefer prefer) {
  check.dtype("b", b, {DType::f32, DType::bf16, DType::f16, DType::s8});
  refuse_gpu(b);
  if (b.rank != 2) check.shape_error("b must have 2 axes, (K, N), got shape " + format_shape(b));
  const KernelTable& table = kernels();
  return PackedMatrix({b.data, b.dtype, b.stride[0], b.stride[1]}, b.shape[0], b.shape[1],
                      layout_of(b.dtype, table), table.isa, prefer == Prefer::latency);
}

PackedMatrix packed_matrix(const QuantizedView& b) {
  check_view(check, "b", b);
  refuse_gpu(b.data);
  const KernelTable& table = kernels();
  return PackedMatrix(b, table.gemm_s8, table.isa, true);
}

Packed pack(const View& b, Prefer prefer) {
  return std::make_shared<const PackedMatrix>(packed_matrix(b, prefer));
}

Packed pack(const QuantizedView& b) {
  return std::make_shared<const PackedMatrix>(packed_matrix(b));
}

PackedInfo info(const PackedMatrix& b) {
  return {b.K, b.N, b.dtype, b.bits, b.isa, b.nbytes()};
}

void unpack(const PackedMatrix& b, const View& out) {
  const Check check{"dequantize"};
  if (!b.bits) check.dtype_error("q must be packed from a QuantizedArray");
  const KernelTable& table = kernels();
  check_packed_level(check, &b, table.isa, "q");
  check.output("out", out, {DType::f32});
  check.shape("out", out, {b.K, b.N}, "for the packed matrix");
  unpack(b, table.weights, table.gemm_f32, out);
}

}  // namespace tilewright
