// Few rows of floats times weights that are narrow in memory (16 bits, or quantized), which are read once,
// as they lie there:
//
//   for each few panels of B           (K, NR) side by side: `wide` of kernels_weights.h
//     for k in K by KC                 their blocks (KC, NR), while the next ones are fetched
//       the kernel                     words to floats in registers, times all rows of A
//
// A's rows are read where they are; those that aren't contiguous floats become such rows first, once
// for all tasks.
//
// Parameter  bounded by
// KC         gemm_f32's, which the order of the sums follows; and so far ahead, KC lines of each panel,
//            memory is asked: beyond its latency, within L2
//
// Numerics: those of gemm_f32 with the floats that the weights stand for, bit for bit.
#include "cpu/gemm_weights.h"

#include <algorithm>

#include "core/parallel.h"
#include "core/scratch.h"
#include "cpu/gemm_block.h"

namespace tilewright::cpu {
namespace {

// From row k of a panel to row `next` of another.
WeightAhead distance(const WeightPanel& panel, int64_t k, const WeightPanel& to, int64_t next,
                     int NR) {
  return {to.words - panel.words + (next / 2 - k / 2) * panel.line_bytes(NR),
          to.scale - panel.scale + (next / panel.group - k / panel.group) * panel.ld};
}

}  // namespace

FewRows::FewRows(const Gemm& p, const GemmKernels& g)
    : p_(p),
      g_(g),
      in_place_(p.a.dtype == DType::f32 && p.a.col == 1),
      lda_(in_place_ ? p.a.row : round_up(p.K, g.NR)),
      copy_(in_place_ ? 0 : (p.M * lda_ + kPackSlack) * 4),
      rows_(in_place_ ? static_cast<const float*>(p.a.data) : copy_.as<float>()) {
  if (in_place_) return;
  for (int64_t i = 0; i < p.M; ++i) {
    for (int64_t k = 0; k < p.K; k += g.NR) {  // as columns are packed, a line of a panel each time
      const int n = int(std::min<int64_t>(g.NR, p.K - k));
      g.pack_b(p.a, k, n, i, 1, p.M, copy_.as<float>() + i * lda_ + k);
    }
  }
}

void FewRows::multiply(int64_t i0, int64_t mc, int64_t j0, int64_t nt) const {
  const WeightKernels& w = *p_.weights;
  const int64_t NR = g_.NR, tile = w.few * NR, wide = w.wide * NR, end = j0 + nt;
  const Scratch sums(w.wide * tile * 4);
  for (int64_t j = j0; j < end; j += wide) {
    const WeightPanel panel = p_.packed->panel(j);
    const int panels = int(divide_up(std::min(wide, end - j), NR));
    int64_t k = 0;
    do {  // without any K there is still a store
      const int64_t kc = std::min<int64_t>(g_.KC, p_.K - k), next = k + kc;
      WeightAhead ahead;
      if (next < p_.K) {
        ahead = distance(panel, k, panel, next, g_.NR);
      } else if (j + wide < end) {
        ahead = distance(panel, k, p_.packed->panel(j + wide), 0, g_.NR);
      }
      w.tiles(
          {int(mc), panels, rows_ + i0 * lda_ + k, lda_, panel, k, kc, ahead, sums.as<float>()});
      poll_after(0.04 * double(mc * panels * NR * kc));  // K may be as long as a caller likes
      k = next;
    } while (k < p_.K);
    for (int c = 0; c < panels; ++c) {
      const int64_t at = j + c * NR;
      const int nr = int(std::min(NR, end - at));
      g_.store(sums.as<float>() + c * tile, i0, int(mc), at, nr, p_.epilogue);
    }
  }
}

}  // namespace tilewright::cpu
