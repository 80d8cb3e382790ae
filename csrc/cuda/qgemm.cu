// int8_matmul and qmatmul: what is quantized, and which kernel multiplies.
//
//     int8_matmul                       int8_mma.cu, out in int32
//     qmatmul by integers, a of floats  its rows are quantized into a workspace (quantize.cu)
//                          8 bits       int8_mma.cu, b as it lies
//                          4 bits       int8_mma.cu, unpacked on the way into shared memory
//     qmatmul by floats                 matmul_ffma.cu, b made floats on the way into shared memory:
//                                       the bits are those of matmul(a, dequantized b)
//                          few rows     qgemm_decode.cu: the same bits
#include "cuda/int8.h"
#include "cuda/kernels.h"
#include "cuda/matmul.h"

namespace tilewright::cuda {
namespace {

constexpr unsigned kThreads = 128;

[[noreturn]] void refuse_packed(const char* op, const char* name) {
  throw UnsupportedError(std::string(op) + ": " + name +
                         " must not be packed on a GPU: packing is for the CPU's caches");
}

// sums[j] = sum over k of b(k, j), group by group in ascending order.
__global__ void sum_columns_kernel(const __grid_constant__ Weights b, std::int64_t K,
                                   std::int64_t N, float* sums) {
  const std::int64_t j = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= N) return;
  float sum = 0.0f;
  for (std::int64_t g = 0; g < b.groups; ++g) {
    const std::int64_t begin = g * b.group, end = min(begin + b.group, K);
    std::int64_t integers = 0;
    for (std::int64_t k = begin; k < end; ++k) integers += b.integer(j, k);
    sum = fmaf(static_cast<float>(integers), b.scale.at(g, j), sum);
    if (b.offset.data) sum = fmaf(static_cast<float>(end - begin), b.offset.at(g, j), sum);
  }
  sums[j] = sum;
}

RowNumbers row_numbers(const View& v, std::int64_t M) {
  if (!v) return {};
  return {v.ptr<float>(), v.rank ? v.stride[0] : 0, v.rank ? M : 1};
}

// (K, N) of bytes, one for each element: what a product of 8 bits reads. For 4 bits only its shape
// counts.
View logical(const QuantizedView& b) {
  View v = b.data;
  v.shape[0] = b.K;
  return v;
}

View dense_like(const View& a, std::int8_t* data) {
  View v = a;
  v.data = data, v.dtype = DType::s8;
  std::int64_t stride = 1;
  for (int d = v.rank - 1; d >= 0; --d) v.stride[d] = stride, stride *= v.shape[d];
  return v;
}

// 16 bytes travel at once where an operand is dense along K, and where groups are made of them.
void settle_copies(ScaledProduct& q) {
  const bool whole = q.groups <= 1 || q.group % 16 == 0;
  q.p.a.async = q.p.a.async && whole && q.p.a_major == Major::k;
  q.p.b.async = q.p.b.async && whole && q.p.b_major == Major::k;
}

void by_integers(const QuantizedMatmul& op, const Weights& b) {
  if (b.groups > 1 && b.group % 2) {
    throw UnsupportedError(
        "qmatmul: qb must have groups of even size where compute is 'int8', got " +
        std::to_string(b.group));
  }
  const std::int64_t K = op.a.last(), N = op.b.data.shape[1];
  std::int64_t rows = 1, M = 1;  // of all matrices, of one
  for (int d = 0; d < op.a.rank - 1; ++d) M = op.a.shape[d], rows *= M;
  const gpu::Workspace data(static_cast<std::size_t>(op.scale_a ? 0 : rows * K));
  const gpu::Workspace scale_a(static_cast<std::size_t>(op.scale_a ? 0 : rows * 4));
  const gpu::Workspace sums(static_cast<std::size_t>(op.offset_a ? N * 4 : 0));
  View a = op.a;
  ScaledProduct q;
  q.scale_a = row_numbers(op.scale_a, M);
  if (!op.scale_a) {
    a = dense_like(op.a, data.as<std::int8_t>());
    q.scale_a = {scale_a.as<float>(), 1, rows};
    quantize_rows(op.a, data.as<std::int8_t>(), scale_a.as<float>());
  }
  q.p = product_of(a, logical(op.b), op.residual, op.out, a.dtype);
  set_bias(q.p, op.bias);
  q.p.activation = op.activation;
  q.a_signed = a.dtype == DType::s8, q.b_signed = b.is_signed;
  q.grouped = b.groups != 1 || !b.is_signed || b.offset.data || op.offset_a;
  q.group = b.group, q.groups = b.groups;
  q.scale_b = b.scale, q.offset_b = b.offset;
  q.offset_a = row_numbers(op.offset_a, M);
  if (op.offset_a) {
    q.column_sums = sums.as<float>();
    const auto blocks = static_cast<unsigned>((N + kThreads - 1) / kThreads);
    gpu::launch("sum_columns", sum_columns_kernel, dim3(blocks), dim3(kThreads), 0,
                gpu::current_stream(), b, K, N, sums.as<float>());
  }
  settle_copies(q);
  b.bits == 4 ? int8_mma(q, b) : int8_mma(q);
}

void by_floats(const QuantizedMatmul& op, const Weights& b) {
  Product p = product_of(op.a, logical(op.b), op.residual, op.out, DType::f32);
  p.b_major = b.line_stride == 1 && b.k_stride != 1 ? Major::line : Major::k;
  set_bias(p, op.bias);
  p.activation = op.activation;
  if (is_decode(p, b)) return qgemm_decode(p, b);
  matmul_ffma(p, tile_size(p), b);
}

}  // namespace

void int8_matmul(const Int8Matmul& op) {
  if (op.packed) refuse_packed("int8_matmul", "b");
  if (op.out.size() == 0) return;
  ScaledProduct q;
  q.p = product_of(op.a, op.b, View{}, op.out, op.a.dtype);
  q.a_signed = op.a.dtype == DType::s8;
  q.group = q.p.K > 0 ? q.p.K : 1, q.groups = 1;
  settle_copies(q);
  int8_mma(q);
}

void quantized_matmul(const QuantizedMatmul& op) {
  if (op.packed) refuse_packed("qmatmul", "qb");
  if (op.out.size() == 0) return;
  const Weights b = weights_of(op.b);
  op.compute == Compute::floats ? by_floats(op, b) : by_integers(op, b);
}

}  // namespace tilewright::cuda
