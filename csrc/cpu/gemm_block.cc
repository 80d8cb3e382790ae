// One block of a matrix product, with kernels that multiply in registers: each tile is finished at
// once.
#include "cpu/gemm_block.h"

#include <algorithm>

#include "core/dtype.h"
#include "core/parallel.h"

namespace tilewright {

PanelSource::Panel PanelSource::at(int64_t k, int64_t kc, int64_t j, int64_t N, int64_t K,
                                   const GemmKernels& g, void* edge) const {
  if (narrow) {
    weights->to_floats(narrow->panel(j), k, kc, static_cast<float*>(edge));
    return {edge, g.NR};
  }
  if (!direct) {
    return {packed + panel_offset(k, j - origin, words_of(K, g), g.NR) * g.b_bytes, g.NR};
  }
  if (j + g.NR <= N) {
    const int64_t at = k * g.k_per_word * direct->row + j;
    return {static_cast<const char*>(direct->data) + at * dtype_size(direct->dtype), direct->row,
            true};
  }
  g.pack_b(*direct, j, int(N - j), k, kc, K, edge);  // the ragged last panel
  return {edge, g.NR};
}

CacheLines PanelSource::lines(int64_t k, int64_t kc, int64_t j, int64_t N, int64_t K,
                              const GemmKernels& g, int64_t part, int64_t parts) const {
  if (narrow || j + g.NR > N) return {};
  const int64_t from = kc * part / parts, count = kc * (part + 1) / parts - from;
  if (direct) {
    const int64_t size = dtype_size(direct->dtype), first = (k + from) * g.k_per_word;
    return {static_cast<const char*>(direct->data) + (first * direct->row + j) * size,
            std::min(count * g.k_per_word, K - first), g.NR * size, direct->row * size};
  }
  const int64_t width = int64_t(g.NR) * g.b_bytes;
  const int64_t at = panel_offset(k + from, j - origin, words_of(K, g), g.NR);
  return {packed + at * g.b_bytes, count, width, width};
}

namespace {

constexpr int64_t kFewRows = 8, kMostBlocks = 16;  // of K: A's panels stay in the second cache

// Packing A would cost as much as the product gains by it where B is small enough to be read in place;
// and of few rows it makes a line for each k, which drives B out of the first cache. Lines that share a
// set there would drive each other out.
bool reads_rows(const Matrix& a, int64_t rows, bool one_panel, const GemmKernels& g) {
  constexpr int64_t kPage = 1024, kWays = 4;  // words
  if (!g.tile_in_place || a.dtype != DType::f32 || a.col != 1) return false;
  return (one_panel || rows <= kFewRows) && (rows <= kWays || a.row % kPage != 0);
}

}  // namespace

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
      rows_in_place_(reads_rows(p.a, mc, b.direct && one_block_, g)),
      all_k_(!rows_in_place_ && rows_ == 1 && mc <= kFewRows && KW_ <= kMostBlocks * g.KC),
      down_(rows_in_place_ || all_k_),
      widens_(b.narrow && !b.narrow->bits && !g.prepare && !rows_in_place_ && mc >= g.MR),
      across_(rows_in_place_ && b.direct && one_block_ && KW_ > 0 && nt % g.NR == 0),
      a_block_(rows_in_place_ ? 0
                              : (all_k_ ? divide_up(KW_, g.KC) : rows_) * g.a_panel_bytes(kc_max_) +
                                    kPackSlack * 4),
      sums_((one_block_ ? 0 : rows_ * cols_) * tile_words_ * 4),
      tile_(tile_words_ * 4),
      edge_(b.makes_panels() ? (kc_max_ * g.NR + kPackSlack) * 4 : 0),
      prepared_(g.prepare ? g.prepared_panel_bytes(kc_max_) : 0) {}

int GemmBlock::rows_of(int64_t r) const {
  return int(std::min<int64_t>(g_.MR, mc_ - r * g_.MR));
}

// Of the r-th rows in a block of K.
char* GemmBlock::panel_of_a(int64_t r, int64_t k, int64_t kc) const {
  return a_block_.as<char>() +
         (all_k_ ? k / g_.KC * g_.a_panel_bytes(g_.KC) : r * g_.a_panel_bytes(kc));
}

// The panel of columns [j, j + NR) in a block of K, as the tile reads it.
PanelSource::Panel GemmBlock::panel_of_b(int64_t k, int64_t kc, int64_t j) const {
  const auto source = b_.at(k, kc, j, p_.N, p_.K, g_, edge_.as<void>());
  if (!g_.prepare) return source;
  void* const panel = prepared_.as<void>();
  g_.prepare({source.data, source.ldb, kc, p_.K - k * g_.k_per_word, source.in_place, panel}, 0,
             round_up(kc, g_.k_step));
  return {panel, g_.NR};
}

// Whether a tile's finished sums are stored as they are: not where they need an epilogue or meet an
// edge.
bool GemmBlock::goes_to_output(int64_t r, int nr) const {
  return stores_sums(p_.epilogue) && nr == g_.NR && (rows_in_place_ || rows_of(r) == g_.MR);
}

// Where the r-th rows times the c-th columns go: with the sums so far to these, or finished.
TileOut GemmBlock::out_of(int64_t r, int64_t c, int64_t j, bool first, bool last, int nr) const {
  float* const sum = one_block_ ? nullptr : sums_.as<float>() + (c * rows_ + r) * tile_words_;
  const float* const before = first ? nullptr : sum;
  if (!last) return {sum, g_.NR, before};
  if (!goes_to_output(r, nr)) return {tile_.as<float>(), g_.NR, before};
  const Matrix& out = p_.epilogue.out;
  float* const rows = static_cast<float*>(const_cast<void*>(out.data));
  return {rows + (i0_ + r * g_.MR) * out.row + j, out.row, before};
}

// The panel of B that is multiplied next, for the tiles of this one to fetch, each its share: it comes
// from beyond the second cache, and the hardware asks for nothing before it is read. None where it is
// made, or in pieces.
CacheLines GemmBlock::next_panel(int64_t k, int64_t kc, int64_t c) const {
  if (b_.direct) return {};
  if (down_ ? k + kc < KW_ : c + 1 == cols_) {
    k += kc;
    if (!down_) c = 0;
  } else {
    ++c;
    if (down_) k = 0;
  }
  if (k >= KW_ || c >= cols_) return {};
  return b_.lines(k, std::min<int64_t>(g_.KC, KW_ - k), j0_ + c * g_.NR, p_.N, p_.K, g_, 0, 1);
}

// The r-th rows times the c-th panel of B in a block of K; with each word of it `ahead` bytes of `next`
// are fetched, if there is any.
void GemmBlock::multiply(int64_t k, int64_t kc, int64_t r, int64_t c,
                         const PanelSource::Panel& panel, const char* next, int64_t ahead) {
  const int64_t j = j0_ + c * g_.NR;
  const int nr = int(std::min<int64_t>(g_.NR, j0_ + nt_ - j));
  const bool last = k + kc >= KW_;
  TileOut out = out_of(r, c, j, k == 0, last, nr);
  out.ahead = next, out.ahead_step = ahead;
  if (rows_in_place_) {
    const auto rows = static_cast<const float*>(p_.a.data) + (i0_ + r * g_.MR) * p_.a.row + k;
    g_.tile_in_place(rows_of(r), g_.NR, kc, rows, p_.a.row, static_cast<const float*>(panel.data),
                     panel.ldb, out);
  } else if (widens_ && r == 0) {
    b_.weights->tile_of_halves(b_.narrow->panel(j), k, kc,
                               reinterpret_cast<const float*>(panel_of_a(0, k, kc)),
                               edge_.as<float>(), out);
  } else {
    g_.tile(rows_of(r), kc, panel_of_a(r, k, kc), panel.data, panel.ldb, out);
  }
  if (last && !goes_to_output(r, nr)) {
    g_.store(out.data, i0_ + r * g_.MR, rows_of(r), j, nr, p_.epilogue);
  }
}

// The c-th panel of B in a block of K, times all of A's.
void GemmBlock::multiply_down(int64_t k, int64_t kc, int64_t c) {
  const int64_t j = j0_ + c * g_.NR;
  const auto panel = widens_ ? PanelSource::Panel{edge_.as<void>(), g_.NR} : panel_of_b(k, kc, j);
  const CacheLines next = next_panel(k, kc, c);
  const int64_t ahead = kc ? divide_up(next.lines * next.width, rows_ * kc) : 0;
  for (int64_t r = 0; r < rows_; ++r) {
    multiply(k, kc, r, c, panel, next.data ? next.data + r * kc * ahead : nullptr, ahead);
  }
}

// All of a small B, times one panel of A's rows after the other: these and the output are met once, in
// the order of memory, which the hardware fetches ahead (a batch of small products that comes from
// memory takes 20 % longer the other way). Where sums are stored as they are, the kernel has all panels at
// once, for its tile may be wider than one.
void GemmBlock::multiply_across() {
  if (stores_sums(p_.epilogue)) {
    const Matrix& out = p_.epilogue.out;
    const auto rows = static_cast<const float*>(p_.a.data) + i0_ * p_.a.row;
    const auto panels = static_cast<const float*>(b_.direct->data) + j0_;
    const auto to = static_cast<float*>(const_cast<void*>(out.data)) + i0_ * out.row + j0_;
    return g_.tile_in_place(int(mc_), int(nt_), KW_, rows, p_.a.row, panels, b_.direct->row,
                            {to, out.row});
  }
  for (int64_t r = 0; r < rows_; ++r) {
    for (int64_t c = 0; c < cols_; ++c) {
      multiply(0, KW_, r, c, panel_of_b(0, KW_, j0_ + c * g_.NR), nullptr, 0);
    }
  }
}

// One block of K after the other: A's is packed, and meets all of B's panels. Few rows go down one
// panel after the other instead, as it lies in memory.
void GemmBlock::run() {
  const auto for_k = [&](const auto& body) {
    int64_t k = 0;
    do {  // without any K there is still a store
      const int64_t kc = std::min<int64_t>(g_.KC, KW_ - k);
      body(k, kc);
      k += kc;
    } while (k < KW_);
  };
  const auto pack = [&](int64_t k, int64_t kc) {
    for (int64_t r = 0; r < rows_ && !rows_in_place_; ++r) {
      g_.pack_a(p_.a, i0_ + r * g_.MR, rows_of(r), k, kc, p_.K, panel_of_a(r, k, kc));
    }
  };
  const double step_ns = 0.04 * double(rows_ * tile_words_);
  const auto step = [&](int64_t k, int64_t kc, int64_t c) {
    multiply_down(k, kc, c);
    poll_after(step_ns * double(kc));  // K may be as long as a caller likes
  };
  if (across_) return multiply_across();
  if (down_) {
    for_k(pack);
    for (int64_t c = 0; c < cols_; ++c) {
      for_k([&](int64_t k, int64_t kc) { step(k, kc, c); });
    }
    return;
  }
  for_k([&](int64_t k, int64_t kc) {
    pack(k, kc);
    for (int64_t c = 0; c < cols_; ++c) step(k, kc, c);
  });
}

}  // namespace tilewright
