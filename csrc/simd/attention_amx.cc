// The softmax of a block of scores whose weights matrix units multiply, by terms.
//
//   scores (keys, NR) ──max──exp──split──> right operand, a word a term: [k][lane] = P of 2k, 2k + 1
//
// Weights go from exp to terms in registers, and are stored as floats only for who asks for them:
// storing, loading and looking at them again took as long as making the terms.
//
// Beside tiles? No: while tiles multiply, the core has one of its two units for floats of 16 lanes
// (measured: 288 multiply-adds take 38 ns alone, four products of tiles 17 ns, both together 81). A
// softmax is little else than such operations.
//
// Numerics: one rounding of the score's product with the scale, one of the difference to the
// maximum; exp within 2 ulp where there are three terms (float32). Where there are two (bfloat16) it
// grows from 2 ulp of a weight of 1 to 30 of one of e^-87. Weights below 2^-125 of the largest are 0.
// Terms are cut by integer operations, which send a tie away from zero: three terms hold all of a
// weight, so only the last one of two can feel it, 2^-17 of the weight.
#include "cpu/kernel_table.h"

// Compiled at every level, empty where there are no tiles.
#if defined(ISA_amx)

#include "simd/attention_scores.h"
#include "simd/elements.h"
#include "simd/terms.h"

namespace tilewright::ISA {
namespace {

// e^x for x up to about 0 as 2^n 2^f, f in [-1/2, 1/2] from the product with log2(e) in two parts,
// where there are three terms, or one. 2^f: minimax fits with 1 at 0 (reweighted least squares,
// relative error 2e-9 and 1e-7).
template <int Terms>
TW_INLINE Vec weight_by_terms(Vec x) {
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: the sum has no bits below 1
  const VecI lost = x < -87.0f;
  x = at_least(x, -87.0f);  // no result is subnormal: such ones take a hundred cycles
  const Vec n = fma(x, broadcast(kLog2E), magic) - magic;
  Vec f = fma(x, broadcast(kLog2E), -n), p;
  if constexpr (Terms == 3) {
    f = fma(x, broadcast(1.925963e-8f), f);
    p = broadcast(1.5353362e-4f);
    p = fma(p, f, broadcast(1.33988739e-3f));
    p = fma(p, f, broadcast(9.61843692e-3f));
    p = fma(p, f, broadcast(5.55033237e-2f));
    p = fma(p, f, broadcast(2.40226477e-1f));
    p = fma(p, f, broadcast(6.93147182e-1f));
  } else {
    p = broadcast(1.32647273e-3f);
    p = fma(p, f, broadcast(9.67151299e-3f));
    p = fma(p, f, broadcast(5.55073358e-2f));
    p = fma(p, f, broadcast(2.40222424e-1f));
    p = fma(p, f, broadcast(6.93147004e-1f));
  }
  return select(lost, Vec{}, times_power_of_two(fma(p, f, broadcast(1.0f)), n));
}

// A block that every row sees, and whose scores nothing but the scale changes: they need not be
// stored. Rounding keeps order: the largest product belongs to the largest factor.
TW_INLINE bool only_scaled(const ScoreBlock& s) {
  return !s.bias && !s.rule.begin && s.rule.softcap == 0 && !s.rule.slope && s.rule.scale > 0;
}

TW_INLINE Vec largest_score(const ScoreBlock& s, int lane) {
  Vec top[4];
  for (int c = 0; c < 4; ++c) top[c] = broadcast(-kInf);
  const float* p = s.scores + lane;
  int64_t key = 0;
  for (; key + 4 <= s.keys; key += 4, p += 4 * kPanel) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) top[c] = larger(load(p + c * kPanel), top[c]);
  }
  for (; key < s.keys; ++key, p += kPanel) top[0] = larger(load(p), top[0]);
  return larger(larger(top[0], top[1]), larger(top[2], top[3]));
}

// P of keys key and key + 1 for all lanes.
template <int Terms, bool both>
TW_INLINE void make_weights(const ScoreBlock& s, int64_t key, float scale, const Vec (&shift)[2],
                            bool floats, Vec (&sum)[2], char* weights) {
  float* const t = s.scores + key * kPanel;
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    const Vec first = weight_by_terms<Terms>(load(t + v * kWidth) * scale - shift[v]);
    Vec second = {};
    sum[v] = sum[v] + first;
    if constexpr (both) {
      second = weight_by_terms<Terms>(load(t + kPanel + v * kWidth) * scale - shift[v]);
      sum[v] = sum[v] + second;
    }
    store_terms<Terms>(first, second, key, v * kWidth, weights);
    if (floats) {
      store(t + v * kWidth, first);
      if constexpr (both) store(t + kPanel + v * kWidth, second);
    }
  }
}

template <int Terms>
void softmax_by_terms(const ScoreBlock& s, bool floats, float* max_of, float* sum_of, float* alpha,
                      void* out) {
  const auto weights = static_cast<char*>(out);
  const bool scaled = only_scaled(s);
  const float scale = scaled ? s.rule.scale : 1.0f;
  Vec shift[2], a[2], sum[2] = {};
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    const int lane = v * kWidth;
    const Vec before = load(max_of + lane);
    const Vec top = scaled ? largest_score(s, lane) * scale : score_block(s, lane);
    const Vec after = larger(top, before);
    shift[v] = shift_of(after), a[v] = rescale_factor(before, after);
    store(max_of + lane, after);
    store(alpha + lane, a[v]);
  }
  int64_t key = 0;
  for (; key + 2 <= s.keys; key += 2) {
    make_weights<Terms, true>(s, key, scale, shift, floats, sum, weights);
  }
  if (key < s.keys) {
    make_weights<Terms, false>(s, key, scale, shift, floats, sum, weights);
    key += 2;
  }
  for (; key % kStep != 0; key += 2) {
    for (int v = 0; v < 2; ++v) store_terms<Terms>(Vec{}, Vec{}, key, v * kWidth, weights);
  }
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    store(sum_of + v * kWidth, fma(load(sum_of + v * kWidth), a[v], sum[v]));
  }
}

}  // namespace

void fill_attention_amx(KernelTable& table) {
  table.attention.softmax_by_terms[2] = softmax_by_terms<2>;
  table.attention.softmax_by_terms[3] = softmax_by_terms<3>;
}

}  // namespace tilewright::ISA

#endif
