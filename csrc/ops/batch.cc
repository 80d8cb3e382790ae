#include "ops/batch.h"

#include <algorithm>

#include "core/dtype.h"
#include "core/parallel.h"

namespace tilewright {
namespace {

// Extent and stride of v's leading axis `d` of `rank` leading axes, aligned right.
struct Axis {
  int64_t extent, stride;
};
Axis leading_axis(const View& v, int d, int rank) {
  const int own = v.rank - 2 - (rank - d);
  if (own < 0) return {1, 0};
  return {v.shape[own], v.shape[own] == 1 ? 0 : v.stride[own]};
}

void broadcast(const Check& check, const ProductViews& v, Product& product) {
  product.rank = std::max(v.a.rank, v.packed ? 2 : v.b.rank) - 2;
  for (int d = 0; d < product.rank; ++d) {
    const Axis a = leading_axis(v.a, d, product.rank);
    const Axis b = v.packed ? Axis{1, 0} : leading_axis(v.b, d, product.rank);
    if (a.extent != b.extent && a.extent != 1 && b.extent != 1) {
      check.shape_error(std::string("leading axes of ") + v.b_name +
                        " must broadcast against those of a " + format_shape(v.a) + ", got " +
                        format_shape(v.b));
    }
    product.shape[d] = a.extent == 1 ? b.extent : a.extent;
    product.a[d] = a.stride;
    product.b[d] = b.stride;
  }
}

void check_inner_extent(const Check& check, const ProductViews& v, Product& product) {
  product.M = v.a.shape[v.a.rank - 2];
  product.K = v.a.shape[v.a.rank - 1];
  product.N = v.packed ? v.packed->N : v.b.shape[v.b.rank - 1];
  if ((v.packed ? v.packed->K : v.b.shape[v.b.rank - 2]) == product.K) return;
  check.shape_error(std::string(v.b_name) + " must have " + std::to_string(product.K) +
                    " rows to match the last axis of a " + format_shape(v.a) + ", got " +
                    (v.packed ? "a packed matrix of " + std::to_string(v.packed->K) + " x " +
                                    std::to_string(v.packed->N)
                              : format_shape(v.b)));
}

// The view's last two axes.
Matrix matrix_of(const View& v) {
  return {v.data, v.dtype, v.stride[v.rank - 2], v.stride[v.rank - 1]};
}

void advance(Matrix& m, int64_t elements) {
  m.data = static_cast<const char*>(m.data) + elements * dtype_size(m.dtype);
}

// (…, M, K) @ (K, N): rows of neighbouring leading axes become one tall matrix where strides allow;
// so one product of weights is one gemm, however the batch is shaped. A matrix of one row has no
// row stride of its own: it takes the batch's.
void merge_rows(Product& p, Gemm& gemm) {
  Matrix* const rows[] = {&gemm.a, &gemm.epilogue.residual, &gemm.epilogue.out};
  for (; p.rank > 0; --p.rank) {
    const int d = p.rank - 1;
    const int64_t step[] = {p.a[d], p.residual[d], p.out[d]};
    if (p.b[d] != 0) break;
    bool regular = true;
    for (int m = 0; m < 3; ++m) {
      if (p.M == 1) rows[m]->row = step[m];
      regular = regular &&
                (!rows[m]->data || p.M == 1 || p.shape[d] == 1 || step[m] == p.M * rows[m]->row);
    }
    if (!regular) break;
    p.M *= p.shape[d];
  }
  gemm.M = p.M;
}

}  // namespace

Product check_product(const Check& check, const ProductViews& v,
                      std::initializer_list<DType> out_dtypes) {
  Product product;
  check_inner_extent(check, v, product);
  broadcast(check, v, product);
  int64_t want[kMaxRank];
  std::copy(product.shape, product.shape + product.rank, want);
  want[product.rank] = product.M, want[product.rank + 1] = product.N;
  check.output("out", v.out, out_dtypes);
  check.shape("out", v.out, want, product.rank + 2, "for the product of a", &v.a);
  check.no_overlap("out", v.out, "a", v.a);
  check.no_overlap("out", v.out, v.b_name, v.b);
  if (v.residual) {
    check.dtype("residual", v.residual, kFloats);
    check.same_shape("residual", v.residual, v.out, "the product");
    check.no_overlap("out", v.out, "residual", v.residual, true);
  }
  for (int d = 0; d < product.rank; ++d) {
    product.out[d] = v.out.stride[d];
    product.residual[d] = v.residual ? v.residual.stride[d] : 0;
  }
  return product;
}

void check_bias(const Check& check, const View& bias, const Product& product, const View& out) {
  if (!bias) return;
  check.dtype("bias", bias, kFloats);
  check.shape("bias", bias, {product.N}, "to match the last axis of the product");
  check.no_overlap("out", out, "bias", bias);
}

void check_packed_level(const Check& check, const PackedMatrix* packed, const char* isa,
                        const char* name) {
  if (!packed || packed->isa == isa) return;
  check.unsupported(std::string(name) + " was packed for ISA level " + packed->isa +
                    ", the active one is " + isa + "; pack it again");
}

std::string format_product(const Product& product) {
  return std::to_string(product.count()) + "x" + std::to_string(product.M) + "x" +
         std::to_string(product.N) + "x" + std::to_string(product.K);
}

const float* widen(const View& vector, float* out) {
  for (int64_t j = 0; j < vector.shape[0]; ++j) {
    out[j] = load_float(vector.data, j * vector.stride[0], vector.dtype);
  }
  return out;
}

void run_product(Product product, const ProductViews& v, const Epilogue& epilogue,
                 const GemmKernels& kernels, const WeightKernels* weights) {
  if (v.out.size() == 0) return;
  Gemm base{product.M, product.N, product.K, matrix_of(v.a), {}, v.packed, epilogue, weights};
  if (!v.packed) base.b = matrix_of(v.b);
  base.epilogue.out = matrix_of(v.out);
  if (v.residual) base.epilogue.residual = matrix_of(v.residual);
  merge_rows(product, base);
  describe(base, kernels);

  const auto element = [&](int64_t index) {
    Gemm p = base;
    if (p.epilogue.scale_a) p.epilogue.scale_a += index * product.M;
    if (p.epilogue.offset_a) p.epilogue.offset_a += index * product.M;
    for (int d = product.rank - 1; d >= 0; --d) {
      const int64_t i = index % product.shape[d];
      index /= product.shape[d];
      advance(p.a, i * product.a[d]);
      if (!v.packed) advance(p.b, i * product.b[d]);
      if (v.residual) advance(p.epilogue.residual, i * product.residual[d]);
      advance(p.epilogue.out, i * product.out[d]);
    }
    return p;
  };
  const int64_t count = product.count();
  constexpr double kLarge = 1e9;  // flops of one product from which its own tiles are parallel
  const double flops = 2.0 * double(product.M) * double(product.N) * double(product.K);
  if (count == 1 || flops >= kLarge || count < num_threads()) {
    for (int64_t i = 0; i < count; ++i) gemm(element(i), kernels);
  } else {
    parallel_for(count, double(count) * (gemm_ns(product.M, product.N, product.K, kernels) + 300),
                 [&](int64_t i) { gemm_serial(element(i), kernels); });
  }
}

}  // namespace tilewright
