// From q . k to the scores of a block, by ScoreRule, and their maximum.
#pragma once
#include "cpu/kernels_attention.h"
#include "simd/streaming_softmax.h"

namespace tilewright::ISA {
namespace {

constexpr int kPanel = 2 * kWidth;  // the GEMM's NR

TW_INLINE VecI load_ints(const int32_t* p) {
  VecI v;
  memcpy(&v, p, sizeof v);
  return v;
}

// Softcap and ALiBi, if there are any, in place; returns the factor that the scores still lack.
TW_INLINE float apply_rule(const ScoreBlock& s, int lane) {
  const ScoreRule& rule = s.rule;
  if (rule.softcap == 0 && !rule.slope) return rule.scale;
  const Vec slope = rule.slope ? load(rule.slope + lane) : Vec{};
  const VecI distance = rule.slope ? load_ints(rule.position + lane) - rule.first : VecI{};
  for (int64_t key = 0; key < s.keys; ++key) {
    float* p = s.scores + key * kPanel + lane;
    const Vec score = load(p);
    if (s.derivative) store(s.derivative + key * kPanel + lane, tanh_slope(score * rule.scale));
    store(p, score_of(score, rule, slope, distance - int32_t(key)));
  }
  return 1.0f;
}

// The rows of a panel that see a key, counted from the block's first.
struct Seen {
  VecI begin, end;
};

// t of one line of scores.
template <bool kBias, bool kLimit>
TW_INLINE Vec masked_score(const ScoreBlock& s, int64_t key, int lane, float scale, Seen seen) {
  Vec t = load(s.scores + key * kPanel + lane) * scale;
  if constexpr (kBias) {
    const Vec bias = load(s.bias + key * kPanel + lane);
    t = select(bias == -kInf, bias, t + bias);
  }
  if constexpr (kLimit) {
    t = select((seen.end > int32_t(key)) & (seen.begin <= int32_t(key)), t, broadcast(-kInf));
  }
  return t;
}

// Scores become t; returns the maximum over the block. Four partial maxima hide the latency of a
// comparison.
template <bool kBias, bool kLimit>
TW_INLINE Vec score_lanes(const ScoreBlock& s, int lane) {
  const float scale = apply_rule(s, lane);
  Seen seen = {};
  if constexpr (kLimit) {
    seen = {load_ints(s.rule.begin + lane) - s.rule.first,
            load_ints(s.rule.end + lane) - s.rule.first};
  }
  constexpr int kChains = 4;
  Vec top[kChains];
  for (int c = 0; c < kChains; ++c) top[c] = broadcast(-kInf);
  int64_t key = 0;
  for (; key + kChains <= s.keys; key += kChains) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      const Vec t = masked_score<kBias, kLimit>(s, key + c, lane, scale, seen);
      store(s.scores + (key + c) * kPanel + lane, t);
      top[c] = larger(t, top[c]);
    }
  }
  for (; key < s.keys; ++key) {
    const Vec t = masked_score<kBias, kLimit>(s, key, lane, scale, seen);
    store(s.scores + key * kPanel + lane, t);
    top[0] = larger(t, top[0]);
  }
  return larger(larger(top[0], top[1]), larger(top[2], top[3]));
}

TW_INLINE Vec score_block(const ScoreBlock& s, int lane) {
  const bool limited = s.rule.begin;
  if (s.bias) return limited ? score_lanes<true, true>(s, lane) : score_lanes<true, false>(s, lane);
  return limited ? score_lanes<false, true>(s, lane) : score_lanes<false, false>(s, lane);
}

}  // namespace
}  // namespace tilewright::ISA
