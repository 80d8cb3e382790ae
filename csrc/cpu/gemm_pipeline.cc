// One block of a matrix product on matrix units, as a pipeline:
//
//   multiply tile t        | 1          2          3          4 ...     matrix units
//   finish tile t - 1      |            1          2          3 ...     add to the sums; at the end of
//   pack A's panel r + 1   | 1          2          3          4 ...     K the epilogue, to memory
//   prepare B's panel c + 1| part 1     part 2     part 3     ...
//   fetch what follows     | part 1     part 2     part 3     ...
//
// The units work for hundreds of cycles on a few instructions, and the core could do the rest in
// that time; but what stands behind a tile in the program waits until its sums are stored. So the
// rest goes between the tile's own instructions (GemmAside), and is work on other data: the tile
// before and the panels after. A's panels are packed while the first panel of B meets them, or are
// loaded where they are. A tile that needs no more goes straight to where it belongs. What is
// left outside is the first panel of each and the last tile.
#include "cpu/gemm_pipeline.h"

#include <algorithm>
#include <cmath>

#include "core/dtype.h"
#include "core/parallel.h"

namespace tilewright {
namespace {

// Raises the largest so far; bits of those that are too small yet.
uint32_t raise(const float* to, int n, float smallest, float* largest) {
  uint32_t small = 0;
  for (int i = 0; i < n; ++i) {
    largest[i] = std::max(largest[i], to[i]);
    small |= uint32_t(largest[i] > 0 && largest[i] < smallest) << i;
  }
  return small;
}

// Tiles that load rows of A where they are save its packing, for every panel of B 15 % slower where
// rows a multiple of 1 KB apart share sets of the first cache: packing is as much as 23 panels of that.
bool reads_rows(const Gemm& p, const GemmKernels& g, int64_t panels) {
  constexpr int64_t kSetBytes = 1024, kFewPanels = 16;
  const int64_t size = dtype_size(p.a.dtype), row = p.a.row * size;
  const auto whole_lines = [](int64_t bytes) { return bytes % kLineBytes == 0; };
  return g.reads_rows && p.a.col == 1 && whole_lines(p.K * size) && whole_lines(row) &&
         whole_lines(int64_t(reinterpret_cast<uintptr_t>(p.a.data))) &&
         (row % kSetBytes != 0 || panels <= kFewPanels);
}

}  // namespace

GemmRepair::GemmRepair(const Gemm& p, const GemmKernels& g, const PanelSource& b, int64_t rows,
                       int64_t cols)
    : p_(p),
      g_(g),
      b_(b),
      rows_(size_t(rows * g.MR)),
      cols_(size_t(cols * g.NR)),
      small_rows_(size_t(rows)),
      small_cols_(size_t(cols)) {}

void GemmRepair::read_rows(int64_t r, const float* largest) {
  small_rows_[size_t(r)] = raise(largest, g_.MR, g_.smallest, rows_.data() + r * g_.MR);
}

void GemmRepair::read_columns(int64_t c, const float* largest) {
  small_cols_[size_t(c)] = raise(largest, g_.NR, g_.smallest, cols_.data() + c * g_.NR);
}

uint32_t GemmRepair::rows_of(int64_t r, int64_t c) const {
  return small_cols_[size_t(c)] ? ~uint32_t(0) : small_rows_[size_t(r)];
}

void GemmRepair::run(int64_t r, int64_t i, int mr, int64_t c, int64_t j, float* sums) const {
  const float *const rows = rows_.data() + r * g_.MR, *const cols = cols_.data() + c * g_.NR;
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
  const Scratch sum(int64_t(f.MR) * f.NR * 4);
  for (int at = 0; at < mr; at += f.MR) {
    const int rows = std::min(f.MR, mr - at);
    for (int64_t k = 0; k < p_.K; k += f.KC) {
      const int64_t kc = std::min<int64_t>(f.KC, p_.K - k);
      f.pack_a(p_.a, i + at, rows, k, kc, p_.K, a.as<void>());
      const auto panel = b_.at(k, kc, j, p_.N, p_.K, f, edge.as<void>());
      f.tile(rows, kc, a.as<void>(), panel.data, panel.ldb,
             {sum.as<void>(), f.NR, k ? sum.as<void>() : nullptr});
    }
    std::copy_n(sum.as<float>(), rows * f.NR, out + at * f.NR);
  }
}

GemmPipeline::GemmPipeline(const Gemm& p, const GemmKernels& g, const PanelSource& b, int64_t i0,
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
      a_bytes_(g.a_panel_bytes(kc_max_)),
      b_bytes_(g.prepared_panel_bytes(kc_max_)),
      one_block_(KW_ <= g.KC),
      prepares_(!g.reads_packed || b.direct),
      rows_in_place_(reads_rows(p, g, cols_)),
      a_block_((rows_ + 1) *
               a_bytes_),  // the next block of K begins while the last panel is in use
      sums_((one_block_ ? 0 : rows_ * cols_) * tile_words_ * 4),
      tiles_(2 * tile_words_ * 4),
      edge_(b.makes_panels() ? (kc_max_ * g.NR + kPackSlack) * 4 : 0),
      prepared_(prepares_ ? 2 * b_bytes_ : 0) {
  if (g.exact) repair_.emplace(p, g, b, rows_, cols_);
  g.begin();
}

GemmPipeline::~GemmPipeline() {
  g_.end();
}

int GemmPipeline::rows_of(int64_t r) const {
  return int(std::min<int64_t>(g_.MR, mc_ - r * g_.MR));
}

int GemmPipeline::columns_of(int64_t c) const {
  return int(std::min<int64_t>(g_.NR, nt_ - c * g_.NR));
}

GemmPipeline::Step GemmPipeline::after(const Step& s) const {
  if (s.c + 1 < cols_) return {s.index + 1, s.block, s.k, s.kc, s.c + 1, s.exists};
  const int64_t k = s.k + s.kc;
  return {s.index + 1, s.block + 1, k, std::min<int64_t>(g_.KC, KW_ - k), 0, k < KW_};
}

char* GemmPipeline::panel_of_a(const Step& s, int64_t r) const {
  return a_block_.as<char>() + (s.block * rows_ + r) % (rows_ + 1) * a_bytes_;
}

TileRows GemmPipeline::rows_at(const Step& s, int64_t r) const {
  if (!in_place(r)) return {panel_of_a(s, r), kLineBytes, g_.a_step};
  const int64_t size = dtype_size(p_.a.dtype), at = row(r) * p_.a.row + s.k * g_.k_per_word;
  return {static_cast<const char*>(p_.a.data) + at * size, p_.a.row * size, kLineBytes};
}

char* GemmPipeline::prepared(const Step& s) const {
  return prepared_.as<char>() + s.index % 2 * b_bytes_;
}

const void* GemmPipeline::panel_of_b(const Step& s) {
  if (prepares_) return prepared(s);
  return b_.at(s.k, s.kc, column(s.c), p_.N, p_.K, g_, edge_.as<void>()).data;
}

float* GemmPipeline::sum_of(int64_t r, int64_t c) const {
  return sums_.as<float>() + (c * rows_ + r) * tile_words_;
}

// Where a tile goes: the first of several blocks of K are the sums so far; and where nothing is left to
// be done, to the output.
TileOut GemmPipeline::place(Tile& t, bool first) {
  t.data = nullptr, t.sum = first ? nullptr : sum_of(t.r, t.c);
  if (first && !t.last) return {sum_of(t.r, t.c), g_.NR};
  const Matrix& out = p_.epilogue.out;
  const bool whole = rows_of(t.r) == g_.MR && columns_of(t.c) == g_.NR;
  if (first && whole && !repair_ && stores_sums(p_.epilogue)) {
    float* const words = static_cast<float*>(const_cast<void*>(out.data));
    return {words + row(t.r) * out.row + column(t.c), out.row};
  }
  t.data = spare(count_);
  return {t.data, g_.NR};
}

// --- what is done beside a tile ------------------------------------------------------------------

void GemmPipeline::add_rows(GemmAside& aside, const Step& s, int64_t r) const {
  if (!in_place(r)) aside.rows = {p_.a, row(r), rows_of(r), s.k, s.kc, p_.K, panel_of_a(s, r)};
}

// Of the same panel, into the second cache.
void GemmPipeline::fetch_rows(GemmAside& aside, const Step& s, int64_t r) const {
  const Matrix& a = p_.a;
  const int64_t size = dtype_size(a.dtype), k = s.k * g_.k_per_word;
  const int64_t count = std::min(s.kc * g_.k_per_word, p_.K - k);
  const char* const data = static_cast<const char*>(a.data) + (row(r) * a.row + k * a.col) * size;
  if (a.col == 1) aside.ahead[0] = {data, rows_of(r), count * size, a.row * size};
  if (a.row == 1 && a.col != 1) aside.ahead[0] = {data, count, rows_of(r) * size, a.col * size};
}

// The part-th of rows_ parts of a step's panel; and what it will be made of on its way into the
// second cache.
void GemmPipeline::add_columns(GemmAside& aside, const Step& s, int64_t part) {
  if (!s.exists) return;
  const Step ahead = prepares_ ? after(s) : s;
  if (ahead.exists) {
    aside.ahead[1] = b_.lines(ahead.k, ahead.kc, column(ahead.c), p_.N, p_.K, g_, part, rows_);
  }
  if (!prepares_) return;
  if (part == 0) next_ = b_.at(s.k, s.kc, column(s.c), p_.N, p_.K, g_, edge_.as<void>());
  const int64_t steps = divide_up(s.kc, g_.k_step);
  aside.columns_from = steps * part / rows_ * g_.k_step;
  aside.columns_to = steps * (part + 1) / rows_ * g_.k_step;
  aside.columns = {next_.data,     next_.ldb,  s.kc, p_.K - s.k * g_.k_per_word,
                   next_.in_place, prepared(s)};
}

void GemmPipeline::add_finish(GemmAside& aside, Tile& t) const {
  aside.tile = t.data, aside.sum = t.sum;
  aside.i = row(t.r), aside.mr = rows_of(t.r);
  aside.j = column(t.c), aside.nr = columns_of(t.c);
  if (!t.last) return;
  aside.epilogue = &p_.epilogue, aside.store = g_.store;
  if (repair_) aside.unstored = &t.unstored;
}

CacheLines GemmPipeline::out_lines(const Tile& t) const {
  const Matrix& out = p_.epilogue.out;
  if (out.col != 1) return {};
  const int64_t size = dtype_size(out.dtype);
  const char* const data = static_cast<const char*>(out.data);
  return {data + (row(t.r) * out.row + column(t.c)) * size, rows_of(t.r), columns_of(t.c) * size,
          out.row * size};
}

// --- the pipeline --------------------------------------------------------------------------------

// The first panels of A and B, before any tile.
void GemmPipeline::begin(const Step& s) {
  GemmAside aside;
  add_rows(aside, s, 0);
  if (prepares_) {
    const auto panel = b_.at(s.k, s.kc, column(s.c), p_.N, p_.K, g_, edge_.as<void>());
    aside.columns = {panel.data, panel.ldb, s.kc, p_.K, panel.in_place, prepared(s)};
    aside.columns_to = round_up(s.kc, g_.k_step);
  }
  g_.tile_beside(g_.MR, 0, {}, nullptr, {spare(0), g_.NR}, aside);
}

// The largest |x| that the panels of A and B end with, as soon as they have been made.
void GemmPipeline::read_largest(const Step& s, int64_t r) {
  if (s.c == 0) {
    const char* const end = panel_of_a(s, r) + g_.a_panel_bytes(s.kc);
    repair_->read_rows(r, reinterpret_cast<const float*>(end) - g_.MR);
  }
  if (r > 0) return;
  const char* const end = prepared(s) + g_.prepared_panel_bytes(s.kc);
  repair_->read_columns(s.c, reinterpret_cast<const float*>(end) - g_.NR);
}

void GemmPipeline::multiply(const Step& s, const void* b, int64_t r, const Step& next) {
  if (repair_) read_largest(s, r);
  Tile& before = tile_of(count_ - 1);
  Tile& now = tile_of(count_);
  now.r = r, now.c = s.c, now.last = s.k + s.kc >= KW_;
  now.unstored = repair_ && now.last ? repair_->rows_of(r, s.c) : 0;
  const TileOut out = place(now, s.k == 0);
  GemmAside aside;
  if (before.data) add_finish(aside, before);
  if (s.c == 0 && r + 1 < rows_) {
    add_rows(aside, s, r + 1);
  } else if (next.exists && next.c == 0 && r + 1 == rows_) {
    add_rows(aside, next, 0);
  }
  if (s.c == 0 && r + 2 < rows_) fetch_rows(aside, s, r + 2);
  add_columns(aside, next, r);
  if (now.last) aside.ahead[2] = out_lines(now);
  g_.tile_beside(rows_of(r), s.kc, rows_at(s, r), b, out, aside);
  repair(before);
  ++count_;
}

void GemmPipeline::end() {
  Tile& t = tile_of(count_ - 1);
  if (!t.data) return;
  GemmAside aside;
  add_finish(aside, t);
  g_.tile_beside(g_.MR, 0, {}, nullptr, {spare(count_), g_.NR}, aside);
  repair(t);
}

void GemmPipeline::repair(const Tile& t) const {
  if (!t.last || !t.unstored) return;
  const int mr = rows_of(t.r), nr = columns_of(t.c);
  repair_->run(t.r, row(t.r), mr, t.c, column(t.c), t.data);
  for (int i = 0; i < mr; ++i) {
    if (!(t.unstored >> i & 1)) continue;
    g_.store(t.data + i * g_.NR, row(t.r) + i, 1, column(t.c), nr, p_.epilogue);
  }
}

void GemmPipeline::run() {
  const double step_ns = 0.04 * double(rows_ * tile_words_);
  Step step{0, 0, 0, kc_max_, 0, true};
  begin(step);
  while (step.exists) {
    const Step next = after(step);
    const void* const b = panel_of_b(step);
    for (int64_t r = 0; r < rows_; ++r) multiply(step, b, r, next);
    poll_after(step_ns * double(step.kc));  // K may be as long as a caller likes
    step = next;
  }
  end();
}

}  // namespace tilewright
