// Streaming softmax on panels:  P = exp(t - m);  l += sum P;  O += P V;  rescaled as m rises.
// t = scale * S + bias, with softcap and ALiBi as ScoreRule says.
//
//            NR lanes = query rows
//          +--------+--------+     Scores are held transposed, a key to a line, so that the softmax of
//   key 0  | s      | s      |     a row runs down one lane: no horizontal step, no lane ever sees
//   key 1  | s      | s      |     another, and a block of P is at once the packed right operand of
//          +--------+--------+     O^T = V^T P^T. max, sum, alpha: one value a lane.
//
// Parameter  bounded by                                               generic  avx2  avx512  neon
// NR         the GEMM's tile: P is its right operand                  8        16    32      8
// kBlock     P (kBlock x NR words) in half of L1; hides the rescaling 128      128   128     128
//
// Numerics: float32. A block's maximum is exact in any order; its sum adds keys in ascending order,
// then joins the running sum in one multiply-add. The running maximum only decides scaling, so a
// wholly masked block changes nothing: alpha = 1, P = 0. Weights below 2^-125 of the row's largest
// are 0. NaN and Inf follow IEEE inside a row: the maximum passes a NaN over, the row's sum takes it
// up. A masked score is replaced, never added to. Softcap and ALiBi are a pass of their own over
// the block: who does not use them does not pay for them. Dropout is another. Not handled: head dimensions (the
// drivers cpu/attention_*.cc).
//
// Method: Milakov & Gimelshein (2018), "Online normalizer calculation for softmax"; Dao (2023),
// FlashAttention-2.
#include "cpu/kernel_table.h"
#include "simd/attention_scores.h"
#include "simd/elements.h"
#include "simd/pack.h"
#include "simd/philox.h"

namespace tilewright::ISA {
namespace {

void softmax(const ScoreBlock& s, float* max_of, float* sum_of, float* alpha) {
  for (int lane = 0; lane < kPanel; lane += kWidth) {
    const Vec before = load(max_of + lane);
    const Vec after = larger(score_block(s, lane), before);
    const Vec shift = shift_of(after), a = rescale_factor(before, after);
    Vec sum = {};
    for (int64_t key = 0; key < s.keys; ++key) {
      float* p = s.scores + key * kPanel + lane;
      const Vec P = exp_to_zero(load(p) - shift);
      store(p, P);
      sum = sum + P;
    }
    store(sum_of + lane, fma(load(sum_of + lane), a, sum));
    store(max_of + lane, after);
    store(alpha + lane, a);
  }
}

void weights(const ScoreBlock& s, const float* lse) {
  for (int lane = 0; lane < kPanel; lane += kWidth) {
    score_block(s, lane);
    const Vec own = load(lse + lane);
    const VecI empty = own == -kInf;  // rows that saw nothing, and lanes without a row
    for (int64_t key = 0; key < s.keys; ++key) {
      float* p = s.scores + key * kPanel + lane;
      store(p, select(empty, Vec{}, exp_to_zero(load(p) - own)));
    }
  }
}

void score_gradient(int64_t keys, const float* P, const float* delta, const float* derivative,
                    float* dP) {
  for (int lane = 0; lane < kPanel; lane += kWidth) {
    const Vec d = load(delta + lane);
    for (int64_t i = lane; i < keys * kPanel; i += kPanel) {
      const Vec p = load(P + i);
      Vec ds = p * (load(dP + i) - d);
      if (derivative) ds = ds * load(derivative + i);
      store(dP + i, select(p == 0.0f, Vec{}, ds));
    }
  }
}

// Words are made row by row, as their numbers run along the keys, and turned to lie beside x.
void drop(const DropoutRule& rule, const uint64_t* first, int lanes, int64_t keys, float* x) {
  for (int lane = 0; lane < lanes; lane += kWidth) {
    uint32_t words[kWidth][kBlock];
    const int rows = lanes - lane < kWidth ? lanes - lane : kWidth;
    for (int i = 0; i < rows; ++i) {
      philox_words(rule.seed, first[lane + i], (keys + kWidth - 1) / kWidth * kWidth, words[i]);
    }
    for (int64_t key = 0; key < keys; key += kWidth) {
      Vec r[kWidth] = {};  // bits of words
      for (int i = 0; i < rows; ++i) memcpy(&r[i], words[i] + key, sizeof r[i]);
      transpose(r);
      for (int i = 0; i < kWidth && key + i < keys; ++i) {
        float* p = x + (key + i) * kPanel + lane;
        store(p, keep(rule, (VecU)r[i], load(p)));
      }
    }
  }
}

void rescale_add(int64_t rows, const float* alpha, const float* tile, float* sum) {
  const Vec a0 = load(alpha), a1 = load(alpha + kWidth);
  for (int64_t i = 0; i < rows * kPanel; i += kPanel) {
    store(sum + i, fma(load(sum + i), a0, load(tile + i)));
    store(sum + i + kWidth, fma(load(sum + i + kWidth), a1, load(tile + i + kWidth)));
  }
}

void combine(int64_t dims, const float* chunk_max, const float* chunk_sum, const float* chunk_out,
             float* max_of, float* sum_of, float* out) {
  for (int lane = 0; lane < kPanel; lane += kWidth) {
    const Vec before = load(max_of + lane), chunk = load(chunk_max + lane);
    const Vec after = max(before, chunk);
    const Vec a = rescale_factor(before, after), b = rescale_factor(chunk, after);
    store(max_of + lane, after);
    store(sum_of + lane, fma(load(sum_of + lane), a, load(chunk_sum + lane) * b));
    for (int64_t i = lane; i < dims * kPanel; i += kPanel) {
      store(out + i, fma(load(out + i), a, load(chunk_out + i) * b));
    }
  }
}

// kWidth dims of kWidth lanes, turned so that a vector holds dims of one row, and stored row by
// row.
template <class T>
TW_INLINE void store_turned(const float* panel, int64_t dims, int lane, int rows,
                            const float* factor, T* out, int64_t row, int64_t col) {
  for (int base = lane / kWidth * kWidth; base < lane + rows; base += kWidth) {
    const int first = lane > base ? lane - base : 0;
    const int last = lane + rows - base < kWidth ? lane + rows - base : kWidth;
    const Vec f = load(factor + base);
    for (int64_t d = 0; d < dims; d += kWidth) {
      const int n = dims - d < kWidth ? int(dims - d) : kWidth;
      Vec r[kWidth];
      // + 0: a sum that underflowed to -0 and one that started from +0 are the same number, and get
      // the same bits
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i)
        r[i] = i < n ? load(panel + (d + i) * kPanel + base) * f + 0.0f : Vec{};
      transpose(r);
      float turned[kWidth * kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) store(turned + i * kWidth, r[i]);
      for (int i = first; i < last; ++i) {
        T* p = out + (base + i - lane) * row + d * col;
        const Vec y = load(turned + i * kWidth);
        if (col == 1) {
          n == kWidth ? store(p, y) : store_partial(p, y, n);
        } else {
          for (int j = 0; j < n; ++j) store_one(p + j * col, turned[i * kWidth + j]);
        }
      }
    }
  }
}

void store_rows(const float* panel, int64_t dims, int lane, int rows, const float* factor,
                const Matrix& out) {
  with_type(out,
            [&](auto* p) { store_turned(panel, dims, lane, rows, factor, p, out.row, out.col); });
}

// The tile's own chain of multiply-adds with the terms of zero weight left out: the same bits
// wherever both are finite.
void guarded_tile(int mr, int64_t kc, const float* a, const float* b, float* tile) {
  constexpr int kRows = kTileRows;  // the GEMM's MR
  for (int i = 0; i < mr; ++i) {
    for (int lane = 0; lane < kPanel; lane += kWidth) {
      Vec sum = {};
      for (int64_t k = 0; k < kc; ++k) {
        const Vec w = load(b + k * kPanel + lane);
        sum = select(w == 0.0f, sum, fma(broadcast(a[k * kRows + i]), w, sum));
      }
      store(tile + i * kPanel + lane, sum);
    }
  }
}

template <VecI good(Vec)>
bool all(const float* x, int64_t n) {
  VecI bad = {};
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) bad |= ~good(load(x + i));
  if (i < n) bad |= ~good(load_partial(x + i, n - i));
  int32_t any = 0;
  for (int l = 0; l < kWidth; ++l) any |= bad[l];
  return any == 0;
}

TW_INLINE VecI finite(Vec x) {
  return abs(x) < kInf;
}
bool all_finite(const float* x, int64_t n) {
  return all<finite>(x, n);
}

TW_INLINE VecI usual(Vec x) {
  const Vec size = abs(x);
  return (size < 0x1p59f) & ((size >= 0x1p-76f) | (size == 0.0f));
}
bool all_usual(const float* x, int64_t n) {
  return all<usual>(x, n);
}

// Sizes are in the order of their bits; one less moves zero to the top.
struct Sizes {
  typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
  Halves most = {}, least = Halves{} - 1;
  TW_INLINE void see(const uint16_t* x) {
    Halves h;
    memcpy(&h, x, sizeof h);
    const Halves size = h & 0x7fff, below = size - 1;
    most = most > size ? most : size;
    least = least < below ? least : below;
  }
};

bool all_usual_bf16(const uint16_t* x, int64_t lines, int64_t n, int64_t stride) {
  constexpr uint16_t kLeast = 0x1980, kLimit = 0x5d00;  // 2^-76, 2^59
  Sizes even, odd;
  for (; lines > 0; --lines, x += stride) {
    int64_t i = 0;
    for (; i + 2 * kWidth <= n; i += 2 * kWidth) even.see(x + i), odd.see(x + i + kWidth);
    for (; i < n; i += kWidth) {
      uint16_t rest[kWidth] = {};
      memcpy(rest, x + i, size_t(n - i < kWidth ? n - i : kWidth) * 2);
      even.see(rest);
    }
  }
  bool usual = true;
  for (int l = 0; l < kWidth; ++l) {
    usual &= even.most[l] < kLimit && odd.most[l] < kLimit && even.least[l] >= kLeast - 1 &&
             odd.least[l] >= kLeast - 1;
  }
  return usual;
}

void separate(float* x, int64_t n, float* rest) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t count = n - i < kWidth ? n - i : kWidth;
    const Vec v = load_partial(x + i, count);
    const VecI own = usual(v);
    store_partial(x + i, select(own, v, Vec{}), count);
    store_partial(rest + i, select(own, Vec{}, v), count);
  }
}

void dot_lanes(int64_t dims, const float* a, const float* b, float* out) {
  for (int lane = 0; lane < kPanel; lane += kWidth) {
    Vec sum = {};
    for (int64_t i = lane; i < dims * kPanel; i += kPanel) sum = fma(load(a + i), load(b + i), sum);
    store(out + lane, sum);
  }
}

void expand_bool(const uint8_t* mask, int64_t row, int64_t col, int n, int64_t keys, float* out) {
  for (int i = 0; i < n; ++i, mask += row, out += keys) {
    if (col == 1) {
      for (int64_t k = 0; k < keys; ++k) out[k] = mask[k] ? 0.0f : -kInf;
    } else {
      for (int64_t k = 0; k < keys; ++k) out[k] = mask[k * col] ? 0.0f : -kInf;
    }
  }
}

}  // namespace

void fill_attention(KernelTable& table) {
  AttentionKernels& a = table.attention;
  a.block = kBlock;
  a.softmax = softmax, a.weights = weights, a.score_gradient = score_gradient;
  a.drop = drop, a.rescale_add = rescale_add, a.combine = combine, a.store_rows = store_rows;
  a.guarded_tile = guarded_tile, a.all_finite = all_finite, a.all_usual = all_usual;
  a.all_usual_bf16 = all_usual_bf16, a.separate = separate;
  a.dot_lanes = dot_lanes, a.expand_bool = expand_bool;
}

}  // namespace tilewright::ISA
