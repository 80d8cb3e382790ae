// Fragment layouts, ldmatrix, mma and how it accumulates. The layouts are compared to a second
// source, the (lane, register) strides that CUTLASS gives for the same instructions.
#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "device.h"
#include "emulator/fragments.h"
#include "tensor_kernels.h"

using namespace tilewright;
using namespace tensor_kernels;

namespace {

// A layout as CuTe writes it: the mixed-radix digits of lane and element, times strides, give
// row + rows * column. (mma_traits_sm80.hpp, "SM80_16x8x{8,16,32}_...".)
struct Digits {
  std::vector<int> sizes, strides;
  int at(int i) const {
    int sum = 0;
    for (std::size_t d = 0; d < sizes.size(); ++d) {
      sum += i % sizes[d] * strides[d];
      i /= sizes[d];
    }
    return sum;
  }
};
struct Layout {
  Digits lane, element;
  int at(int l, int e) const { return lane.at(l) + element.at(e); }
};

// A by (m, k), B by (n, k), C by (m, n); n elements in a register.
const Layout kA16{{{4, 8}, {32, 1}}, {{2, 2, 2}, {16, 8, 128}}};
const Layout kB16{{{4, 8}, {16, 1}}, {{2, 2}, {8, 64}}};
const Layout kA8{{{4, 8}, {64, 1}}, {{4, 2, 2}, {16, 8, 256}}};
const Layout kB8{{{4, 8}, {32, 1}}, {{4, 2}, {8, 128}}};
const Layout kA32{{{4, 8}, {16, 1}}, {{2, 2}, {8, 64}}};
const Layout kB32{{{4, 8}, {8, 1}}, {{2}, {32}}};
const Layout kC{{{4, 8}, {32, 1}}, {{2, 2}, {16, 8}}};

struct Operand {
  Layout a, b;
  int n;  // elements in a register; the depth is 8 n
};
Operand operand(int n) {
  if (n == 1) return {kA32, kB32, 1};
  if (n == 2) return {kA16, kB16, 2};
  return {kA8, kB8, 4};
}

struct Tile {
  std::vector<std::uint32_t> a,
      b;                  // bit patterns of the elements: a[m * depth + k], b[n * depth + k]
  std::vector<double> c;  // c[m * 8 + n], the exact product of what they stand for
};

// One mma, its registers filled and read by CUTLASS's strides.
template <Kind kind, class D>
std::vector<D> through_registers(const Tile& tile, int n, D start, int times = 1) {
  const Operand layout = operand(n);
  const int depth = 8 * n, bits = 32 / n;
  const Device<std::uint32_t> a(32 * 4, 0u), b(32 * 2, 0u);
  const Device<D> c(32 * 4, start);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4 * n; ++i) {
      const int at = layout.a.at(lane, i), m = at % 16, k = at / 16;
      a[std::size_t(lane * 4 + i / n)] |= tile.a[std::size_t(m * depth + k)] << (i % n * bits);
    }
    for (int i = 0; i < 2 * n; ++i) {
      const int at = layout.b.at(lane, i), column = at % 8, k = at / 8;
      b[std::size_t(lane * 2 + i / n)] |= tile.b[std::size_t(column * depth + k)] << (i % n * bits);
    }
  }
  IS_RIGHT(outcome(product<kind, D>, dim3(1), dim3(32), 0, a.get(), b.get(), c.get(), times));
  std::vector<D> out(16 * 8);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int at = kC.at(lane, i);
      out[std::size_t(at % 16 * 8 + at / 16)] = c[std::size_t(lane * 4 + i)];
    }
  }
  return out;
}

std::uint32_t bits_of(Kind kind, float v) {
  switch (kind) {
    case Kind::bf16:
      return std::bit_cast<std::uint32_t>(v) >> 16;
    case Kind::f16:
      return __half_as_ushort(__float2half(v));
    case Kind::tf32:
      return std::bit_cast<std::uint32_t>(v);
    case Kind::s8:
      return static_cast<std::uint8_t>(static_cast<int>(v));
  }
  return 0;
}

// Small integers, which every kind holds and sums exactly.
Tile integers(Kind kind, int n) {
  const int depth = 8 * n;
  std::mt19937 random(static_cast<unsigned>(n));
  std::vector<float> a(std::size_t(16 * depth)), b(std::size_t(8 * depth));
  for (float& v : a) v = static_cast<float>(random() % 201) - 100;
  for (float& v : b) v = static_cast<float>(random() % 201) - 100;
  Tile tile;
  for (float v : a) tile.a.push_back(bits_of(kind, v));
  for (float v : b) tile.b.push_back(bits_of(kind, v));
  for (int m = 0; m < 16; ++m) {
    for (int j = 0; j < 8; ++j) {
      double sum = 0;
      for (int k = 0; k < depth; ++k) {
        sum += double(a[std::size_t(m * depth + k)]) * double(b[std::size_t(j * depth + k)]);
      }
      tile.c.push_back(sum);
    }
  }
  return tile;
}

template <class D>
void check_equal(const std::vector<D>& got, const std::vector<double>& wanted, double plus = 0) {
  CHECK(got.size() == wanted.size());
  for (std::size_t i = 0; i < got.size(); ++i) CHECK(double(got[i]) == wanted[i] + plus);
}

// Every product a b is x y, every accumulator begins as c.
float constant_mma(Kind kind, float x, float y, float c, int times = 1) {
  const int n = kind == Kind::tf32 ? 1 : 2;
  Tile tile;
  tile.a.assign(std::size_t(16 * 8 * n), bits_of(kind, x));
  tile.b.assign(std::size_t(8 * 8 * n), bits_of(kind, y));
  std::vector<float> all;
  if (kind == Kind::bf16) all = through_registers<Kind::bf16>(tile, n, c, times);
  if (kind == Kind::f16) all = through_registers<Kind::f16>(tile, n, c, times);
  if (kind == Kind::tf32) all = through_registers<Kind::tf32>(tile, n, c, times);
  for (float v : all) CHECK(std::bit_cast<int>(v) == std::bit_cast<int>(all[0]));
  return all[0];
}

struct Truncated {
  Truncated() { emulator::set_accumulation(emulator::Accumulation::truncated); }
  ~Truncated() { emulator::set_accumulation(emulator::Accumulation::rounded); }
  Truncated(const Truncated&) = delete;
};

// One step of truncating accumulation, plainly.
float truncated_step(const std::vector<double>& terms) {
  double largest = 0, sum = 0;
  for (double t : terms) largest = std::max(largest, std::abs(t));
  if (largest == 0) return 0;
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 23);
  for (double t : terms) sum += std::trunc(t / unit) * unit;
  if (sum == 0) return 0;
  const double last = std::ldexp(1.0, std::ilogb(sum) - 23);
  return static_cast<float>(std::trunc(sum / last) * last);
}

}  // namespace

TEST(layouts_agree_with_a_second_source) {
  for (const int n : {1, 2, 4}) {
    const Operand layout = operand(n);
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4 * n; ++i) {
        const emulator::Place p = emulator::place_in_a(lane, i / n, i % n, n);
        CHECK(layout.a.at(lane, i) == p.row + 16 * p.column);
      }
      for (int i = 0; i < 2 * n; ++i) {
        const emulator::Place p = emulator::place_in_b(lane, i / n, i % n, n);
        CHECK(layout.b.at(lane, i) == p.column + 8 * p.row);
      }
      for (int i = 0; i < 4; ++i) {
        const emulator::Place p = emulator::place_in_c(lane, i);
        CHECK(kC.at(lane, i) == p.row + 16 * p.column);
      }
    }
  }
}

TEST(products_by_registers) {
  check_equal(through_registers<Kind::bf16>(integers(Kind::bf16, 2), 2, 3.0f),
              integers(Kind::bf16, 2).c, 3);
  check_equal(through_registers<Kind::f16>(integers(Kind::f16, 2), 2, 0.0f),
              integers(Kind::f16, 2).c);
  check_equal(through_registers<Kind::tf32>(integers(Kind::tf32, 1), 1, -5.0f),
              integers(Kind::tf32, 1).c, -5);
  check_equal(through_registers<Kind::s8>(integers(Kind::s8, 4), 4, 1000000),
              integers(Kind::s8, 4).c, 1000000);
}

TEST(integers_wrap_and_are_exact) {
  Tile tile;
  tile.a.assign(16 * 32, bits_of(Kind::s8, -128));
  tile.b.assign(8 * 32, bits_of(Kind::s8, -128));
  const auto sums = through_registers<Kind::s8>(tile, 4, std::numeric_limits<int>::max() - 5);
  for (const int v : sums) {
    CHECK(v == std::numeric_limits<int>::min() + 32 * 16384 - 6);
  }
}

template <class A, class B>
void check_signs() {
  const Device<std::int32_t> c(128);
  IS_RIGHT(outcome(product_of_bytes<A, B>, dim3(1), dim3(32), 0, 0x81u, 0xfeu, c.get()));
  const int product = static_cast<A>(0x81) * static_cast<B>(0xfe);
  for (std::size_t i = 0; i < c.size(); ++i) CHECK(c[i] == 32 * product);
}
TEST(each_operand_has_its_sign) {
  check_signs<std::int8_t, std::int8_t>();
  check_signs<std::int8_t, std::uint8_t>();
  check_signs<std::uint8_t, std::int8_t>();
  check_signs<std::uint8_t, std::uint8_t>();
}

template <Kind kind, class T, class D>
void check_ldmatrix(int n) {
  const Tile tile = integers(kind, n);
  const Device<T> a(tile.a.size()), b(tile.b.size());
  for (std::size_t i = 0; i < a.size(); ++i) a[i] = static_cast<T>(tile.a[i]);
  for (std::size_t i = 0; i < b.size(); ++i) b[i] = static_cast<T>(tile.b[i]);
  const Device<D> c(128);
  IS_RIGHT(outcome(product_through_ldmatrix<kind, T, D>, dim3(1), dim3(32), 768, a.get(), b.get(),
                   c.get()));
  check_equal(std::vector<D>(c.get(), c.get() + 128), tile.c);
  if (n != 2) return;
  const Device<T> by_rows(b.size());
  for (std::size_t i = 0; i < b.size(); ++i) by_rows[i % 16 * 8 + i / 16] = b[i];
  if constexpr (kind == Kind::bf16 || kind == Kind::f16) {
    IS_RIGHT(outcome(product_transposed<kind, T>, dim3(1), dim3(32), 768, a.get(), by_rows.get(),
                     c.get()));
    check_equal(std::vector<D>(c.get(), c.get() + 128), tile.c);
  }
}

TEST(products_through_ldmatrix) {
  for (const auto order : {emulator::Order::in_order, emulator::Order::reversed}) {
    Scheduled scheduled(order);
    check_ldmatrix<Kind::bf16, std::uint16_t, float>(2);
    check_ldmatrix<Kind::f16, std::uint16_t, float>(2);
    check_ldmatrix<Kind::tf32, std::uint32_t, float>(1);
    check_ldmatrix<Kind::s8, std::uint8_t, std::int32_t>(4);
  }
}

template <int n, bool transposed>
void check_matrices(int stride, unsigned wavefronts) {
  const Device<std::uint16_t> x(32 * 64);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<std::uint16_t>(i);
  const Device<std::uint32_t> out(32 * 4, 0u);
  emulator::take_counters();
  IS_RIGHT(
      outcome(matrices<n, transposed>, dim3(1), dim3(32), 32 * 64 * 2, x.get(), out.get(), stride));
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < n; ++i) {
      const auto element = [&](int e) {
        const int row = lane / 4, column = lane % 4 * 2 + e;
        const int r = transposed ? column : row, c = transposed ? row : column;
        return static_cast<std::uint32_t>((8 * i + r) * stride + c);
      };
      CHECK(out[std::size_t(lane * 4 + i)] == (element(0) | element(1) << 16));
    }
  }
  const emulator::Counters counters = emulator::take_counters();
  CHECK(counters.ldmatrix == 1 && counters.ldmatrix_ideal == n);
  CHECK(counters.ldmatrix_wavefronts == wavefronts * n);
}

TEST(matrices_and_their_bank_conflicts) {
  // Rows of 16 bytes side by side take one wavefront; 64 bytes apart four, 128 bytes apart eight.
  check_matrices<1, false>(8, 1);
  check_matrices<2, false>(8, 1);
  check_matrices<4, false>(8, 1);
  check_matrices<1, true>(8, 1);
  check_matrices<2, true>(8, 1);
  check_matrices<4, true>(8, 1);
  check_matrices<4, false>(32, 4);
  check_matrices<4, true>(64, 8);
  check_matrices<4, false>(56, 1);
}

TEST(whole_warps_and_aligned_rows) {
  const Device<std::uint32_t> out(64);
  FINDS("warp divergence", outcome(half_a_warp, dim3(1), dim3(32), 128, out.get()));
  FINDS("names lanes that have ended or never were: 0xffff0000",
        outcome(matrix_at, dim3(1), dim3(16), 128, out.get(), 0));
  IS_RIGHT(outcome(matrix_at, dim3(1), dim3(32), 128, out.get(), 0));
  FINDS("not aligned to 16 bytes", outcome(matrix_at, dim3(1), dim3(32), 128, out.get(), 4));
  FINDS("outside shared memory", outcome(matrix_at, dim3(1), dim3(32), 128, out.get(), 8));
  FINDS("outside shared memory", outcome(matrix_at, dim3(1), dim3(32), 128, out.get(), -8));
}

TEST(accumulation_rounds_or_truncates) {
  const float small = 0x1p-12f;  // products of 2^-24, half of the last bit of 1
  for (const Kind kind : {Kind::bf16, Kind::f16, Kind::tf32}) {
    const float depth = kind == Kind::tf32 ? 8 : 16;
    CHECK(constant_mma(kind, small, small, 1.0f) == 1.0f + depth * 0x1p-24f);
    const Truncated truncated;
    CHECK(constant_mma(kind, small, small, 1.0f, 100) == 1.0f);
    CHECK(constant_mma(kind, small, -small, 1.0f, 100) == 1.0f);
    CHECK(constant_mma(kind, small, -small, -1.0f, 100) == -1.0f);
    CHECK(constant_mma(kind, 1.5f, 0.5f, 0.25f) == 0.25f + depth * 0.75f);
    CHECK(constant_mma(kind, 0.0f, 1.0f, 0.0f) == 0.0f);
    CHECK(constant_mma(kind, 1.0f, 1.0f, 0x1p-140f) == depth);
  }
}

TEST(accumulation_is_not_finite_alike) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (int mode = 0; mode < 2; ++mode) {
    if (mode) emulator::set_accumulation(emulator::Accumulation::truncated);
    CHECK(constant_mma(Kind::bf16, kInf, 1.0f, 1.0f) == kInf);
    CHECK(constant_mma(Kind::bf16, 1.0f, 1.0f, -kInf) == -kInf);
    CHECK(std::isnan(constant_mma(Kind::bf16, kInf, -1.0f, kInf)));
    CHECK(std::isnan(constant_mma(Kind::f16, kInf, 0.0f, 1.0f)));
    CHECK(std::isnan(constant_mma(Kind::tf32, NAN, 1.0f, 1.0f)));
    CHECK(constant_mma(Kind::bf16, 0x1p100f, 0x1p100f, 1.0f) == kInf);
    CHECK(constant_mma(Kind::bf16, 0x1p-80f, 0x1p-80f, 0.0f) == 0.0f);
  }
  emulator::set_accumulation(emulator::Accumulation::rounded);
}

// Random operands of very different sizes against the plain formula, bit for bit.
template <Kind kind>
void check_truncation(int n, int group) {
  const int depth = 8 * n;
  std::mt19937 random(7);
  const auto draw = [&] {
    const float size = std::ldexp(1.0f + static_cast<float>(random() % 128) / 128,
                                  static_cast<int>(random() % 12) - 6);
    return random() % 2 ? size : -size;
  };
  const Truncated truncated;
  for (int trial = 0; trial < 20; ++trial) {
    std::vector<float> a(std::size_t(16 * depth)), b(std::size_t(8 * depth));
    Tile tile;
    for (float& v : a) tile.a.push_back(bits_of(kind, v = draw()));
    for (float& v : b) tile.b.push_back(bits_of(kind, v = draw()));
    const float start = draw() / 3;
    const std::vector<float> got = through_registers<kind>(tile, n, start);
    for (int i = 0; i < 16 * 8; ++i) {
      float c = start;
      for (int k = 0; k < depth; k += group) {
        std::vector<double> terms{c};
        for (int e = k; e < k + group; ++e) {
          terms.push_back(double(a[std::size_t(i / 8 * depth + e)]) *
                          double(b[std::size_t(i % 8 * depth + e)]));
        }
        c = truncated_step(terms);
      }
      CHECK(got[std::size_t(i)] == c);
    }
  }
}

TEST(truncation_is_what_it_says) {
  check_truncation<Kind::bf16>(2, 8);
  check_truncation<Kind::f16>(2, 8);
  check_truncation<Kind::tf32>(1, 4);
}

TEST(exp2_flushes_subnormals) {
  const Device<float> x(32, 0.0f), y(32);
  const float cases[] = {-3, -127, -126, 10.5f, 0x1p-140f, -INFINITY};
  std::copy(std::begin(cases), std::end(cases), x.get());
  IS_RIGHT(outcome(exp2_of, dim3(1), dim3(32), 0, x.get(), y.get()));
  CHECK(y[0] == 0.125f && y[1] == 0.0f && y[2] == FLT_MIN && y[4] == 1.0f && y[5] == 0.0f);
  CHECK(std::abs(y[3] - std::exp2(10.5f)) <= 1e-6f * y[3]);
}
