// The steps of a streaming softmax that its two forms share: panels of rows (attention.cc) and few
// rows (attention_decode.cc). Both promise the same bits, so neither has its own.
#pragma once
#include "cpu/kernels_attention.h"
#include "simd/activation.h"
#include "simd/vec.h"

namespace tilewright::ISA {
namespace {

constexpr int kBlock = 128;  // keys of one step
constexpr float kInf = __builtin_inff();

// The score of q . k = s at a distance from the row's own position, before any mask.
TW_INLINE Vec score_of(Vec s, const ScoreRule& rule, Vec slope, VecI distance) {
  Vec t = s * rule.scale;
  if (rule.softcap != 0) t = tanh(t) * rule.softcap;
  if (rule.slope) t = fma(-slope, abs(to_float(distance)), t);
  return t;
}

// What is subtracted before exp: the maximum, or 0 where nothing was visible yet (-inf - -inf would
// be NaN).
TW_INLINE Vec shift_of(Vec max) {
  return select(max == -kInf, Vec{}, max);
}

// What sums with maximum `before` are worth under the maximum `after`.
TW_INLINE Vec rescale_factor(Vec before, Vec after) {
  return select(before == after, broadcast(1.0f), exp_to_zero(before - shift_of(after)));
}

}  // namespace
}  // namespace tilewright::ISA
