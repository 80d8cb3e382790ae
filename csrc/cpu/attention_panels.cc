// Panels of query rows, the keys they see, and masks in the layout of a score block.
#include <algorithm>
#include <limits>

#include "core/dtype.h"
#include "cpu/attention.h"

namespace tilewright::attention {

Panels::Panels(const AttentionProblem& p, int NR)
    : group(p.heads / p.heads_kv), rows(p.seqlen_q), lanes(NR) {
  heads_per_panel = rows < NR ? std::min<int64_t>(group, NR / rows) : 1;
  panels_per_head = divide_up(rows, NR);
}

Panel Panels::at(int64_t unit, int64_t heads_kv, int64_t index) const {
  const int64_t first = unit % heads_kv * group;
  const int64_t head = index / panels_per_head * heads_per_panel,
                row = index % panels_per_head * lanes;
  return {unit / heads_kv, first + head, row, int(std::min(heads_per_panel, group - head)),
          int(std::min<int64_t>(lanes, rows - row))};
}

int64_t length_of(const AttentionProblem& p, int64_t b) {
  if (!p.kv_lengths) return p.seqlen_k;
  const int64_t at = b * p.kv_lengths.stride[0];
  return p.kv_lengths.dtype == DType::s32 ? p.kv_lengths.ptr<int32_t>()[at]
                                          : p.kv_lengths.ptr<int64_t>()[at];
}

int64_t position_of(const AttentionProblem& p, int64_t length, int64_t row) {
  return length - p.seqlen_q + row;
}

Keys visible_keys(const AttentionProblem& p, int64_t length, int64_t row) {
  const int64_t own = position_of(p, length, row);
  return {p.left < 0 ? 0 : std::clamp<int64_t>(own - p.left, 0, length),
          p.right < 0 ? length : std::clamp<int64_t>(own + p.right + 1, 0, length)};
}

int64_t chunk_span(const AttentionProblem& p, int64_t rows) {
  const int64_t chunks = divide_up(p.seqlen_k, kChunk);
  if (p.left < 0 || p.right < 0) return chunks;
  return std::min(chunks, divide_up(p.left + p.right + rows, kChunk) + 1);
}

double mean_visible_keys(const AttentionProblem& p) {
  const auto count = [&](int64_t row) {
    const Keys seen = visible_keys(p, p.seqlen_k, row);
    return double(seen.end - seen.begin);
  };
  const int64_t last = p.seqlen_q - 1;
  return std::max(1.0, (count(0) + 4 * count(last / 2) + count(last)) / 6);  // Simpson's rule
}

void RowRules::set(const AttentionProblem& p, int i, int64_t b, int64_t head, int64_t row,
                   int64_t length) {
  const Keys seen = visible_keys(p, length, row);
  begin[i] = int32_t(seen.begin), end[i] = int32_t(seen.end);
  if (!p.alibi_slopes) return;
  position[i] = int32_t(position_of(p, length, row));
  slope[i] =
      p.alibi_slopes.ptr<float>()[b * p.alibi_slopes.stride[0] + head * p.alibi_slopes.stride[1]];
}

ScoreRule RowRules::rule(const AttentionProblem& p, int i, int64_t key, bool all) const {
  const float scale = p.softcap == 0 ? p.scale : float(double(p.scale) / double(p.softcap));
  return {scale,
          p.softcap,
          int32_t(key),
          all ? nullptr : begin + i,
          all ? nullptr : end + i,
          position + i,
          p.alibi_slopes ? slope + i : nullptr};
}

PanelRules::PanelRules(const AttentionProblem& p, const Panel& panel, int64_t length) {
  for (int i = 0; i < panel.lanes(); ++i) {
    set(p, i, panel.batch, panel.head + i / panel.rows, panel.row + i % panel.rows, length);
  }
  const int last = panel.lanes() - 1;
  any = {begin[0], end[last]};
  all = {begin[last], end[0]};
}

Keys seen_by_any(const AttentionProblem& p, const Panel& panel, int64_t length) {
  return {visible_keys(p, length, panel.row).begin,
          visible_keys(p, length, panel.row + panel.rows - 1).end};
}

Matrix head_matrix(const View& x, int64_t batch, int64_t head) {
  const int64_t at = batch * x.stride[0] + head * x.stride[1];
  return {static_cast<const char*>(x.data) + at * dtype_size(x.dtype), x.dtype, x.stride[2],
          x.stride[3]};
}

Matrix from_row(Matrix m, int64_t row) {
  m.data = static_cast<const char*>(m.data) + row * m.row * dtype_size(m.dtype);
  return m;
}

namespace {

void advance(Matrix& m, int64_t elements) {
  m.data = static_cast<const char*>(m.data) + elements * dtype_size(m.dtype);
}

}  // namespace

bool lanes_of(const View& x, const Panel& panel, Matrix& lanes) {
  lanes = head_matrix(x, panel.batch, panel.head);
  const int64_t row = lanes.row, head = x.stride[1];
  advance(lanes, panel.row * row);
  lanes.row = lanes.col;
  lanes.col = panel.rows == 1 ? head : row;
  return panel.heads == 1 || panel.rows == 1 || head == panel.rows * row;
}

void pack_panel(const View& x, const Panel& panel, int64_t first, int64_t count,
                const GemmKernels& g, float* packed) {
  Matrix lanes;
  const bool regular = lanes_of(x, panel, lanes);
  advance(lanes, first * lanes.row);
  if (regular) {
    g.pack_b(lanes, 0, panel.lanes(), 0, count, count, packed);
    return;
  }
  const int64_t row = x.stride[2], head = x.stride[1];
  for (int64_t k = 0; k < count; ++k) {
    float* line = packed + k * g.NR;
    std::fill(line + panel.lanes(), line + g.NR, 0.0f);
    for (int h = 0; h < panel.heads; ++h) {
      for (int r = 0; r < panel.rows; ++r) {
        line[h * panel.rows + r] =
            load_float(lanes.data, k * lanes.row + h * head + r * row, x.dtype);
      }
    }
  }
}

void drop(const AttentionProblem& p, const Panel& panel, int64_t key, int64_t keys,
          const AttentionKernels& a, float* x) {
  uint64_t first[kMaxLanes];
  for (int i = 0; i < panel.lanes(); ++i) {
    const int64_t head = panel.batch * p.heads + panel.head + i / panel.rows;
    const int64_t row = head * p.seqlen_q + panel.row + i % panel.rows;
    first[i] = p.first_element + uint64_t(row) * uint64_t(p.seqlen_k) + uint64_t(key);
  }
  a.drop(p.dropout, first, panel.lanes(), keys, x);
}

bool load_bias(const AttentionProblem& p, const Panel& panel, int64_t key, int64_t keys,
               const KernelTable& t, float* rows, float* bias) {
  const GemmKernels& g = t.gemm_f32;
  if (p.mask.dtype != DType::boolean) {
    pack_panel(p.mask, panel, key, keys, g, bias);
  } else {
    for (int h = 0; h < panel.heads; ++h) {
      const Matrix m = head_matrix(p.mask, panel.batch, panel.head + h);
      const auto* first = static_cast<const uint8_t*>(m.data) + panel.row * m.row + key * m.col;
      t.attention.expand_bool(first, m.row, m.col, panel.rows, keys, rows + h * panel.rows * keys);
    }
    g.pack_b({rows, DType::f32, 1, keys}, 0, panel.lanes(), 0, keys, keys, bias);
  }
  for (int64_t k = 0; k < keys; ++k) {
    for (int i = 0; i < panel.lanes(); ++i) {
      if (!(bias[k * g.NR + i] == -std::numeric_limits<float>::infinity())) return true;
    }
  }
  return false;
}

}  // namespace tilewright::attention
