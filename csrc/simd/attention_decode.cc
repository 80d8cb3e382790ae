// Attention of few query rows (decode):  S = Q K^T,  P = exp(scale * S - m),  O = alpha O + P V
//
//        kWidth lanes = keys               lanes = columns of V
//      +----+----+----+----+              +-----------------+
//   d  | K^T turned in     | <- q[r][d]   | v[key]          | <- P[r][key]
//   |  | registers         |              |                 |    |
//   v  +----+----+----+----+              +-----------------+    v  key
//      s[r], one chain along d            O[r], one chain along the keys
//
// A panel of attention.cc has a lane for each query row: with one row it would compute NR and pack
// K and V for it. Here K and V are read once, where they are.
//
// Parameter  bounded by                                                  generic  avx2  avx512  neon
// rows       accumulators beside a turned block of K (kWidth registers)  4        4     4       4
// columns    accumulators of O: rows * columns vectors                   8        8     16      16
//
// Numerics: every number comes from the operations of the GEMM tile and of attention.cc in their
// order, in other lanes: scores along d, weights elementwise, sums and P V along ascending keys in
// blocks of kBlock. So the bits are those of the panels (only the sign of a NaN or of an
// intermediate zero may differ). A zero weight adds nothing, whatever the value: what a row does
// not see cannot reach it. Not handled: masks, K or V with columns apart (the driver,
// cpu/attention_decode.cc, leaves them to the panels).
//
// Method: Dao (2023), FlashAttention-2, with the loops of a matrix-vector product.
#include "cpu/kernel_table.h"
#include "simd/elements.h"
#include "simd/pack.h"
#include "simd/streaming_softmax.h"

namespace tilewright::ISA {
namespace {

constexpr int kRows = 4;
constexpr int kAccumulators = kRegisters / 2;

// Some rows of K or of V.
template <class T>
struct Rows {
  const T* data;
  int64_t row;
  // The n elements of row i from column d on.
  TW_INLINE Vec at(int64_t i, int64_t d, int64_t n) const {
    const T* p = data + i * row + d;
    return n == kWidth ? load(p) : load_partial(p, n);
  }
  TW_INLINE Rows from(int64_t i) const { return {data + i * row, row}; }
};

// int8 rows: each element times its row's scale, rounded to float32 as dequantize would.
template <>
struct Rows<int8_t> {
  const int8_t* data;
  int64_t row;
  const float* scale;
  TW_INLINE Vec at(int64_t i, int64_t d, int64_t n) const {
    const int8_t* p = data + i * row + d;
    int8_t some[kWidth] = {};
    if (n < kWidth) p = static_cast<const int8_t*>(memcpy(some, p, size_t(n)));
    return to_float(widen(p)) * broadcast(scale[i]);
  }
  TW_INLINE Rows from(int64_t i) const { return {data + i * row, row, scale + i}; }
};

// body(rows): what `m` holds, by its type.
template <class Body>
TW_INLINE void with_rows(const Matrix& m, const float* scale, const Body& body) {
  if (m.dtype == DType::s8)
    return body(Rows<int8_t>{static_cast<const int8_t*>(m.data), m.row, scale});
  with_type(m, [&]<class T>(const T* data) { body(Rows<T>{data, m.row}); });
}

// acc[r] (lanes = keys) += K's dims [d, d + n) times q's. Rows of K beyond `last` repeat it.
template <int R, class T>
TW_INLINE void add_dims(const DecodeBlock& b, const Rows<T>& k, int64_t last, int64_t d, int64_t n,
                        Vec (&acc)[R]) {
  Vec dims[kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) dims[i] = k.at(i < last ? i : last, d, n);
  transpose(dims);
#pragma GCC unroll 16
  for (int j = 0; j < kWidth; ++j) {
    if (j == n) break;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      acc[r] = fma(dims[j], broadcast(b.q[r * b.head_dim + d + j]), acc[r]);
    }
  }
}

template <int R, class T>
void score(const DecodeBlock& b, const Rows<T>& rows) {
  for (int64_t key = 0; key < b.keys; key += kWidth) {
    const Rows<T> k = rows.from(key);
    const int64_t last = b.keys - key < kWidth ? b.keys - key - 1 : kWidth - 1;
    Vec acc[R] = {};
    int64_t d = 0;
    for (; d + kWidth <= b.head_dim; d += kWidth) add_dims(b, k, last, d, kWidth, acc);
    if (d < b.head_dim) add_dims(b, k, last, d, b.head_dim - d, acc);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store(b.scores + r * kBlock + key, acc[r]);
  }
}

// Row r's scores become weights; returns what older sums have to be multiplied by.
TW_INLINE Vec softmax_row(const DecodeBlock& b, int r, float* max_of) {
  float* t = b.scores + r * kBlock;
  const ScoreRule& rule = b.rule;
  const int32_t begin = rule.begin[r] - rule.first, end = rule.end[r] - rule.first;
  const int32_t seen = end < b.keys ? end : int32_t(b.keys);
  const Vec slope = rule.slope ? broadcast(rule.slope[r]) : Vec{};
  const int32_t position = rule.slope ? rule.position[r] - rule.first : 0;
  Vec top = broadcast(-kInf);
  for (int32_t key = 0; key < b.keys; key += kWidth) {
    const VecI lane = lane_numbers();
    const Vec score = score_of(load(t + key), rule, slope, position - key - lane);
    const Vec visible =
        select((lane < seen - key) & (lane >= begin - key), score, broadcast(-kInf));
    store(t + key, visible);
    top = larger(visible, top);
  }
  const Vec before = broadcast(*max_of), after = larger(broadcast(reduce_max(top)), before);
  const Vec shift = shift_of(after);
  for (int64_t key = 0; key < b.keys; key += kWidth)
    store(t + key, exp_to_zero(load(t + key) - shift));
  *max_of = after[0];
  return rescale_factor(before, after);
}

// C vectors of columns from d on, the last of them n wide. The sums of the weights ride along:
// their chain is as long as the values'.
template <int R, int C, class T>
TW_INLINE void add_columns(const DecodeBlock& b, const Rows<T>& v, int64_t d, int64_t n,
                           const Vec (&alpha)[R], const RowStates& s) {
  Vec acc[R][C] = {}, sum[R] = {};
  for (int64_t key = 0; key < b.keys; ++key) {
    Vec line[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) line[c] = v.at(key, d + c * kWidth, c == C - 1 ? n : kWidth);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const float p = b.scores[r * kBlock + key];
      if (p == 0.0f) continue;
      const Vec P = broadcast(p);
      sum[r] = sum[r] + P;
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[r][c] = fma(line[c], P, acc[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    if (d == 0) s.sum[r] = fma(broadcast(s.sum[r]), alpha[r], sum[r])[0];
    float* out = s.out + r * s.stride + d;
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      store(out + c * kWidth, fma(load(out + c * kWidth), alpha[r], acc[r][c]));
    }
  }
}

// Columns from d on, C vectors at a time while they last, then half as many.
template <int R, int C, class T>
void add_values(const DecodeBlock& b, const Rows<T>& v, int64_t d, const Vec (&alpha)[R],
                const RowStates& s) {
  for (; d + C * kWidth <= b.head_dim_v; d += C * kWidth) {
    add_columns<R, C>(b, v, d, kWidth, alpha, s);
  }
  if constexpr (C > 1) {
    add_values<R, C / 2>(b, v, d, alpha, s);
  } else if (d < b.head_dim_v) {
    add_columns<R, 1>(b, v, d, b.head_dim_v - d, alpha, s);
  }
}

template <int R>
void block_of_rows(const DecodeBlock& b, const RowStates& s) {
  constexpr int kColumns = R == 1 ? 8 : R == 2 ? kAccumulators / 2 : kAccumulators / 4;
  with_rows(b.k, b.k_scale, [&](const auto& k) { score<R>(b, k); });
  Vec alpha[R];
  for (int r = 0; r < R; ++r) alpha[r] = softmax_row(b, r, s.max + r);
  with_rows(b.v, b.v_scale, [&](const auto& v) { add_values<R, kColumns>(b, v, 0, alpha, s); });
}

void block(const DecodeBlock& b, const RowStates& s) {
  if (b.rows == 1) return block_of_rows<1>(b, s);
  if (b.rows == 2) return block_of_rows<2>(b, s);
  if (b.rows == 3) return block_of_rows<3>(b, s);
  block_of_rows<4>(b, s);
}

void combine(int rows, int64_t dims, const RowStates& chunk, const RowStates& s) {
  for (int r = 0; r < rows; ++r) {
    const Vec before = broadcast(s.max[r]), other = broadcast(chunk.max[r]);
    const Vec after = max(before, other);
    const Vec a = rescale_factor(before, after), b = rescale_factor(other, after);
    s.max[r] = after[0];
    s.sum[r] = fma(broadcast(s.sum[r]), a, broadcast(chunk.sum[r]) * b)[0];
    const float* x = chunk.out + r * chunk.stride;
    float* out = s.out + r * s.stride;
    for (int64_t d = 0; d < dims; d += kWidth) {
      store(out + d, fma(load(out + d), a, load(x + d) * b));
    }
  }
}

void store_row(const float* x, int64_t dims, float factor, int64_t row, const Matrix& out) {
  for (int64_t d = 0; d < dims; d += kWidth) {
    const int n = dims - d < kWidth ? int(dims - d) : kWidth;
    // + 0: as in attention.cc, no sum ends as -0
    store_elements(out, row, d, n, load(x + d) * factor + 0.0f);
  }
}

}  // namespace

void fill_decode(KernelTable& table) {
  table.decode = {kRows, block, combine, store_row};
}

}  // namespace tilewright::ISA
