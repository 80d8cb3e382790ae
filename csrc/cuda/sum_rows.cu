// out[c] = sum over rows of x[r][c].
//
//     x (rows, C)                        a thread adds a column of 64 rows, lanes take neighbouring
//     |  64 rows  | -> row 0 of sums     columns: whole sectors. The sums are rows again, and are
//     |  64 rows  | -> row 1             summed likewise until one is left.
//     |  the rest | -> row 2
//
// kSumHeight   64: chains are short (their rounding grows with the length), and the sums are 1/64 of
//              what was read. Bound by memory.
//
// Numerics: float32 in one fixed order, whatever the grid; no atomics.
#include "cuda/each.h"
#include "cuda/kernels.h"
#include "cuda/workspace.h"

namespace tilewright::cuda {
namespace {

template <class Element>
__global__ void sum_rows_kernel(Rows x, Rows sums, std::int64_t rows, std::int64_t C,
                                std::int64_t blocks) {
  const std::int64_t i = each_index();
  if (i >= blocks * C) return;
  const std::int64_t block = i / C, c = i % C;
  const std::int64_t last = min(rows, (block + 1) * kSumHeight);
  float sum = 0;
  for (std::int64_t r = block * kSumHeight; r < last; ++r) {
    sum += x.load<Element>(x.row(r) + c * x.step);
  }
  sums.store<Element>(sums.row(block) + c * sums.step, sum);
}

void sum_blocks(const View& x, const View& sums, std::int64_t blocks) {
  const std::int64_t rows = x.shape[0], C = x.shape[1];
  with_element({&x, &sums}, [&](auto element) {
    launch_each("sum_rows", sum_rows_kernel<decltype(element)>, blocks * C, rows_of(x),
                rows_of(sums), rows, C, blocks);
  });
}

}  // namespace

void sum_rows(const SumRows& op) {
  const std::int64_t blocks = sum_blocks_of(op.x.shape[0]), C = op.x.shape[1];
  if (blocks <= 1) return sum_blocks(op.x, op.out, 1);
  const Matrix sums(blocks, C);
  sum_blocks(op.x, sums.view(), blocks);
  sum_rows({sums.view(), op.out});
}

}  // namespace tilewright::cuda
