// See attention_products.h.
#include "cpu/attention_products.h"

#include <algorithm>
#include <cmath>

#include "core/dtype.h"

namespace tilewright::attention {
namespace {

constexpr int64_t kDepth = 32;  // of a tile: with fewer dims units would multiply zeros

bool unusual_size(float largest, float smallest) {
  return !(largest < 0x1p59f) || (largest != 0 && largest < smallest);
}

bool all_bfloat16(const AttentionProblem& p, const View& more) {
  const auto is = [](const View& x) { return x.dtype == DType::bf16; };
  return is(p.q) && is(p.k) && is(p.v) && (!more || is(more));
}

// Keys of a cache stay with the float32 kernel, and so do those of a caller who asked for it: few
// rows against many keys would spend their time on making terms. That follows from how keys are
// kept, never from how many rows there are.
bool takes_units(const AttentionProblem& p, const KernelTable& t) {
  return t.gemm_split[0].MR > 0 && !p.paged && !p.latency && p.head_dim >= kDepth &&
         p.head_dim_v >= kDepth;
}

const GemmKernels& choose(const AttentionProblem& p, const View& more, const KernelTable& t,
                          const GemmKernels& for_bfloat16) {
  if (!takes_units(p, t)) return t.gemm_f32;
  return all_bfloat16(p, more) ? for_bfloat16 : t.gemm_split[0];
}

// Rows of bfloat16 that can be packed as they are: one term is all there is of a usual one.
bool packs_narrow(const Matrix& rows, int64_t count, int64_t dims, const Products& p) {
  return p.narrow && rows.col == 1 &&
         p.table.attention.all_usual_bf16(static_cast<const uint16_t*>(rows.data), count, dims,
                                          rows.row);
}

}  // namespace

Products::Products(const AttentionProblem& p, const View& more, const KernelTable& t)
    : table(t),
      exact(t.gemm_f32),
      scores(choose(p, more, t, t.gemm_split[2])),
      sums(choose(p, more, t, t.gemm_bf16_weights)),
      narrow(takes_units(p, t) && all_bfloat16(p, more) && p.head_dim % kDepth == 0 &&
                     p.head_dim_v % kDepth == 0
                 ? &t.gemm_bf16
                 : nullptr) {}

// --- lanes ---------------------------------------------------------------------------------------

Lanes Lanes::prepare(const float* x, int64_t kc, const GemmKernels& g, float smallest, void* to) {
  if (!g.prepare) return {x, x, nullptr};
  g.prepare({x, g.NR, kc, kc, true, to}, 0, (kc + g.k_step - 1) / g.k_step * g.k_step);
  return prepared_from(x, kc, g, smallest, to);
}

Lanes Lanes::prepared_from(const float* x, int64_t kc, const GemmKernels& g, float smallest,
                           const void* prepared) {
  const auto largest = reinterpret_cast<const float*>(static_cast<const char*>(prepared) +
                                                      g.prepared_panel_bytes(kc)) -
                       g.NR;
  bool any = false;
  for (int i = 0; smallest > 0 && i < g.NR; ++i) any |= unusual_size(largest[i], smallest);
  return {x, prepared, any ? largest : nullptr};
}

Lanes Lanes::of_rows(const View& x, const Panel& panel, int64_t dims, const Products& p,
                     char* memory) {
  const GemmKernels& g = p.scores;
  const auto floats = reinterpret_cast<float*>(memory);
  char* const prepared = memory + (dims + 1) * g.NR * 4;
  Matrix lanes;
  if (lanes_of(x, panel, lanes) &&
      packs_narrow({lanes.data, lanes.dtype, lanes.col, lanes.row}, panel.lanes(), dims, p)) {
    p.narrow->pack_b(lanes, 0, panel.lanes(), 0, dims / 2, dims, prepared);
    return {nullptr, prepared, nullptr};
  }
  pack_panel(x, panel, 0, dims, p.exact, floats);
  return prepare(floats, dims, g, kSmallestInput, prepared);
}

bool Lanes::unusual(int lane, float smallest) const {
  return largest && unusual_size(largest[lane], smallest);
}

// --- turned weights ------------------------------------------------------------------------------

TurnedWeights::TurnedWeights(int panels, int64_t keys, const Products& p)
    : p_(p),
      panels_(panels),
      steps_(divide_up(keys, p.exact.NR) * panels),
      step_bytes_(p.exact.NR * p.exact.NR * p.sums.prepared_bytes),
      memory_(steps_ * step_bytes_),
      largest_(steps_ * p.exact.NR * 4),
      floats_((steps_ * p.exact.NR * p.exact.NR + kMaxLanes) * 4),
      kept_(size_t(steps_)) {}

void TurnedWeights::put(int64_t at, int i, const float* x, int count) {
  const GemmKernels& g = p_.exact;
  const auto turn = p_.table.attention.turn_to_terms[p_.terms()];
  float* const most = largest(at, i);
  if (!x) {
    std::fill_n(step(at, i), step_bytes_, 0);
    std::fill_n(most, g.NR, 0.0f);
  } else if (turn) {
    turn(x, count, step(at, i), most);
  }
  const bool keep = !turn || std::any_of(most, most + g.NR, [](float size) {
    return unusual_size(size, kSmallestWeight);
  });
  kept_[size_t(number(at, i))] = keep;
  if (!keep) return;
  x ? g.pack_b({x, DType::f32, 1, g.NR}, 0, count, 0, g.NR, g.NR, floats(at, i))
    : void(std::fill_n(floats(at, i), g.NR * g.NR, 0.0f));
}

Lanes TurnedWeights::get(int64_t at, int first, int last) const {
  const AttentionKernels& a = p_.table.attention;
  float* const x = floats(at, first);
  if (!p_.on_matrix_units()) return {x, x, nullptr};
  float* const most = largest(at, first);
  bool any = false;
  for (int l = 0; l < p_.sums.NR; ++l) {
    for (int i = first + 1; i < last; ++i) most[l] = std::max(most[l], largest(at, i)[l]);
    any |= unusual_size(most[l], kSmallestWeight);
  }
  if (!any) return {nullptr, step(at, first), nullptr};
  for (int i = first; i < last; ++i) {
    if (!kept_[size_t(number(at, i))]) {
      a.widen_terms[p_.terms()](step(at, i), p_.sums.NR, floats(at, i));
    }
  }
  return {x, step(at, first), most};
}

// --- scores --------------------------------------------------------------------------------------

const float* ScoreRows::largest(int64_t panel, const Products& p) const {
  const int64_t end = (panel + 1) * p.scores.a_panel_bytes(dims_);
  return reinterpret_cast<const float*>(memory_ + end) - p.scores.MR;
}

void ScoreRows::pack(const Matrix& rows, int64_t count, int64_t dims, const Products& p,
                     char* memory) {
  const GemmKernels& g = p.scores;
  rows_ = rows, dims_ = dims, memory_ = memory, usual_ = true;
  if (packs_narrow(rows, count, dims, p)) {
    for (int64_t i = 0; i < count; i += g.MR) {
      const int mr = int(std::min<int64_t>(g.MR, count - i));
      p.narrow->pack_a(rows, i, mr, 0, dims / 2, dims, memory + i / g.MR * g.a_panel_bytes(dims));
    }
    return;
  }
  for (int64_t i = 0; i < count; i += g.MR) {
    const int mr = int(std::min<int64_t>(g.MR, count - i));
    g.pack_a(rows, i, mr, 0, dims, dims, memory + i / g.MR * g.a_panel_bytes(dims));
    for (int r = 0; g.exact && r < mr; ++r) {
      usual_ = usual_ && !unusual_size(largest(i / g.MR, p)[r], kSmallestInput);
    }
  }
}

void ScoreRows::multiply(int64_t count, const Lanes& lanes, const Products& p,
                         float* scores) const {
  if (const auto by_terms = p.table.attention.scores_by_terms[p.terms()]) {
    by_terms(product(count, lanes, p, scores));
    return settle(count, lanes, p, scores);
  }
  const GemmKernels& g = p.scores;
  for (int64_t i = 0; i < count; i += g.MR) {
    const int mr = int(std::min<int64_t>(g.MR, count - i));
    g.tile(mr, dims_, memory_ + i / g.MR * g.a_panel_bytes(dims_), lanes.prepared, g.NR,
           {scores + i * g.NR, g.NR});
  }
}

void ScoreRows::repair(int64_t count, const Lanes& lanes, const Products& p, float* scores) const {
  const GemmKernels &f = p.exact, &g = p.scores;
  const Scratch packed((f.MR * dims_ + kMaxLanes) * 4), tile(int64_t(f.MR) * f.NR * 4),
      widened(lanes.x ? 0 : dims_ * f.NR * 4);
  if (!lanes.x) p.narrow->widen(lanes.prepared, dims_, widened.as<float>());
  const float* const x = lanes.x ? lanes.x : widened.as<float>();
  for (int64_t i = 0; i < count; i += f.MR) {
    const int mr = int(std::min<int64_t>(f.MR, count - i));
    f.pack_a(rows_, i, mr, 0, dims_, dims_, packed.as<void>());
    f.tile(mr, dims_, packed.as<void>(), x, f.NR, {tile.as<void>(), f.NR});
    for (int r = 0; r < mr; ++r) {
      const int64_t row = i + r;
      const bool own = !usual_ && unusual_size(largest(row / g.MR, p)[row % g.MR], kSmallestInput);
      for (int l = 0; l < f.NR; ++l) {
        if (!own && !lanes.unusual(l, kSmallestInput)) continue;
        scores[row * f.NR + l] = tile.as<float>()[r * f.NR + l];
      }
    }
  }
}

// --- sums ----------------------------------------------------------------------------------------

void SumRows::start(int64_t dims, int64_t n, const Products& p, char* memory) {
  p_ = &p, dims_ = dims, n_ = n, memory_ = memory, finite_ = true;
  all_.clear();
  rest_.clear();
}

void SumRows::pack(const Matrix& x, int64_t at, int64_t count) {
  const GemmKernels& g = p_->sums;
  if (!p_->on_matrix_units()) {
    for (int64_t d = 0; d < dims_; d += g.MR) {
      const int mr = int(std::min<int64_t>(g.MR, dims_ - d));
      const auto to = reinterpret_cast<float*>(panel(d)) + at * g.MR;
      g.pack_a(x, d, mr, 0, count, count, to);
      finite_ = finite_ && p_->table.attention.all_finite(to, count * g.MR);
    }
    return;
  }
  const GemmKernels& f = p_->exact;
  all_.push_back({0, dims_, at, count, x, {}});
  const Matrix turned{x.data, x.dtype, x.col, x.row};  // (n, dims)
  if (packs_narrow(turned, count, dims_, *p_)) {
    for (int64_t d = 0; d < dims_; d += g.MR) {
      p_->narrow->pack_a(x, d, g.MR, 0, divide_up(count, 2), count,
                         panel(d) + at * g.MR * g.a_bytes);
    }
    return;
  }
  const Scratch block((count * f.NR + kMaxLanes) * 4);
  for (int64_t d = 0; d < dims_; d += f.NR) {
    const int nr = int(std::min<int64_t>(f.NR, dims_ - d));
    f.pack_b(turned, d, nr, 0, count, count, block.as<void>());
    pack_usual(d, at, count, block.as<float>(), {block.as<void>(), DType::f32, 1, f.NR});
  }
}

// In registers packing writes one vector more, which the next panel overwrites: rows first.
void SumRows::pack_panels(const View& x, const Panel* panels, const Lanes* lanes, int count) {
  const GemmKernels& g = p_->sums;
  for (int64_t d = 0; d < dims_; d += g.MR) {
    for (int i = 0; i < count; ++i) {
      if (lanes[i].x) pack_block(lanes[i].x + d * g.NR, d, int64_t(i) * g.NR);
    }
  }
  for (int i = 0; i < count; ++i) {
    const int64_t at = int64_t(i) * g.NR;
    if (!lanes[i].x) {
      pack_narrow(x, panels[i], at);
    } else if (p_->on_matrix_units()) {
      all_.push_back({0, dims_, at, g.NR, {lanes[i].x, DType::f32, g.NR, 1}, {}});
    } else {
      finite_ = finite_ && p_->table.attention.all_finite(lanes[i].x, dims_ * g.NR);
    }
  }
}

// The rows of a panel, bfloat16, as they are.
void SumRows::pack_narrow(const View& x, const Panel& rows, int64_t at) {
  const GemmKernels& g = p_->sums;
  Matrix m;
  lanes_of(x, rows, m);
  all_.push_back({0, dims_, at, rows.lanes(), m, {}});
  for (int64_t d = 0; d < dims_; d += g.MR) {
    p_->narrow->pack_a(m, d, g.MR, 0, g.NR / 2, rows.lanes(), panel(d) + at * g.MR * g.a_bytes);
  }
}

// Rows [first, first + MR) of a panel's floats, columns from `at` on.
void SumRows::pack_block(const float* x, int64_t first, int64_t at) {
  const GemmKernels& g = p_->sums;
  const AttentionKernels& a = p_->table.attention;
  const int64_t rows = std::min<int64_t>(g.MR, dims_ - first), words = rows * g.NR;
  const Matrix block{x, DType::f32, g.NR, 1};
  if (!p_->on_matrix_units() || a.all_usual(x, words)) {
    g.pack_a(block, 0, int(rows), 0, g.NR, g.NR, panel(first) + at * g.MR * g.a_bytes);
    return;
  }
  std::vector<float> own(size_t(g.MR * g.NR));
  std::copy_n(x, words, own.data());
  pack_usual(first, at, g.NR, own.data(), {own.data(), DType::f32, g.NR, 1});
}

// A block of MR rows of x and `count` columns, as `shown` reads it: without its unusual elements.
void SumRows::pack_usual(int64_t first, int64_t at, int64_t count, float* block,
                         const Matrix& shown) {
  const GemmKernels& g = p_->sums;
  const AttentionKernels& a = p_->table.attention;
  const int64_t rows = std::min<int64_t>(g.MR, dims_ - first), words = g.MR * count;
  if (!a.all_usual(block, words)) {
    std::vector<float> unusual(static_cast<size_t>(words));
    a.separate(block, words, unusual.data());
    Matrix m = shown;
    m.data = unusual.data();
    rest_.push_back({first, rows, at, count, m, std::move(unusual)});
  }
  g.pack_a(shown, 0, int(rows), 0, count, count, panel(first) + at * g.MR * g.a_bytes);
}

void SumRows::multiply(int64_t from, int64_t kc, const Lanes& lanes, float* sums) const {
  const GemmKernels& g = p_->sums;
  const AttentionKernels& attention = p_->table.attention;
  const auto by_terms = attention.sums_by_terms[p_->terms()];
  if (by_terms) {
    by_terms({memory_ + from * g.MR * g.a_bytes, p_->sums.a_panel_bytes(n_), dims_, kc,
              lanes.prepared, sums});
    if (rest_.empty() && !lanes.largest) return;
  }
  for (int64_t d = 0; d < dims_; d += g.MR) {
    const int mr = int(std::min<int64_t>(g.MR, dims_ - d));
    const char* const a = panel(d) + from * g.MR * g.a_bytes;
    float* const tile = sums + d * g.NR;
    if (by_terms) {
      repair(d, mr, from, kc, lanes, tile);
    } else if (finite_) {
      g.tile(mr, kc, a, lanes.prepared, g.NR, {tile, g.NR});
    } else {
      attention.guarded_tile(mr, kc, reinterpret_cast<const float*>(a), lanes.x, tile);
    }
  }
}

void SumRows::repair(int64_t d, int mr, int64_t from, int64_t kc, const Lanes& lanes,
                     float* tile) const {
  const int NR = p_->exact.NR;
  const Scratch widened(lanes.x ? 0 : kc * NR * 4);
  if (!lanes.x)
    p_->table.attention.widen_terms[p_->terms()](lanes.prepared, kc, widened.as<float>());
  const float* const x = lanes.x ? lanes.x : widened.as<float>();
  add_exact(rest_, d, mr, from, kc, x, tile);
  if (!lanes.largest) return;
  std::vector<float> whole(size_t(mr * NR));
  add_exact(all_, d, mr, from, kc, x, whole.data());
  for (int i = 0; i < mr * NR; ++i) {
    if (lanes.unusual(i % NR, kSmallestWeight)) tile[i] = whole[size_t(i)];
  }
}

// sums (mr, NR) += rows [d, d + mr) and columns [from, from + kc) of the pieces, times weights.
void SumRows::add_exact(const std::vector<Piece>& pieces, int64_t d, int mr, int64_t from,
                        int64_t kc, const float* weights, float* sums) const {
  const GemmKernels& f = p_->exact;
  float ones[kMaxLanes];
  std::fill(ones, ones + kMaxLanes, 1.0f);
  for (const Piece& piece : pieces) {
    const int64_t first = std::max(from, piece.at),
                  end = std::min(from + kc, piece.at + piece.count);
    if (first >= end || d < piece.first || d >= piece.first + piece.rows) continue;
    const Scratch packed((f.MR * (end - first) + kMaxLanes) * 4), tile(int64_t(f.MR) * f.NR * 4);
    for (int i = 0; i < mr; i += f.MR) {
      const int rows = std::min(f.MR, mr - i);
      f.pack_a(piece.x, d - piece.first + i, rows, first - piece.at, end - first, end - piece.at,
               packed.as<void>());
      p_->table.attention.guarded_tile(rows, end - first, packed.as<float>(),
                                       weights + (first - from) * f.NR, tile.as<float>());
      p_->table.attention.rescale_add(rows, ones, tile.as<float>(), sums + i * f.NR);
    }
  }
}

}  // namespace tilewright::attention
