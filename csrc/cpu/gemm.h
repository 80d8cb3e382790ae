// The five loops around the micro-kernel, for any kernel family of the table, and right-hand sides
// packed once.
#pragma once
#include <memory>
#include <vector>

#include "cpu/kernels_gemm.h"
#include "cpu/kernels_weights.h"
#include "tilewright/ops.h"

namespace tilewright {

// B (K, N) in panels, as gemm() packs it itself: N/NR panels of (K, NR) words, one after the other.
// Floats of 16 bits and a quantized B keep their bits; their words are those of kernels_weights.h, which
// of bfloat16 are gemm_bf16's own and at 8 bits gemm_s8's.
class PackedMatrix {
 public:
  PackedMatrix(const Matrix& b, int64_t K, int64_t N, const GemmKernels& g, const char* isa,
               bool latency = false);
  // g: gemm_s8. The view has been checked (ops/qgemm.cc).
  // with_sums: column_sums too, which products with offsets of a need.
  PackedMatrix(const QuantizedView& b, const GemmKernels& g, const char* isa, bool with_sums);

  int64_t K, N;
  DType dtype;           // of the matrix it was made from
  const char* isa;       // the level whose layout this is
  bool latency = false;  // float32 is multiplied by gemm_f32, whatever else the level has
  const char* data() const { return data_.get(); }
  int64_t nbytes() const;

  // Of a quantized matrix; bits is 0 for others.
  int bits = 0, shift = 0;
  int64_t group = 0, groups = 0;     // elements of K that share a scale; how many scales a column
  std::vector<float> scale, offset;  // (groups, N rounded up to NR); offset may be empty
  std::vector<float> column_sums;    // (N,) of the matrix that is represented; may be empty
  // One scale a column and nothing else: sums of integers are scaled once, by gemm_s8's epilogue.
  bool one_scale() const { return groups == 1 && shift == 0 && offset.empty(); }
  // What stays narrow: whether B does, and its columns from j on, a multiple of NR.
  bool narrow() const { return bits || dtype == DType::bf16 || dtype == DType::f16; }
  WeightPanel panel(int64_t j) const;

 private:
  WeightPanel panel_of_halves(int64_t j) const;
  struct Free {
    void operator()(char* p) const;
  };
  void allocate(int64_t bytes);
  std::unique_ptr<char, Free> data_;
  int64_t bytes_;
};

// The floats that a quantized matrix represents, into out (K, N) float32.
void unpack(const PackedMatrix& b, const WeightKernels& w, const GemmKernels& g, const View& out);

struct Gemm {
  int64_t M, N, K;
  Matrix a;  // (M, K)
  Matrix b;  // (K, N); unused when packed
  const PackedMatrix* packed = nullptr;
  Epilogue epilogue;
  // With a narrow `packed`: under float32 kernels B is read as floats, under gemm_s8 a quantized one's
  // groups and offsets count (without this: one scale a column).
  const WeightKernels* weights = nullptr;
};

// What the trace says of the product: the kernel's name, its tile, and why no faster one.
void describe(const Gemm& p, const GemmKernels& g);

// What a product takes one core, estimated (as core/parallel.h wants it).
double gemm_ns(int64_t M, int64_t N, int64_t K, const GemmKernels& g);

// Parallel over tiles of the output.
void gemm(const Gemm& p, const GemmKernels& g);
// On the calling thread alone: for callers that are parallel over a batch.
void gemm_serial(const Gemm& p, const GemmKernels& g);

}  // namespace tilewright
