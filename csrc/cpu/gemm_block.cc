// One block of a matrix product. On matrix units it is a pipeline:
//
//   multiply tile t     | 1          2          3          4 ...     matrix units
//   finish tile t - 1   |            1          2          3 ...     add to the sums; at the end of
//   prepare panel c + 1 | part 1     part 2     part 3     ...       K the epilogue
//   fetch panel c + 2   | part 1     part 2     part 3     ...
//
// The units work for hundreds of cycles on a few instructions, and the core could do the rest in
// that time; but what stands behind a tile in the program waits until its sums are stored. So the
// rest goes between the tile's own instructions (GemmAside), and is work on other data: the tile
// before and the panels after. Kernels in registers leave no such gaps: there each tile is finished
// at once.
#include "cpu/gemm_block.h"

#include <algorithm>
#include <cmath>

#include "core/parallel.h"

namespace tilewright {

PanelSource::Panel PanelSource::at(int64_t k, int64_t kc, int64_t j, int64_t N, int64_t K,
                                   const GemmKernels& g, void* edge) const {
  if (quantized) {
    weights->to_floats(quantized->panel(j), k, kc, static_cast<float*>(edge));
    return {edge, g.NR};
  }
  if (pairs) {
    const int64_t at = panel_offset(k / 2, j - origin, words_of(K, *pairs), g.NR);
    pairs->widen(packed + at * pairs->b_bytes, kc, static_cast<float*>(edge));
    return {edge, g.NR};
  }
  if (!direct) {
    return {packed + panel_offset(k, j - origin, words_of(K, g), g.NR) * g.b_bytes, g.NR};
  }
  if (j + g.NR <= N)
    return {static_cast<const uint32_t*>(direct->data) + k * direct->row + j, direct->row};
  g.pack_b(*direct, j, int(N - j), k, kc, K, edge);  // the ragged last panel
  return {edge, g.NR};
}

CacheLines PanelSource::lines(int64_t k, int64_t kc, int64_t j, int64_t N, int64_t K,
                              const GemmKernels& g, int64_t part, int64_t parts) const {
  if (quantized || pairs || j + g.NR > N) return {};
  const int64_t from = kc * part / parts, count = kc * (part + 1) / parts - from;
  const int64_t width = int64_t(g.NR) * g.b_bytes;
  if (direct) {
    const char* const data = static_cast<const char*>(direct->data);
    return {data + ((k + from) * direct->row + j) * 4, count, width, direct->row * 4};
  }
  const int64_t at = panel_offset(k + from, j - origin, words_of(K, g), g.NR);
  return {packed + at * g.b_bytes, count, width, width};
}

namespace {

void raise(const float* to, int n, float* largest) {
  for (int i = 0; i < n; ++i) largest[i] = std::max(largest[i], to[i]);
}

}  // namespace

void GemmRepair::read_rows(int64_t r, const float* largest) {
  raise(largest, g_.MR, rows_.data() + r * g_.MR);
}

void GemmRepair::read_columns(int64_t c, const float* largest) {
  raise(largest, g_.NR, cols_.data() + c * g_.NR);
}

bool GemmRepair::any_too_small(const float* largest, int n) const {
  bool any = false;
  for (int i = 0; i < n; ++i) any = any || too_small(largest[i]);
  return any;
}

void GemmRepair::run(int64_t r, int64_t i, int mr, int64_t c, int64_t j, float* sums) const {
  const float *const rows = rows_.data() + r * g_.MR, *const cols = cols_.data() + c * g_.NR;
  if (!any_too_small(rows, mr) && !any_too_small(cols, g_.NR) &&
      g_.all_finite(sums, int64_t(mr) * g_.NR)) {
    return;
  }
  const Scratch exact(int64_t(g_.MR) * g_.NR * 4);
  compute(i, mr, j, exact.as<float>());
  for (int row = 0; row < mr; ++row) {
    for (int col = 0; col < g_.NR; ++col) {
      float& sum = sums[row * g_.NR + col];
      if (!std::isfinite(sum) || too_small(rows[row]) || too_small(cols[col])) {
        sum = exact.as<float>()[row * g_.NR + col];
      }
    }
  }
}

void GemmRepair::compute(int64_t i, int mr, int64_t j, float* out) const {
  const GemmKernels& f = *g_.exact;
  const Scratch a((f.MR * f.KC + kPackSlack) * 4), edge((f.KC * f.NR + kPackSlack) * 4);
  const Scratch tile(int64_t(f.MR) * f.NR * 4), sum(int64_t(f.MR) * f.NR * 4);
  for (int at = 0; at < mr; at += f.MR) {
    const int rows = std::min(f.MR, mr - at);
    for (int64_t k = 0; k < p_.K; k += f.KC) {
      const int64_t kc = std::min<int64_t>(f.KC, p_.K - k);
      f.pack_a(p_.a, i + at, rows, k, kc, p_.K, a.as<void>());
      const auto panel = b_.at(k, kc, j, p_.N, p_.K, f, edge.as<void>());
      f.tile(rows, kc, a.as<void>(), panel.data, panel.ldb, tile.as<void>());
      f.add_tile(k == 0, tile.as<void>(), sum.as<void>());
    }
    std::copy_n(sum.as<float>(), rows * f.NR, out + at * f.NR);
  }
}

GemmBlock::GemmBlock(const Gemm& p, const GemmKernels& g, const PanelSource& b, int64_t i0,
                     int64_t mc, int64_t j0, int64_t nt)
    : p_(p),
      g_(g),
      b_(b),
      i0_(i0),
      mc_(mc),
      j0_(j0),
      nt_(nt),
      KW_(words_of(p.K, g)),
      rows_(divide_up(mc, g.MR)),
      cols_(divide_up(nt, g.NR)),
      tile_words_(int64_t(g.MR) * g.NR),
      kc_max_(std::min<int64_t>(g.KC, KW_)),
      one_block_(KW_ <= g.KC),
      few_(b.quantized && rows_ == 1 && mc <= b.weights->few),  // no panel in between
      a_block_(rows_ * g.a_panel_bytes(kc_max_) + kPackSlack * 4),
      sums_((one_block_ ? 0 : rows_ * cols_) * tile_words_ * 4),
      tiles_(2 * tile_words_ * 4),
      edge_(b.makes_panels() ? (kc_max_ * g.NR + kPackSlack) * 4 : 0),
      prepared_(2 * g.prepared_panel_bytes(kc_max_)) {
  if (g.exact) repair_.emplace(p, g, b, rows_, cols_);
  for (int t : {0, 1}) tile_[t].data = tiles_.as<float>() + t * tile_words_;
  if (g.begin) g.begin();
}

GemmBlock::~GemmBlock() {
  if (g_.end) g_.end();
}

int GemmBlock::rows_of(int64_t r) const {
  return int(std::min<int64_t>(g_.MR, mc_ - r * g_.MR));
}

GemmBlock::Step GemmBlock::after(const Step& s) const {
  if (s.c + 1 < cols_) return {s.index + 1, s.k, s.kc, s.c + 1, s.exists};
  const int64_t k = s.k + s.kc;
  return {s.index + 1, k, std::min<int64_t>(g_.KC, KW_ - k), 0, k < KW_};
}

void GemmBlock::pack_a(int64_t k, int64_t kc) {
  const int64_t bytes = g_.a_panel_bytes(kc);
  for (int64_t r = 0; r < rows_; ++r) {
    char* const panel = a_block_.as<char>() + r * bytes;
    g_.pack_a(p_.a, row(r), rows_of(r), k, kc, p_.K, panel);
    if (repair_) repair_->read_rows(r, reinterpret_cast<float*>(panel + bytes) - g_.MR);
  }
}

char* GemmBlock::prepared(const Step& s) const {
  return prepared_.as<char>() + s.index % 2 * g_.prepared_panel_bytes(kc_max_);
}

PanelSource::Panel GemmBlock::panel_of(const Step& s) const {
  if (few_) return {};
  if (g_.prepare) return {prepared(s), g_.NR};
  return b_.at(s.k, s.kc, column(s.c), p_.N, p_.K, g_, edge_.as<void>());
}

// The part-th of rows_ parts of a step's panel, as work for somebody; and what it will be made of on
// its way into the second cache.
GemmAside GemmBlock::part_of_panel(const Step& s, int64_t part) {
  GemmAside aside;
  if (!s.exists) return aside;
  const Step ahead = g_.prepare ? after(s) : s;
  if (ahead.exists) {
    aside.ahead = b_.lines(ahead.k, ahead.kc, column(ahead.c), p_.N, p_.K, g_, part, rows_);
  }
  if (!g_.prepare) return aside;
  if (part == 0) next_ = b_.at(s.k, s.kc, column(s.c), p_.N, p_.K, g_, edge_.as<void>());
  const int64_t steps = divide_up(s.kc, g_.k_step);
  aside.from = steps * part / rows_ * g_.k_step, aside.to = steps * (part + 1) / rows_ * g_.k_step;
  aside.kc = s.kc, aside.b = next_.data, aside.ldb = next_.ldb;
  if (aside.to > aside.from) aside.panel = prepared(s);
  return aside;
}

void GemmBlock::prepare_first(const Step& s) {
  if (!g_.prepare) return;
  const auto panel = b_.at(s.k, s.kc, column(s.c), p_.N, p_.K, g_, edge_.as<void>());
  g_.prepare(0, round_up(s.kc, g_.k_step), s.kc, panel.data, panel.ldb, prepared(s));
}

float* GemmBlock::sum_of(const Tile& t) const {
  return one_block_ ? t.data : sums_.as<float>() + (t.c * rows_ + t.r) * tile_words_;
}

CacheLines GemmBlock::out_lines(const Tile& t) const {
  const Matrix& out = p_.epilogue.out;
  if (out.col != 1) return {};
  const int64_t size = dtype_size(out.dtype);
  const char* const data = static_cast<const char*>(out.data);
  return {data + (row(t.r) * out.row + column(t.c)) * size, rows_of(t.r), g_.NR * size,
          out.row * size};
}

void GemmBlock::multiply(const Step& s, const PanelSource::Panel& panel, int64_t r,
                         const Step& next) {
  const Tile& before = tile_of(count_ - 1);
  Tile& now = tile_of(count_++);
  now.r = r, now.c = s.c, now.first = s.k == 0, now.last = s.k + s.kc >= KW_;
  const char* const a = a_block_.as<char>() + r * g_.a_panel_bytes(s.kc);
  if (g_.tile_beside) {
    GemmAside aside = part_of_panel(next, r);
    if (count_ > 1 && !one_block_) {
      aside.tile = before.data, aside.sum = sum_of(before), aside.first = before.first;
    }
    if (now.last) aside.out = out_lines(now);
    g_.tile_beside(rows_of(r), s.kc, a, panel.data, now.data, aside);
    if (count_ > 1) finish(before);
    return;
  }
  if (few_) {
    b_.weights->tile(rows_of(r), s.kc, a, b_.quantized->panel(column(s.c)), s.k, now.data);
  } else {
    g_.tile(rows_of(r), s.kc, a, panel.data, panel.ldb, now.data);
  }
  if (!one_block_) g_.add_tile(now.first, now.data, sum_of(now));
  finish(now);
}

// Its sums are complete if this was the last block of K.
void GemmBlock::finish(const Tile& t) {
  if (!t.last) return;
  float* const sum = sum_of(t);
  const int mr = rows_of(t.r), nr = int(std::min<int64_t>(g_.NR, nt_ - t.c * g_.NR));
  if (repair_) repair_->run(t.r, row(t.r), mr, t.c, column(t.c), sum);
  g_.store(sum, row(t.r), mr, column(t.c), nr, p_.epilogue);
}

void GemmBlock::run() {
  const double step_ns = 0.04 * double(rows_ * tile_words_);
  Step step{0, 0, kc_max_, 0, true};
  prepare_first(step);
  while (step.exists) {
    if (step.c == 0) pack_a(step.k, step.kc);
    if (repair_) {
      const char* const end = prepared(step) + g_.prepared_panel_bytes(step.kc);
      repair_->read_columns(step.c, reinterpret_cast<const float*>(end) - g_.NR);
    }
    const Step next = after(step);
    const PanelSource::Panel panel = panel_of(step);
    for (int64_t r = 0; r < rows_; ++r) multiply(step, panel, r, next);
    poll_after(step_ns * double(step.kc));  // K may be as long as a caller likes
    step = next;
  }
  if (!g_.tile_beside) return;
  const Tile& tile = tile_of(count_ - 1);
  if (!one_block_) g_.add_tile(tile.first, tile.data, sum_of(tile));
  finish(tile);
}

}  // namespace tilewright
