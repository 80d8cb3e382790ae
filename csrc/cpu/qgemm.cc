// Quantized right-hand sides: packing them, and integer products with groups and offsets.
//
//   for each block of words of K       whole groups, or a piece of one: never more than KC words
//     A's block packed                 and the sums of its rows, a number for each group
//     for each panel of B              4 bits: nibbles become pairs of int8 in L1
//       for each tile of rows
//         for each group of the block  the int8 kernel, exact; then one fma an element
//
// Parameter  bounded by
// the block  KC words; the sums of a block of the output (MC, NT) beside it, as in gemm.cc
//
// Numerics: ops.h (QuantizedMatmul). Integers are exact while |sums of a group| < 2^31.
// Not handled: groups of odd size that don't span K.
#include "cpu/qgemm.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/parallel.h"
#include "core/scratch.h"
#include "core/size.h"

namespace tilewright {
namespace {

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Words of columns [j, j + nr) of nibbles (ceil(K / 2), N): the bytes as they are.
void pack_nibbles(const View& data, int64_t j, int nr, int NR, char* panel) {
  const char* src = data.ptr<char>() + j * data.stride[1];
  for (int64_t k = 0; k < data.shape[0]; ++k, panel += NR) {
    for (int i = 0; i < nr; ++i) panel[i] = src[k * data.stride[0] + i * data.stride[1]];
    for (int i = nr; i < NR; ++i) panel[i] = 0;
  }
}

// (groups, N) in any strides, or broadcast, into (groups, columns). Without any K there are no groups
// and still one line here: of zeros, which products without terms are scaled by.
std::vector<float> spread(const View& v, int64_t groups, int64_t N, int64_t columns) {
  std::vector<float> out(size_t(product_of({groups, columns})));
  const int64_t row = v.rank == 2 ? v.stride[0] : 0, col = v.rank ? v.stride[v.rank - 1] : 0;
  const int64_t given = v.rank == 2 ? v.shape[0] : groups;
  for (int64_t g = 0; g < given; ++g) {
    for (int64_t j = 0; j < N; ++j) out[g * columns + j] = v.ptr<float>()[g * row + j * col];
  }
  return out;
}

// q[i] += the stored integer k of column i, for a whole panel.
void add_line(const WeightPanel& w, int64_t k, int NR, int64_t* q) {
  const auto line = reinterpret_cast<const int8_t*>(w.words + k / 2 * w.line_bytes(NR));
  for (int i = 0; i < NR; ++i) {
    if (w.bits == 8) {
      q[i] += line[2 * i + k % 2];
    } else {
      q[i] += k % 2 ? line[i] >> 4 : int8_t(uint8_t(line[i]) << 4) >> 4;
    }
  }
}

// sums[i] = sum over k of b(k, i), group by group in ascending order.
void sum_columns(const WeightPanel& w, int64_t K, int nr, int NR, float* sums) {
  std::vector<int64_t> q(static_cast<size_t>(NR));
  std::fill(sums, sums + nr, 0.0f);
  for (int64_t k = 0, g = 0; k < K; k += w.group, ++g) {
    const int64_t end = std::min(K, k + w.group);
    std::fill(q.begin(), q.end(), (end - k) * w.shift);
    for (int64_t at = k; at < end; ++at) add_line(w, at, NR, q.data());
    for (int i = 0; i < nr; ++i) {
      sums[i] = std::fma(float(q[size_t(i)]), w.scale[g * w.ld + i], sums[i]);
      if (w.offset) sums[i] = std::fma(float(end - k), w.offset[g * w.ld + i], sums[i]);
    }
  }
}

}  // namespace

PackedMatrix::PackedMatrix(const QuantizedView& b, const GemmKernels& g, const char* level,
                           bool with_sums)
    : K(b.K), N(b.data.shape[1]), dtype(b.data.dtype), isa(level), bits(b.bits) {
  const bool is_signed = dtype == DType::s8;
  shift = is_signed ? 0 : 1 << (bits - 1);
  group = b.group > 0 && b.group < K ? b.group : std::max<int64_t>(K, 1);
  groups = std::max<int64_t>(1, divide_up(K, group));
  const int64_t panels = divide_up(N, g.NR), columns = panels * g.NR, KW = divide_up(K, 2);
  scale = spread(b.scale, groups, N, columns);
  if (b.offset) offset = spread(b.offset, groups, N, columns);
  if (with_sums) column_sums.resize(size_t(N));
  const int64_t panel_bytes = product_of({KW, g.NR, bits}) / 4;
  allocate(product_of({panels, panel_bytes}));
  // unsigned data are packed as the signed integers whose bits they are, then shifted
  const Matrix data{b.data.data, DType::s8, b.data.stride[0], b.data.stride[1]};
  const char flip = char(is_signed ? 0 : bits == 8 ? 0x80 : 0x88);
  parallel_for(panels, double(KW) * double(columns) * (with_sums ? 0.4 : 0.08), [&](int64_t t) {
    const int nr = int(std::min<int64_t>(g.NR, N - t * g.NR));
    char* const words = data_.get() + t * panel_bytes;
    if (bits == 8) {
      g.pack_b(data, t * g.NR, nr, 0, KW, K, words);
    } else {
      pack_nibbles(b.data, t * g.NR, nr, g.NR, words);
    }
    for (int64_t i = 0; flip && i < panel_bytes; ++i) words[i] = char(words[i] ^ flip);
    if (with_sums) sum_columns(panel(t * g.NR), K, nr, g.NR, column_sums.data() + t * g.NR);
  });
}

int64_t PackedMatrix::nbytes() const {
  return bytes_ + int64_t(scale.size() + offset.size() + column_sums.size()) * 4;
}

WeightPanel PackedMatrix::panel(int64_t j) const {
  if (!bits) return panel_of_halves(j);
  const int64_t ld = int64_t(scale.size()) / groups;
  const int64_t lines = divide_up(K, 2);
  return {data() + j * lines * bits / 4,
          bits,
          shift,
          group,
          scale.data() + j,
          offset.empty() ? nullptr : offset.data() + j,
          ld,
          lines};
}

void unpack(const PackedMatrix& b, const WeightKernels& w, const GemmKernels& g, const View& out) {
  const int64_t blocks = divide_up(b.K, g.KC), panels = divide_up(b.N, g.NR);
  parallel_for(panels * blocks, double(b.K) * double(b.N) * 0.1, [&](int64_t t) {
    const int64_t j = t % panels * g.NR, k = t / panels * g.KC;
    const int64_t nr = std::min<int64_t>(g.NR, b.N - j), kc = std::min<int64_t>(g.KC, b.K - k);
    const Scratch panel(kc * g.NR * 4);
    w.to_floats(b.panel(j), k, kc, panel.as<float>());
    for (int64_t r = 0; r < kc; ++r) {
      float* const to = out.ptr<float>() + (k + r) * out.stride[0] + j * out.stride[1];
      for (int64_t i = 0; i < nr; ++i) to[i * out.stride[1]] = panel.as<float>()[r * g.NR + i];
    }
  });
}

namespace cpu {
namespace {

// What one task needs beside its arguments.
struct Groups {
  const Gemm& p;
  const GemmKernels& g;
  int64_t KW, group;  // words

  // The words of the block that starts at k: it ends where a group ends, or lies within one.
  int64_t block(int64_t k) const {
    const int64_t left = KW - k;
    if (group <= g.KC) return std::min(left, g.KC / group * group);
    return std::min({left, int64_t(g.KC), group - k % group});
  }
  int64_t piece_end(int64_t at, int64_t end) const {
    return std::min(end, (at / group + 1) * group);
  }
  bool begins(int64_t at) const { return at % group == 0; }
  bool ends(int64_t end) const { return end % group == 0 || end == KW; }
};

// The block's rows of a, packed, and for each group in it the sums of its rows.
void pack_rows(const Groups& s, int64_t i0, int64_t mc, int64_t k, int64_t kc, uint32_t* block,
               int32_t* sums) {
  const GemmKernels& g = s.g;
  const int64_t rows = divide_up(mc, g.MR);
  for (int64_t r = 0; r < rows; ++r) {
    uint32_t* const panel = block + r * g.MR * kc;
    const int mr = int(std::min<int64_t>(g.MR, mc - r * g.MR));
    g.pack_a(s.p.a, i0 + r * g.MR, mr, k, kc, s.p.K, panel);
  }
  for (int64_t r = 0; sums && r < rows; ++r) {
    int32_t* to = sums + r * g.MR;
    for (int64_t at = k, end; at < k + kc; at = end, to += rows * g.MR) {
      end = s.piece_end(at, k + kc);
      const uint32_t* const words = block + r * g.MR * kc + (at - k) * g.MR;
      s.p.weights->row_sums(s.begins(at), end - at, words, to);
    }
  }
}

}  // namespace

void multiply_groups(const Gemm& p, const GemmKernels& g, int64_t i0, int64_t mc, int64_t j0,
                     int64_t nt) {
  const PackedMatrix& b = *p.packed;
  const WeightKernels& w = *p.weights;
  const Groups s{p, g, divide_up(p.K, 2), divide_up(b.group, 2)};
  const int64_t rows = divide_up(mc, g.MR), cols = divide_up(nt, g.NR), first = s.block(0);
  const int64_t tile_words = int64_t(g.MR) * g.NR, tiles = first == s.KW ? 1 : rows * cols;
  const bool in_pieces = s.group > g.KC, with_sums = b.shift || !b.offset.empty();
  const Scratch a_block((rows * g.MR * first + 64) * 4), tile(tile_words * 4);
  const Scratch sums(tiles * tile_words * 4), pieces(in_pieces ? tiles * tile_words * 4 : 0);
  const Scratch row_sums(with_sums ? divide_up(first, s.group) * rows * g.MR * 4 : 0);
  const Scratch pairs(b.bits == 4 ? first * g.NR * 2 : 0);
  const bool scaled_once = b.one_scale() && !p.epilogue.offset_a && s.KW > 0;
  if (s.KW == 0) std::memset(sums.as<void>(), 0, size_t(tile_words) * 4);

  for (int64_t k = 0, kc; k == 0 || k < s.KW; k += std::max<int64_t>(kc, 1)) {
    kc = s.block(k);
    pack_rows(s, i0, mc, k, kc, a_block.as<uint32_t>(),
              with_sums ? row_sums.as<int32_t>() : nullptr);
    for (int64_t c = 0; c < cols; ++c) {
      const int64_t j = j0 + c * g.NR;
      const WeightPanel panel = b.panel(j);
      const char* words = panel.words + k * panel.line_bytes(g.NR);
      if (b.bits == 4) {
        w.to_pairs(words, kc * g.NR, pairs.as<void>());
        words = pairs.as<char>();
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = i0 + r * g.MR;
        const int mr = int(std::min<int64_t>(g.MR, i0 + mc - i));
        const int nr = int(std::min<int64_t>(g.NR, j0 + nt - j));
        const int64_t at_tile = tiles == 1 ? 0 : (c * rows + r) * tile_words;
        float* const sum = sums.as<float>() + at_tile;
        const int32_t* row_sum = with_sums ? row_sums.as<int32_t>() + r * g.MR : nullptr;
        for (int64_t at = k, end; at < k + kc; at = end) {
          end = s.piece_end(at, k + kc);
          void* const whole = in_pieces ? pieces.as<uint32_t>() + at_tile : tile.as<void>();
          g.tile(mr, end - at, a_block.as<uint32_t>() + (r * kc + at - k) * g.MR,
                 words + (at - k) * g.NR * 2, g.NR, {whole, g.NR, s.begins(at) ? nullptr : whole});
          if (s.ends(end) && scaled_once) {
            g.store(whole, i, mr, j, nr, p.epilogue);
          } else if (s.ends(end)) {
            w.accumulate(mr, at < s.group, whole, row_sum, panel, at / s.group, sum);
          }
          if (row_sum) row_sum += rows * g.MR;
        }
        if (k + kc == s.KW && !scaled_once) w.store(sum, i, mr, j, nr, p.epilogue);
      }
    }
  }
}

}  // namespace cpu
}  // namespace tilewright
