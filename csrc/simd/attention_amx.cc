// The softmax of a block of scores whose weights matrix units multiply, by terms.
//
//   scores (keys, NR) ──max──exp──split──> right operand, a word a term: [k][lane] = P of 2k, 2k + 1
//
// Weights go from exp to terms in registers, and are stored as floats only for who asks for them:
// storing, loading and looking at them again took as long as making the terms.
//
// It is spread over the products of other blocks, a pair of keys at a time: units work while tiles wait
// for their operands and their stores, which a core can't look ahead over by itself.
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
#include "simd/attention_tiles.h"
#include "simd/elements.h"
#include "simd/pack.h"

namespace tilewright::ISA {
namespace {

// e^x for x up to about 0 as 2^n 2^f, f in [-1/2, 1/2]; 0 below -87, before a result would be
// subnormal: such ones take a hundred cycles. f: of the product with log2(e) in two parts, where there
// are three terms, or one. 2^f: minimax fits with 1 at 0 (reweighted least squares, relative error
// 2e-9 and 1e-7).
template <int Terms>
constexpr int kDegree = Terms == 3 ? 6 : 5;
template <int Terms>
constexpr float kPowers[] = {1.5353362e-4f,  1.33988739e-3f, 9.61843692e-3f,
                             5.55033237e-2f, 2.40226477e-1f, 6.93147182e-1f};
template <>
constexpr float kPowers<2>[] = {1.32647273e-3f, 9.67151299e-3f, 5.55073358e-2f, 2.40222424e-1f,
                                6.93147004e-1f};

struct Exponent {
  float scale;  // of scores
  Vec shift;
};

// Of scores of the first and the last 16 lanes by turns, in step, since each is one long chain, and a
// core looks ahead over too few of them to be busy.
template <int Terms, int n>
TW_INLINE void weights_of(Vec (&x)[n], const Exponent (&exponent)[2]) {
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: the sum has no bits below 1
  VecI lost[n];
  Vec power[n], f[n], p[n];
#define TW_EACH _Pragma("GCC unroll 4") for (int i = 0; i < n; ++i)
  TW_EACH x[i] = x[i] * exponent[i % 2].scale;
  TW_EACH x[i] = x[i] - exponent[i % 2].shift;
  TW_EACH lost[i] = x[i] < -87.0f;
  TW_EACH power[i] = fma(x[i], broadcast(kLog2E), magic);
  TW_EACH power[i] = power[i] - magic;
  TW_EACH f[i] = fma(x[i], broadcast(kLog2E), -power[i]);
  if constexpr (Terms == 3) {
    TW_EACH f[i] = fma(x[i], broadcast(1.925963e-8f), f[i]);
  }
  TW_EACH p[i] = broadcast(kPowers<Terms>[0]);
#pragma GCC unroll 8
  for (int d = 1; d < kDegree<Terms>; ++d) {
    TW_EACH p[i] = fma(p[i], f[i], broadcast(kPowers<Terms>[d]));
  }
  TW_EACH p[i] = fma(p[i], f[i], broadcast(1.0f));
  TW_EACH x[i] = select(lost[i], Vec{}, times_power_of_two(p[i], power[i]));
#undef TW_EACH
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

// P of keys key and, with `both`, key + 1 for all lanes.
template <int Terms, bool both>
TW_INLINE void make_weights(const ScoreBlock& s, int64_t key, const Exponent (&exponent)[2],
                            bool floats, Vec (&sum)[2], char* weights) {
  float* const t = s.scores + key * kPanel;
  constexpr int n = both ? 4 : 2;
  Vec x[n];
#pragma GCC unroll 4
  for (int i = 0; i < n; ++i) x[i] = load(t + i * kWidth);
  weights_of<Terms>(x, exponent);
#pragma GCC unroll 4
  for (int i = 0; i < n; ++i) {
    sum[i % 2] = sum[i % 2] + x[i];
    if (floats) store(t + i * kWidth, x[i]);
  }
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    store_terms<Terms>(x[v], both ? x[v + n - 2] : Vec{}, key, v * kWidth, weights);
  }
}

// The softmax in parts: pairs of keys. What looks for the maximum comes first, in one go.
template <int Terms, bool floats>
class Softmax {
 public:
  Softmax(const ScoreBlock& s, float* max_of, float* sum_of, float* alpha, void* weights)
      : s_(s), sum_of_(sum_of), weights_(static_cast<char*>(weights)) {
    const bool scaled = only_scaled(s);
    const float scale = scaled ? s.rule.scale : 1.0f;
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const int lane = v * kWidth;
      const Vec before = load(max_of + lane);
      const Vec top = scaled ? largest_score(s, lane) * scale : score_block(s, lane);
      const Vec after = larger(top, before);
      exponent_[v] = {scale, shift_of(after)}, alpha_[v] = rescale_factor(before, after);
      store(max_of + lane, after);
      store(alpha + lane, alpha_[v]);
    }
  }
  // The next pair, if one is left.
  TW_INLINE void next_part() {
    if (key_ + 2 > s_.keys) return;
    make_weights<Terms, true>(s_, key_, exponent_, floats, sum_, weights_);
    key_ += 2;
  }
  TW_INLINE void finish() {
    while (key_ + 2 <= s_.keys) next_part();
    if (key_ < s_.keys) {
      make_weights<Terms, false>(s_, key_, exponent_, floats, sum_, weights_);
      key_ += 2;
    }
    for (; key_ % kStep != 0; key_ += 2) {
      for (int v = 0; v < 2; ++v) store_terms<Terms>(Vec{}, Vec{}, key_, v * kWidth, weights_);
    }
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      store(sum_of_ + v * kWidth, fma(load(sum_of_ + v * kWidth), alpha_[v], sum_[v]));
    }
  }

 private:
  const ScoreBlock& s_;
  float* sum_of_;
  char* weights_;
  int64_t key_ = 0;
  Exponent exponent_[2];
  Vec alpha_[2], sum_[2] = {};
};

template <int Terms>
void softmax_by_terms(const ScoreBlock& s, bool floats, float* max_of, float* sum_of, float* alpha,
                      void* weights) {
  floats ? Softmax<Terms, true>(s, max_of, sum_of, alpha, weights).finish()
         : Softmax<Terms, false>(s, max_of, sum_of, alpha, weights).finish();
}

template <int Left, int Right, int Terms>
void softmax_beside(const ScoreBlock& s, float* max_of, float* sum_of, float* alpha, void* weights,
                    const TileProduct& scores, const TileProduct& sums) {
  Softmax<Terms, false> softmax(s, max_of, sum_of, alpha, weights);
  multiply_terms<Left, Right>(scores, softmax);
  multiply_terms<Left, Terms>(sums, softmax);
  softmax.finish();
}

struct Nothing {
  TW_INLINE void next_part() {}
};
template <int Left, int Right>
void product_by_terms(const TileProduct& p) {
  Nothing beside;
  multiply_terms<Left, Right>(p, beside);
}

// --- the backward pass ---------------------------------------------------------------------------

template <int Terms>
void gradient_to_terms(const ScoreBlock& s, const float* lse, const float* delta, float* dP,
                       void* terms) {
  const bool scaled = only_scaled(s);
  Exponent exponent[2];
  VecI empty[2];  // rows that saw nothing, and lanes without a row
  Vec d[2], most[2] = {};
  for (int v = 0; v < 2; ++v) {
    const int lane = v * kWidth;
    if (!scaled) score_block(s, lane);
    exponent[v] = {scaled ? s.rule.scale : 1.0f, load(lse + lane)};
    empty[v] = load(lse + lane) == -kInf;
    d[v] = load(delta + lane);
  }
  const auto to = static_cast<char*>(terms);
  for (int64_t key = 0; key < s.keys; key += 2) {
    float *const p = s.scores + key * kPanel, *const ds = dP + key * kPanel;
    Vec x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) x[i] = load(p + i * kWidth);  // beyond the last key: room for it
    weights_of<Terms>(x, exponent);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const VecI none = i >= 2 && key + 1 == s.keys ? VecI{} - 1 : empty[i % 2];
      x[i] = select(none, Vec{}, x[i]);
      store(p + i * kWidth, x[i]);
      x[i] = select(x[i] == 0.0f, Vec{}, x[i] * (load(ds + i * kWidth) - d[i % 2]));
      store(ds + i * kWidth, x[i]);
      most[i % 2] = larger(abs(x[i]), most[i % 2]);
    }
    for (int v = 0; v < 2; ++v) store_terms<Terms>(x[v], x[v + 2], key, v * kWidth, to);
  }
  int64_t key = (s.keys + 1) / 2 * 2;
  for (; key % kStep != 0; key += 2) {
    for (int v = 0; v < 2; ++v) store_terms<Terms>(Vec{}, Vec{}, key, v * kWidth, to);
  }
  const auto largest = reinterpret_cast<float*>(to + key / kStep * Terms * kTermBytes);
  for (int v = 0; v < 2; ++v) store(largest + v * kWidth, most[v]);
}

// 32 rows of a key as 16 words of neighbours, a term each; then words by keys.
template <int Terms>
void turn_to_terms(const float* x, int keys, void* step, float* largest) {
  constexpr uint32_t kSize = 0x7fff7fff;
  for (int first = 0; first < kPanel; first += kWidth) {
    VecU words[Terms][kWidth];
    for (int k = 0; k < kWidth; ++k) {
      const float* const line = x + (first + k) * kPanel;
      const bool there = first + k < keys;
      VecU terms[Terms];
      split_beside(there ? load(line) : Vec{}, there ? load(line + kWidth) : Vec{}, terms);
      for (int t = 0; t < Terms; ++t) words[t][k] = terms[t];
    }
    for (int t = 0; t < Terms; ++t) {
      Vec turned[kWidth];
#pragma GCC unroll 16
      for (int k = 0; k < kWidth; ++k) turned[k] = (Vec)words[t][k];
      transpose(turned);
      char* const to = static_cast<char*>(step) + t * kTermBytes + first * 4;
#pragma GCC unroll 16
      for (int k = 0; k < kWidth; ++k) memcpy(to + k * kPanel * 4, &turned[k], sizeof turned[k]);
      if (t > 0) continue;
      Vec most = {};
#pragma GCC unroll 16
      for (int k = 0; k < kWidth; ++k) {
        const VecU sizes = (VecU)turned[k] & kSize;
        most = larger((Vec)(sizes << 16), larger((Vec)(sizes & 0xffff0000u), most));
      }
      store(largest + first, most);
    }
  }
}

template <int Terms>
void widen_terms(const void* panel, int64_t kc, float* x) {
  for (int64_t k = 0; k < kc; ++k) {
    const char* const line = static_cast<const char*>(panel) + k / kStep * Terms * kTermBytes +
                             k % kStep / 2 * kPanel * 4;
    for (int lane = 0; lane < kPanel; lane += kWidth) {
      Vec sum = {};
      for (int t = Terms - 1; t >= 0; --t) {
        VecU pairs;
        memcpy(&pairs, line + t * kTermBytes + lane * 4, sizeof pairs);
        sum = sum + (Vec)(k % 2 ? pairs & 0xffff0000u : pairs << 16);
      }
      store(x + k * kPanel + lane, sum);
    }
  }
}

}  // namespace

void fill_attention_amx(KernelTable& table) {
  table.attention.softmax_by_terms[2] = softmax_by_terms<2>;
  table.attention.softmax_by_terms[3] = softmax_by_terms<3>;
  table.attention.softmax_beside[2] = softmax_beside<1, 1, 2>;
  table.attention.softmax_beside[3] = softmax_beside<3, 3, 3>;
  table.attention.scores_by_terms[2] = product_by_terms<1, 1>;
  table.attention.scores_by_terms[3] = product_by_terms<3, 3>;
  table.attention.sums_by_terms[2] = product_by_terms<1, 2>;
  table.attention.sums_by_terms[3] = product_by_terms<3, 3>;
  table.attention.gradient_to_terms[2] = gradient_to_terms<2>;
  table.attention.gradient_to_terms[3] = gradient_to_terms<3>;
  table.attention.turn_to_terms[2] = turn_to_terms<2>;
  table.attention.turn_to_terms[3] = turn_to_terms<3>;
  table.attention.widen_terms[2] = widen_terms<2>;
  table.attention.widen_terms[3] = widen_terms<3>;
}

}  // namespace tilewright::ISA

#endif
