// int8_matmul and qmatmul: the dtypes and scales, then a product (ops/batch.h).
#include "ops/qgemm.h"

#include <optional>
#include <string>

#include "core/check.h"
#include "core/device.h"
#include "core/dtype.h"
#include "core/scratch.h"
#include "core/size.h"
#include "core/trace.h"
#include "cpu/isa.h"
#include "cpu/quantize.h"
#include "cuda/kernels.h"
#include "ops/batch.h"
#include "tilewright/ops.h"

namespace tilewright {
namespace {

const Check check_int8{"int8_matmul", Check::on_gpu_too};
const Check check_quantized{"qmatmul", Check::on_gpu_too};

void check_right(const Check& check, const View& b, const PackedMatrix* packed) {
  if (packed) {
    if (packed->dtype == DType::s8 && packed->bits != 4) return;
    check.dtype_error(std::string("b must be packed from int8, got one packed from ") +
                      (packed->bits == 4 ? "4 bits" : dtype_name(packed->dtype)));
  }
  check.dtype("b", b, {DType::s8});
  check.rank("b", b, 2, "(..., K, N)");
}

void check_weights(const PackedMatrix* packed) {
  if (packed->bits) return;
  if (packed->dtype != DType::s8) {
    check_quantized.dtype_error(std::string("qb must be packed from a QuantizedArray, got one "
                                            "packed from ") +
                                dtype_name(packed->dtype));
  }
  check_quantized.dtype_error("qb must be packed from a QuantizedArray, got bare int8");
}

void check_row_numbers(const char* name, const View& v, int64_t M) {
  check_quantized.dtype(name, v, {DType::f32});
  if (v.rank > 0) check_quantized.shape(name, v, {M}, "to match the rows of a");
}

// A number for each row of each matrix, from () or (M,).
void row_numbers(const View& v, int64_t rows, int64_t M, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    out[i] = v.ptr<float>()[v.rank ? i % M * v.stride[0] : 0];
  }
}

// A contiguous int8 view of a's shape.
View view_like(const View& a, int8_t* data) {
  View v = a;
  v.data = data;
  v.dtype = DType::s8;
  int64_t stride = 1;
  for (int d = v.rank - 1; d >= 0; --d) {
    v.stride[d] = stride;
    stride *= v.shape[d];
  }
  return v;
}

}  // namespace

void check_view(const Check& check, const char* name, const QuantizedView& b) {
  check.dtype(name, b.data, {DType::s8, DType::u8});
  if (b.data.rank != 2) {
    check.shape_error(std::string(name) + " must have 2 axes, (K, N), got shape " +
                      format_shape(b.data));
  }
  const int64_t N = b.data.shape[1], lines = b.bits == 4 ? (b.K + 1) / 2 : b.K;
  if (b.bits != 4 && b.bits != 8) {
    check.unsupported(std::string(name) + " must have 4 or 8 bits, got " + std::to_string(b.bits));
  }
  check.shape(name, b.data, {lines, N}, "for its bits and rows");
  for (const View* v : {&b.scale, &b.offset}) {
    if (v == &b.offset && !*v) continue;
    const char* which = v == &b.scale ? "scale" : "offset";
    check.dtype(which, *v, {DType::f32});
    if (b.group > 0) {
      check.shape(which, *v, {(b.K + b.group - 1) / b.group, N}, "for groups along K");
    } else if (v->rank > 0) {
      check.shape(which, *v, {N}, "to match the columns of b");
    }
  }
}

void check_operands(const Int8Matmul& op) {
  check_int8.dtype("a", op.a, {DType::s8, DType::u8});
  check_int8.rank("a", op.a, 2, "(..., M, K)");
  check_right(check_int8, op.b, op.packed);
}

void run(const Int8Matmul& op) {
  check_operands(op);
  const View none{};
  const ProductViews views{op.a, op.b, op.packed, none, op.out};
  const Product product = check_product(check_int8, views, {DType::s32});
  const KernelTable& table = kernels();
  const Trace trace("int8_matmul", level_of(op.a, table.isa),
                    [&] { return format_product(product); });
  if constexpr (kHasGpu) {
    if (on_gpu(op.a)) return cuda::int8_matmul(op);
  }
  check_packed_level(check_int8, op.packed, table.isa);
  run_product(product, views, {},
              op.a.dtype == DType::u8 ? table.gemm_u8_once : table.gemm_s8_once);
}

void check_operands(const QuantizedMatmul& op) {
  if (op.scale_a) {
    check_quantized.dtype("a", op.a, {DType::s8, DType::u8});
    if (op.compute == Compute::floats) {
      check_quantized.dtype_error("a must be a float where compute is 'float', got " +
                                  std::string(dtype_name(op.a.dtype)));
    }
  } else {
    check_quantized.dtype("a", op.a, kFloats);
  }
  check_quantized.rank("a", op.a, 2, "(..., M, K)");
  op.packed ? check_weights(op.packed) : check_view(check_quantized, "qb", op.b);
}

namespace {

// y = matmul(a, b): b becomes floats on its way into the registers.
void run_floats(const QuantizedMatmul&, const Product& shape, const ProductViews& views,
                Epilogue epilogue, const KernelTable& table) {
  run_product(shape, views, epilogue, table.gemm_f32, &table.weights);
}

void run_integers(const QuantizedMatmul& op, const Product& shape, const ProductViews& given,
                  Epilogue epilogue, const KernelTable& table) {
  const PackedMatrix& b = *given.packed;
  if (b.groups > 1 && b.group % 2) {
    check_quantized.unsupported("qb must have groups of even size where compute is 'int8', got " +
                                std::to_string(b.group));
  }
  const int64_t rows = shape.count() * shape.M;
  const Scratch data(op.scale_a ? 0 : product_of({rows, shape.K}));
  const Scratch scale_a(product_of({rows, 4}));
  const Scratch offset_a(op.offset_a ? product_of({rows, 4}) : 0);
  epilogue.scale_a = scale_a.as<float>();
  epilogue.scale_b = b.scale.data();
  const WeightKernels* weights =
      b.bits == 8 && b.one_scale() && !op.offset_a ? nullptr : &table.weights;
  if (op.offset_a) {
    row_numbers(op.offset_a, rows, shape.M, offset_a.as<float>());
    epilogue.offset_a = offset_a.as<float>();
    epilogue.column_sums = b.column_sums.data();
  }
  if (op.scale_a) {
    row_numbers(op.scale_a, rows, shape.M, scale_a.as<float>());
    const GemmKernels& g = weights ? (op.a.dtype == DType::u8 ? table.gemm_u8 : table.gemm_s8)
                           : op.a.dtype == DType::u8 ? table.gemm_u8_once
                                                     : table.gemm_s8_once;
    return run_product(shape, given, epilogue, g, weights);
  }
  cpu::quantize_rows(op.a, data.as<int8_t>(), scale_a.as<float>(), table.quantize);
  const View a = view_like(op.a, data.as<int8_t>());
  const ProductViews views{a, given.b, &b, op.residual, op.out, "qb"};
  run_product(check_product(check_quantized, views, kFloats), views, epilogue,
              weights ? table.gemm_s8 : table.gemm_s8_once, weights);
}

// The shape that qb stands for, before it is packed. Bytes hold two rows of 4 bits: the view has no
// strides, and its overlap with `out` is checked by the bytes themselves.
View logical(const QuantizedView& b) {
  View v = b.data;
  v.shape[0] = b.K;
  v.stride[0] = v.stride[1] = 0;
  return v;
}

}  // namespace

void run(const QuantizedMatmul& op) {
  check_operands(op);
  const View right = op.packed ? View{} : logical(op.b);
  const ProductViews given{op.a, right, op.packed, op.residual, op.out, "qb"};
  const Product shape = check_product(check_quantized, given, kFloats);
  check_bias(check_quantized, op.bias, shape, op.out);
  if (!op.packed) check_quantized.no_overlap("out", op.out, "qb", op.b.data);
  for (const View* v : {&op.b.data, &op.b.scale, &op.b.offset, &op.scale_a, &op.offset_a}) {
    if (!*v || v->device == op.a.device) continue;
    throw DeviceError(
        "qmatmul: a, qb, their scales and offsets must be in one memory, the GPU's or "
        "the CPU's");
  }
  if (op.scale_a) check_row_numbers("scale_a", op.scale_a, shape.M);
  if (op.offset_a) check_row_numbers("offset_a", op.offset_a, shape.M);
  const KernelTable& table = kernels();
  if (!on_gpu(op.a)) check_packed_level(check_quantized, op.packed, table.isa, "qb");
  if (op.out.size() == 0) return;
  const Trace trace("qmatmul", level_of(op.a, table.isa), [&] { return format_product(shape); });
  if constexpr (kHasGpu) {
    if (on_gpu(op.a)) return cuda::quantized_matmul(op);
  }

  std::optional<PackedMatrix> made;
  if (!op.packed) {
    made.emplace(op.b, table.gemm_s8, table.isa, bool(op.offset_a));
    if (Trace::described()) Trace::note("qb is packed in every call: tw.pack(qb) does it once");
  }
  const View none{};
  const ProductViews views{op.a, none, made ? &*made : op.packed, op.residual, op.out, "qb"};
  const Scratch bias(op.bias ? product_of({shape.N, 4}) : 0);
  Epilogue epilogue;
  epilogue.activation = op.activation;
  if (op.bias) epilogue.bias = widen(op.bias, bias.as<float>());
  const auto compute = op.compute == Compute::floats ? run_floats : run_integers;
  compute(op, shape, views, epilogue, table);
}

}  // namespace tilewright
