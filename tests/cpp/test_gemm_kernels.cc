// Micro-kernels and packing of every level between guard pages: all sizes around MR, NR and KC, all
// layouts. Data are small integers, so that they are exact in every float dtype and compare equal.
#include <algorithm>
#include <cstring>
#include <vector>

#include "guarded.h"
#include "test.h"

using namespace tilewright;
using test::Against;
using test::Guarded;

namespace {

constexpr int64_t kSlack = 64;  // words that packing may write beyond a panel (cpu/gemm.cc)

enum class Layout { rows, columns, reversed, spaced };
constexpr Layout kLayouts[] = {Layout::rows, Layout::columns, Layout::reversed, Layout::spaced};

// A (rows, cols) matrix in a given layout that meets a guard page.
struct Source {
  Guarded memory;
  Matrix matrix;

  static int64_t elements(int64_t rows, int64_t cols, Layout layout) {
    return layout == Layout::spaced ? (2 * rows - 1) * 3 * cols : rows * cols;
  }

  Source(DType t, int64_t rows, int64_t cols, Layout layout, int seed)
      : memory(elements(rows, cols, layout) * dtype_size(t),
               layout == Layout::reversed ? Against::start : Against::end) {
    char* first = memory.as<char>();
    matrix = {first, t, cols, 1};
    if (layout == Layout::columns) matrix = {first, t, 1, rows};
    if (layout == Layout::reversed) {
      matrix = {first + (rows * cols - 1) * dtype_size(t), t, -cols, -1};
    }
    if (layout == Layout::spaced) matrix = {first + 2 * dtype_size(t), t, 6 * cols, 3};
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) {
        const int value = test::small(i * cols + j, seed);
        test::set_element(const_cast<void*>(matrix.data), i * matrix.row + j * matrix.col, t,
                          float(t == DType::u8 ? value + 4 : value));
      }
    }
  }
  float at(int64_t i, int64_t j) const {
    return test::element(matrix.data, i * matrix.row + j * matrix.col, matrix.dtype);
  }
};

// The panel that was packed into `from`, moved against a guard page: reading beyond it faults.
void tighten(const Guarded& from, const Guarded& to, int64_t bytes) {
  std::memcpy(to.as<char>(), from.as<char>(), size_t(bytes));
}

// Panels as the tile reads them, and the units' state around it.
int64_t a_panel_bytes(const GemmKernels& g, int64_t kc) {
  const int64_t words = (kc + g.k_step - 1) / g.k_step * g.k_step;
  return words * g.MR * g.a_bytes + (g.exact ? g.MR * 4 : 0);
}
int64_t b_panel_bytes(const GemmKernels& g, int64_t kc) {
  if (!g.prepare) return kc * g.NR * g.b_bytes;
  const int64_t words = (kc + g.k_step - 1) / g.k_step * g.k_step;
  return words * g.NR * g.prepared_bytes + (g.exact || g.starts ? g.NR * 4 : 0);
}
void multiply(const GemmKernels& g, int mr, int64_t kc, const void* a, const void* b, void* tile) {
  if (g.begin) g.begin();
  g.tile(mr, kc, a, b, g.NR, {tile, g.NR});
  if (g.end) g.end();
}
void prepare(const GemmKernels& g, const ColumnPanel& p) {
  for (int64_t k = 0; k < p.kc; k += g.k_step) g.prepare(p, k, k + g.k_step);
}

// pack_a, pack_b and tile for one size: the product of the panels is the product of the matrices.
// in_place: panels of B are prepared from the matrix's rows.
void check_product(const GemmKernels& g, DType ta, DType tb, int mr, int nr, int64_t K,
                   Layout layout, bool in_place = false) {
  const int64_t kc = (K + g.k_per_word - 1) / g.k_per_word;
  const Source a(ta, mr, K, layout, 1), b(tb, K, nr, layout, 2);
  const int64_t a_bytes = a_panel_bytes(g, kc), b_bytes = kc * g.NR * g.b_bytes;
  const Guarded packed_a(a_bytes + kSlack * 4), packed_b(b_bytes + kSlack * g.b_bytes);
  g.pack_a(a.matrix, 0, mr, 0, kc, K, packed_a.as<void>());
  g.pack_b(b.matrix, 0, nr, 0, kc, K, packed_b.as<void>());
  const Guarded tight_a(a_bytes), tight_b(b_bytes), tile(int64_t(g.MR) * g.NR * 4);
  tighten(packed_a, tight_a, a_bytes);
  tighten(packed_b, tight_b, b_bytes);
  const Guarded prepared(b_panel_bytes(g, kc));
  const bool prepares = g.prepare && (in_place || !g.reads_packed);
  if (in_place) {
    prepare(g, {b.matrix.data, b.matrix.row, kc, K, true, prepared.as<void>()});
  } else if (prepares) {
    prepare(g, {tight_b.as<void>(), g.NR, kc, K, false, prepared.as<void>()});
  }
  multiply(g, mr, kc, tight_a.as<void>(), prepares ? prepared.as<void>() : tight_b.as<void>(),
           tile.as<void>());
  const DType sum_type = tb == DType::s8 ? DType::s32 : DType::f32;
  bool equal = true;
  for (int i = 0; i < mr; ++i) {
    for (int j = 0; j < nr; ++j) {
      float want = 0;
      for (int64_t k = 0; k < K; ++k) want += a.at(i, k) * b.at(k, j);
      equal = equal && test::element(tile.as<void>(), i * g.NR + j, sum_type) == want;
    }
  }
  CHECK(equal);
}

// Weights in every width, with and without offsets, against the float kernel: the same bits, and
// nothing is read beyond the panels, their scales or the rows.
struct GuardedWeights {
  int64_t lines, groups, panel_bytes;
  Guarded words, scale, offset;
  WeightPanel first;

  GuardedWeights(int NR, int panels, int bits, bool offsets, int64_t K, int64_t group)
      : lines((K + 1) / 2),
        groups((K + group - 1) / group),
        panel_bytes(lines * NR * bits / 4),
        words(panels * panel_bytes),
        scale(groups * panels * NR * 4),
        offset(groups * panels * NR * 4) {
    for (int64_t i = 0; i < panels * panel_bytes; ++i) words.as<char>()[i] = char(i * 37 + 11);
    for (int64_t i = 0; i < groups * panels * NR; ++i) {
      scale.as<float>()[i] = float(test::small(i, 3)) / 8;
      offset.as<float>()[i] = float(test::small(i, 4));
    }
    first = {words.as<char>(), bits, 0, group, scale.as<float>(), nullptr, panels * NR, lines};
    if (offsets) first.shift = bits == 8 ? 128 : 8, first.offset = offset.as<float>();
  }
  WeightPanel panel(int NR, int p) const {
    WeightPanel w = first;
    w.words += p * panel_bytes, w.scale += p * NR;
    if (w.offset) w.offset += p * NR;
    return w;
  }
};

bool stands_for(const WeightPanel& w, int NR, int64_t K, const float* panel) {
  for (int64_t k = 0; k < K; ++k) {
    for (int j = 0; j < NR; ++j) {
      const int64_t line = k / 2 * NR * w.bits / 4;
      const int byte = int8_t(w.words[line + (w.bits == 8 ? 2 * j + k % 2 : j)]);
      const int q = w.bits == 8 ? byte : k % 2 ? byte >> 4 : int8_t(byte * 16) >> 4;
      const float s = w.scale[k / w.group * w.ld + j];
      const float o = w.offset ? w.offset[k / w.group * w.ld + j] : 0;
      if (panel[k * NR + j] != s * float(q + w.shift) + o) return false;
    }
  }
  return true;
}

// The same by way of the floats, as the drivers do it: in blocks of K that end at `from` and K.
void multiply_floats(const GemmKernels& g, int rows, const float* a, int64_t lda,
                     const float* floats, int64_t from, int64_t K, float* sums) {
  std::vector<float> packed(size_t(K * g.MR + 64));  // packing may write on
  std::vector<float> sum(size_t(g.MR * g.NR));
  for (int i0 = 0; i0 < rows; i0 += g.MR) {
    const int mr = std::min(g.MR, rows - i0);
    for (int64_t k = 0, end = from > 0 ? from : K; k < K; k = end, end = K) {
      g.pack_a({a, DType::f32, lda, 1}, i0, mr, k, end - k, K, packed.data());
      g.tile(mr, end - k, packed.data(), floats + k * g.NR, g.NR,
             {sum.data(), g.NR, k > 0 ? sum.data() : nullptr});
    }
    std::copy_n(sum.data(), mr * g.NR, sums + i0 * g.NR);
  }
}

// Panels side by side, rows lda apart, the sums over the rows of B before `from` set and the rest added.
void check_weights(const KernelTable& table, int panels, int bits, bool offsets, int64_t K,
                   int64_t group, int64_t from) {
  const GemmKernels& g = table.gemm_f32;
  const int NR = g.NR, few = table.weights.few;
  const int64_t lda = K + 3;
  const GuardedWeights b(NR, panels, bits, offsets, K, group);
  const Guarded floats(panels * K * NR * 4), want(int64_t(few) * NR * 4);
  bool equal = true;
  for (int p = 0; p < panels; ++p) {
    float* const panel = floats.as<float>() + p * K * NR;
    table.weights.to_floats(b.panel(NR, p), 0, K, panel);
    equal = equal && stands_for(b.panel(NR, p), NR, K, panel);
  }
  for (int rows = 1; rows <= few; ++rows) {
    const int64_t count = (rows - 1) * lda + K;
    const Guarded a(count * 4), got(((panels - 1) * few + rows) * NR * 4);
    for (int64_t i = 0; i < count; ++i) a.as<float>()[i] = float(test::small(i, 5)) / 3;
    for (int64_t k = 0, end = from > 0 ? from : K; k < K; k = end, end = K) {
      table.weights.tiles(
          {rows, panels, a.as<float>() + k, lda, b.first, k, end - k, {}, got.as<float>()});
    }
    for (int p = 0; p < panels; ++p) {
      const float* const panel = floats.as<float>() + p * K * NR;
      multiply_floats(g, rows, a.as<float>(), lda, panel, from, K, want.as<float>());
      equal = equal && std::memcmp(got.as<float>() + p * few * NR, want.as<void>(),
                                   size_t(rows) * NR * 4) == 0;
    }
  }
  CHECK(equal);
}

void fill(const Guarded& x, int64_t bytes, int value) {
  std::memset(x.as<void>(), value, size_t(bytes));
}
bool same(const Guarded& x, const Guarded& y, int64_t bytes) {
  return std::memcmp(x.as<void>(), y.as<void>(), size_t(bytes)) == 0;
}

template <class T>
void add_as(const Guarded& tile, const Guarded& sum, int count) {
  for (int i = 0; i < count; ++i) sum.as<T>()[i] += tile.as<T>()[i];
}
void add(DType t, const Guarded& tile, const Guarded& sum, int count) {
  t == DType::s32 ? add_as<int32_t>(tile, sum, count) : add_as<float>(tile, sum, count);
}

// All of an aside beside a tile, against each alone. ta, tb: of the matrices; t: of the output, of nr
// columns.
void check_beside(const GemmKernels& g, DType ta, DType tb, DType t, int nr, bool last) {
  const DType sum_type = tb == DType::s8 ? DType::s32 : DType::f32;
  const int64_t tile_bytes = int64_t(g.MR) * g.NR * 4;
  for (const int64_t kc : {int64_t(0), int64_t(1), int64_t(g.k_step) + 1, int64_t(g.KC)}) {
    const int64_t K = kc * g.k_per_word, a_bytes = a_panel_bytes(g, kc);
    const int64_t b_bytes = b_panel_bytes(g, kc);
    const Guarded a(a_bytes), b(b_bytes), before(tile_bytes), sum(tile_bytes);
    const Guarded want_before(tile_bytes), want_sum(tile_bytes), tile(tile_bytes), want(tile_bytes);
    const Guarded next_a(a_bytes), want_a(a_bytes), next_b(b_bytes), want_b(b_bytes);
    fill(a, a_bytes, 1), fill(b, b_bytes, 1);
    for (const Guarded* x : {&before, &want_before}) fill(*x, tile_bytes, 3);
    for (const Guarded* x : {&sum, &want_sum}) fill(*x, tile_bytes, 4);
    for (const Guarded* x : {&next_a, &want_a}) fill(*x, a_bytes, 5);
    for (const Guarded* x : {&next_b, &want_b}) fill(*x, b_bytes, 5);
    const int mr = g.MR - 1;
    const Source rows(ta, mr, K, Layout::rows, 1), columns(tb, K, g.NR, Layout::rows, 2);
    const Source out(t, mr, nr, Layout::rows, 6), want_out(t, mr, nr, Layout::rows, 6);

    Epilogue e;
    e.out = want_out.matrix;
    add(sum_type, want_before, want_sum, g.MR * g.NR);
    if (last) {  // complete sums stay in the tile
      std::memcpy(want_before.as<void>(), want_sum.as<void>(), size_t(mr * g.NR) * 4);
      fill(want_sum, tile_bytes, 4);
      g.store(want_before.as<void>(), 0, mr, 0, nr, e);
    } else {
      const int64_t done = int64_t(mr) * g.NR * 4;
      std::memcpy(want_sum.as<char>() + done, sum.as<char>() + done, size_t(tile_bytes - done));
    }
    g.pack_a(rows.matrix, 0, mr, 0, kc, K, want_a.as<void>());
    prepare(g, {columns.matrix.data, g.NR, kc, K, true, want_b.as<void>()});
    multiply(g, g.MR, kc, a.as<void>(), b.as<void>(), want.as<void>());

    e.out = out.matrix;
    GemmAside aside;
    aside.tile = before.as<void>(), aside.sum = sum.as<void>();
    if (last) aside.epilogue = &e;
    aside.store = g.store, aside.mr = mr, aside.nr = nr;
    aside.rows = {rows.matrix, 0, mr, 0, kc, K, next_a.as<void>()};
    aside.columns = {columns.matrix.data, g.NR, kc, K, true, next_b.as<void>()};
    aside.columns_to = (kc + g.k_step - 1) / g.k_step * g.k_step;
    aside.ahead[0] = {a.as<char>(), 1, a_bytes, a_bytes};
    g.begin();
    g.tile_beside(g.MR, kc, {a.as<void>(), kLineBytes, g.a_step}, b.as<void>(),
                  {tile.as<void>(), g.NR}, aside);
    g.end();
    CHECK(same(tile, want, tile_bytes));
    CHECK(same(before, want_before, tile_bytes));
    CHECK(same(sum, want_sum, tile_bytes));
    CHECK(same(next_a, want_a, a_bytes));
    CHECK(same(next_b, want_b, b_bytes));
    CHECK(same(out.memory, want_out.memory, int64_t(mr) * nr * dtype_size(t)));
  }
}

std::vector<int64_t> depths(const GemmKernels& g) {
  const int64_t whole = int64_t(g.KC) * g.k_per_word;
  return {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, whole - 1, whole};
}

void check_products(const GemmKernels& g, DType ta, DType tb) {
  for (const Layout layout : kLayouts) {
    for (const int64_t K : depths(g)) {
      for (int mr = 1; mr <= g.MR; ++mr) check_product(g, ta, tb, mr, mr % g.NR + 1, K, layout);
      for (const int nr : {g.NR - 1, g.NR}) check_product(g, ta, tb, g.MR, nr, K, layout);
    }
    for (int nr = 1; nr <= g.NR; ++nr) check_product(g, ta, tb, (nr - 1) % g.MR + 1, nr, 9, layout);
  }
}

// store for one size and layout of out: y = relu(2 acc + bias) + residual in a float dtype.
void check_store(const GemmKernels& g, DType t, int mr, int nr, Layout layout) {
  const bool integers = g.k_per_word > 1;
  const Guarded tile(int64_t(g.MR) * g.NR * 4), bias(nr * 4), scale_a(mr * 4), scale_b(nr * 4);
  const DType sum_type = integers ? DType::s32 : DType::f32;
  for (int i = 0; i < g.MR * g.NR; ++i) {
    test::set_element(tile.as<void>(), i, sum_type, float(test::small(i, 3)));
  }
  for (int j = 0; j < nr; ++j) bias.as<float>()[j] = float(test::small(j, 4));
  for (int i = 0; i < mr; ++i) scale_a.as<float>()[i] = 0.5f;
  for (int j = 0; j < nr; ++j) scale_b.as<float>()[j] = 4.0f;
  const Source residual(t, mr, nr, layout, 5), out(t, mr, nr, layout, 6);
  Epilogue e;
  e.activation = Activation::relu;
  e.bias = bias.as<float>();
  if (integers) {
    e.scale_a = scale_a.as<float>(), e.scale_b = scale_b.as<float>();
  } else {
    e.alpha = 2.0f;
  }
  e.residual = residual.matrix;
  e.out = out.matrix;
  g.store(tile.as<void>(), 0, mr, 0, nr, e);
  bool equal = true;
  for (int i = 0; i < mr; ++i) {
    for (int j = 0; j < nr; ++j) {
      const float z = 2.0f * float(test::small(i * g.NR + j, 3)) + bias.as<float>()[j];
      equal = equal && out.at(i, j) == (z > 0 ? z : 0.0f) + residual.at(i, j);
    }
  }
  CHECK(equal);
}

void check_stores(const GemmKernels& g) {
  for (const DType t : kFloats) {
    for (const Layout layout : kLayouts) {
      for (int mr = 1; mr <= g.MR; ++mr) {
        for (const int nr : {1, g.NR / 2 - 1, g.NR / 2, g.NR / 2 + 1, g.NR - 1, g.NR}) {
          check_store(g, t, mr, nr, layout);
        }
      }
    }
  }
}

}  // namespace

TEST(float_panels_multiply_right) {
  test::for_each_level([](const KernelTable& table) {
    check_products(table.gemm_f32, DType::f32, DType::f32);
    check_products(table.gemm_f32, DType::bf16, DType::bf16);
    check_products(table.gemm_f32, DType::bf16, DType::f32);
    check_products(table.gemm_f32, DType::f16, DType::bf16);
  });
}

TEST(int8_panels_multiply_right) {
  test::for_each_level([](const KernelTable& table) {
    check_products(table.gemm_s8, DType::s8, DType::s8);
    check_products(table.gemm_u8, DType::u8, DType::s8);
  });
}

TEST(panels_of_bfloat16_multiply_right) {
  test::for_each_level([](const KernelTable& table) {
    if (table.gemm_bf16.tile) check_products(table.gemm_bf16, DType::bf16, DType::bf16);
  });
}

TEST(panels_for_matrix_units_multiply_right) {
  test::for_each_level([](const KernelTable& table) {
    check_products(table.gemm_s8_once, DType::s8, DType::s8);
    check_products(table.gemm_u8_once, DType::u8, DType::s8);
    for (const GemmKernels& g : table.gemm_split) {
      if (!g.tile) continue;
      check_products(g, DType::f32, DType::f32);
      check_products(g, DType::bf16, DType::f32);
      check_products(g, DType::f16, DType::f32);
    }
  });
}

// Rows of A and of the output where they are, between guard pages, of one or more panels of B side by side:
// the bits of the packed panels, one at a time.
void check_in_place(const GemmKernels& g, int mr, int panels, int64_t K) {
  const int nr = panels * g.NR;
  const int64_t ldt = nr + 3;
  const Source a(DType::f32, mr, K, Layout::rows, 1), b(DType::f32, K, nr, Layout::rows, 2);
  const Guarded packed((K * g.MR + kSlack) * 4), want(int64_t(g.MR) * g.NR * 4);
  const Guarded out(((mr - 1) * ldt + nr) * 4);
  const auto pa = static_cast<const float*>(a.matrix.data);
  const auto pb = static_cast<const float*>(b.matrix.data);
  for (const bool onto : {false, true}) {
    if (onto && panels > 1) continue;
    const Guarded sum(int64_t(mr) * g.NR * 4);
    for (int i = 0; i < mr * g.NR; ++i) sum.as<float>()[i] = onto ? float(i) : 0.0f;
    g.tile_in_place(mr, nr, K, pa, K, pb, nr,
                    {out.as<void>(), ldt, onto ? sum.as<void>() : nullptr});
    bool equal = true;
    for (int i0 = 0; i0 < mr; i0 += g.MR) {
      const int rows = std::min(g.MR, mr - i0);
      g.pack_a(a.matrix, i0, rows, 0, K, K, packed.as<void>());
      for (int j = 0; j < nr; ++j) {
        if (j % g.NR == 0) {
          g.tile(rows, K, packed.as<void>(), pb + j, nr, {want.as<void>(), g.NR});
        }
        for (int i = 0; i < rows; ++i) {
          const float before = onto ? sum.as<float>()[(i0 + i) * g.NR + j] : 0.0f;
          const float sums = want.as<float>()[i * g.NR + j % g.NR] + before;
          equal = equal && out.as<float>()[(i0 + i) * ldt + j] == sums;
        }
      }
    }
    CHECK(equal);
  }
}

TEST(rows_of_both_in_place_multiply_right) {
  test::for_each_level([](const KernelTable& table) {
    const GemmKernels& g = table.gemm_f32;
    if (!g.tile_in_place) return;
    for (int mr = 1; mr <= g.MR + 3; ++mr) {
      for (const int64_t K : {1, 3, 64, 66}) {
        for (const int panels : {1, 2, 3, 4}) check_in_place(g, mr, panels, K);
      }
    }
  });
}

// Tiles to rows apart and onto sums, which may lie where the tile goes: what the tile alone and one
// addition give, and nothing between the rows. What is fetched meanwhile may lie anywhere.
void check_out(const GemmKernels& g, DType t, int mr) {
  const int64_t kc = 2 * g.k_step + 1, ldt = g.NR + 3, a_bytes = a_panel_bytes(g, kc);
  const int64_t tile_bytes = int64_t(g.MR) * g.NR * 4;
  const Guarded a(a_bytes), b(b_panel_bytes(g, kc)), alone(tile_bytes), sum(tile_bytes);
  const Guarded onto(tile_bytes), out(((mr - 1) * ldt + g.NR) * 4);
  // Small numbers in any of the types that the panels may have.
  for (int64_t i = 0; i < a_bytes; i += 4) test::set_element(a.as<void>(), i / 4, t, float(i % 5));
  for (int64_t i = 0; i < b_panel_bytes(g, kc); i += 4) {
    test::set_element(b.as<void>(), i / 4, t, float(i % 7));
  }
  for (int i = 0; i < g.MR * g.NR; ++i) {
    test::set_element(sum.as<void>(), i, t, float(test::small(i, 3)));
  }
  fill(out, ((mr - 1) * ldt + g.NR) * 4, 77);
  std::memcpy(onto.as<void>(), sum.as<void>(), size_t(tile_bytes));
  g.tile(mr, kc, a.as<void>(), b.as<void>(), g.NR, {alone.as<void>(), g.NR});
  const char* const end = b.as<char>() + b_panel_bytes(g, kc);
  g.tile(mr, kc, a.as<void>(), b.as<void>(), g.NR,
         {onto.as<void>(), g.NR, onto.as<void>(), end, 4096});
  bool equal = true;
  for (int i = 0; i < mr * g.NR; ++i) {
    const float want = test::element(alone.as<void>(), i, t) + float(test::small(i, 3));
    equal = equal && test::element(onto.as<void>(), i, t) == want;
  }
  CHECK(equal);
  if (mr < g.MR) return;  // a kernel of more rows may be taken, up to MR
  g.tile(mr, kc, a.as<void>(), b.as<void>(), g.NR, {out.as<void>(), ldt, sum.as<void>()});
  for (int i = 0; i < mr; ++i) {
    const char* const row = out.as<char>() + i * ldt * 4;
    equal = equal && std::memcmp(row, onto.as<float>() + i * g.NR, size_t(g.NR) * 4) == 0;
    for (int64_t gap = g.NR * 4; i + 1 < mr && gap < ldt * 4; ++gap)
      equal = equal && row[gap] == 77;
  }
  CHECK(equal);
}

TEST(tiles_go_to_rows_and_onto_sums) {
  test::for_each_level([](const KernelTable& table) {
    const auto check = [](const GemmKernels& g, DType t) {
      if (!g.tile || g.tile_beside) return;
      for (int mr = 1; mr <= g.MR; ++mr) check_out(g, t, mr);
    };
    check(table.gemm_f32, DType::f32);
    check(table.gemm_bf16, DType::f32);
    for (const GemmKernels* g : {&table.gemm_s8, &table.gemm_u8}) check(*g, DType::s32);
    for (const GemmKernels* g : {&table.gemm_s8_once, &table.gemm_u8_once}) check(*g, DType::s32);
  });
}

// Panels of B that are prepared from the matrix's own rows.
TEST(rows_in_place_multiply_right) {
  const auto check = [](const GemmKernels& g, DType ta, DType tb) {
    if (!g.prepare) return;
    for (const int64_t K : depths(g)) {
      for (const int mr : {1, g.MR}) check_product(g, ta, tb, mr, g.NR, K, Layout::rows, true);
    }
  };
  test::for_each_level([&](const KernelTable& table) {
    check(table.gemm_bf16, DType::bf16, DType::bf16);
    check(table.gemm_s8_once, DType::s8, DType::s8);
    check(table.gemm_u8_once, DType::u8, DType::s8);
    for (const GemmKernels& g : table.gemm_split) check(g, DType::f32, DType::f32);
  });
}

// A tile with the rest between its instructions gives the bits of one after the other.
TEST(work_beside_a_tile_is_done) {
  test::for_each_level([](const KernelTable& table) {
    for (const bool last : {false, true}) {
      const auto check = [&](const GemmKernels& g, DType ta, DType tb, DType t) {
        if (!g.tile_beside) return;
        for (const int nr : {g.NR, g.NR - 1}) check_beside(g, ta, tb, t, nr, last);
      };
      check(table.gemm_bf16, DType::bf16, DType::bf16, DType::bf16);
      check(table.gemm_s8_once, DType::s8, DType::s8, DType::s32);
      for (const GemmKernels& g : table.gemm_split) check(g, DType::f32, DType::f32, DType::f32);
    }
  });
}

TEST(weights_are_floats_on_the_way) {
  test::for_each_level([](const KernelTable& table) {
    for (const int bits : {8, 4}) {
      for (const int64_t K : {1, 2, 3, 31, 32, 33, 255, 256}) {
        for (const int64_t group : {int64_t(1), int64_t(5), int64_t(32), K}) {
          for (const int panels : {1, 2, 7}) {
            const int64_t from = panels % 2 ? 0 : K / 4 * 2;
            check_weights(table, panels, bits, false, K, group, from);
            check_weights(table, panels, bits, true, K, group, from);
          }
        }
      }
    }
  });
}

TEST(tiles_are_stored_right) {
  test::for_each_level([](const KernelTable& table) {
    check_stores(table.gemm_f32);
    check_stores(table.gemm_s8);
  });
}
