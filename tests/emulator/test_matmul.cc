// matmul's kernels: each kind, each size of tile, each layout of the operands, against the product in
// double; that schedules and neighbours change no bit; bank conflicts and sectors.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "cuda/kernels.h"
#include "cuda/matmul.h"
#include "matrices.h"
#include "tilewright/errors.h"
#include "tilewright/options.h"
#include "traffic.h"

namespace cuda = tilewright::cuda;
namespace emulator = tilewright::emulator;
using cuda::TileSize;
using tilewright::Activation, tilewright::DType, tilewright::Matmul, tilewright::Precision;

namespace {

constexpr TileSize kSizes[] = {TileSize::large, TileSize::medium, TileSize::flat};

// How float32 is multiplied in the rest of the scope.
struct Exactly {
  explicit Exactly(Precision p) : scope({.precision = p}) {}
  tilewright::OptionScope scope;
};

struct Truncated {
  Truncated() { emulator::set_accumulation(emulator::Accumulation::truncated); }
  ~Truncated() { emulator::set_accumulation(emulator::Accumulation::rounded); }
  Truncated(const Truncated&) = delete;
};

// What a product may be wrong by, relative to the sum of its terms' sizes: 2 sqrt(K) roundings of
// float32 (tests/tolerance.py), and what each product loses.
double relative_bound(std::int64_t K, Precision exact) {
  const double u = 0x1p-24, split = exact == Precision::medium ? 0x1p-10
                                    : exact == Precision::high ? 0x1p-20
                                                               : 0;
  return 2 * std::sqrt(double(std::max<std::int64_t>(K, 1))) * u + split;
}

struct Case {
  std::int64_t M, N, K;
  Layout a = Layout::rows, b = Layout::rows, out = Layout::rows;
  DType a_type = DType::f32, b_type = DType::f32, out_type = DType::f32;
};

std::string describe(const Case& c, TileSize size) {
  return std::to_string(c.M) + "," + std::to_string(c.N) + "," + std::to_string(c.K) + " layouts " +
         std::to_string(int(c.a)) + std::to_string(int(c.b)) + std::to_string(int(c.out)) +
         " dtypes " + tilewright::dtype_name(c.a_type) + " " + tilewright::dtype_name(c.b_type) +
         " size " + std::to_string(int(size));
}

// a b by the kernel, as float32 bits; checked against the product in double.
std::vector<float> check_product(const Case& c, TileSize size,
                                 Precision exact = Precision::highest) {
  const Exactly exactly(exact);
  Array a({c.M, c.K}, c.a_type, c.a, 1), b({c.K, c.N}, c.b_type, c.b, 2);
  Array out({c.M, c.N}, c.out_type, c.out, 3);
  Matmul op;
  op.a = a.view(), op.b = b.view(), op.out = out.view();
  cuda::matmul(op, size);
  out.check_margins(__FILE__, __LINE__);
  std::vector<float> got;
  int wrong = 0;
  const double u_out = c.out_type == DType::f32    ? 0x1p-24
                       : c.out_type == DType::bf16 ? 0x1p-8
                                                   : 0x1p-11;
  for (std::int64_t i = 0; i < c.M; ++i) {
    for (std::int64_t j = 0; j < c.N; ++j) {
      double sum = 0, size_of_terms = 0;
      for (std::int64_t k = 0; k < c.K; ++k) {
        const double term = double(a.at({i, k})) * double(b.at({k, j}));
        sum += term, size_of_terms += std::abs(term);
      }
      got.push_back(out.at({i, j}));
      const double bound = relative_bound(c.K, exact) * size_of_terms + u_out * std::abs(sum);
      wrong += !(std::abs(double(got.back()) - sum) <= bound);
    }
  }
  if (wrong) test::fail(__FILE__, __LINE__, std::to_string(wrong) + " wrong: " + describe(c, size));
  return got;
}

constexpr Layout kLayouts[] = {Layout::rows, Layout::columns, Layout::odd, Layout::reversed};

void check_layouts(DType t, Precision exact) {
  for (const TileSize size : kSizes) {
    for (const Layout a : kLayouts) {
      for (const Layout b : kLayouts) {
        if (size == TileSize::large && a != b && a == Layout::odd) continue;
        const bool aligned = a == Layout::rows || a == Layout::columns;
        const Case c{aligned ? 40 : 21, 24, 48, a, b, Layout::rows, t, t, t};
        check_product(c, size, exact);
      }
    }
  }
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

TEST(float32_in_every_layout) {
  check_layouts(DType::f32, Precision::highest);
}
TEST(bfloat16_in_every_layout) {
  check_layouts(DType::bf16, Precision::highest);
}
TEST(float16_in_every_layout) {
  check_layouts(DType::f16, Precision::highest);
}
TEST(tf32_in_every_layout) {
  check_layouts(DType::f32, Precision::medium);
}
TEST(split_tf32_in_every_layout) {
  check_layouts(DType::f32, Precision::high);
}

TEST(edges_of_tiles) {
  for (const TileSize size : kSizes) {
    for (const std::int64_t M : {1, 15, 17, 129}) {
      for (const std::int64_t K : {1, 7, 33, 100}) {
        check_product({.M = M, .N = 2 * M - 1, .K = K}, size);
        check_product(
            {.M = M, .N = 2 * M - 1, .K = K, .a_type = DType::bf16, .b_type = DType::bf16}, size);
      }
    }
  }
  check_product({.M = 3, .N = 5, .K = 0}, TileSize::medium);
  check_product({.M = 3, .N = 5, .K = 0, .a_type = DType::f16, .b_type = DType::f16},
                TileSize::flat);
}

TEST(dtypes_that_differ) {
  const DType types[] = {DType::f32, DType::bf16, DType::f16};
  for (const DType a : types) {
    for (const DType b : types) {
      for (const DType out : types) {
        check_product({.M = 20, .N = 36, .K = 40, .a_type = a, .b_type = b, .out_type = out},
                      TileSize::flat);
      }
    }
  }
  for (const Layout out : kLayouts) {
    check_product({.M = 33, .N = 70, .K = 40, .out = out, .out_type = DType::bf16},
                  TileSize::medium);
    check_product(
        {.M = 33, .N = 70, .K = 40, .out = out, .a_type = DType::bf16, .b_type = DType::bf16},
        TileSize::medium);
  }
}

// A long chain, summed as tensor cores do: bounds must hold.
TEST(truncated_sums_are_within_bounds) {
  const Truncated truncated;
  for (const DType t : {DType::bf16, DType::f16}) {
    check_product({.M = 17, .N = 24, .K = 2048, .a_type = t, .b_type = t}, TileSize::flat);
  }
  check_product({.M = 17, .N = 24, .K = 1024}, TileSize::flat, Precision::high);
  check_product({.M = 17, .N = 24, .K = 1024}, TileSize::flat, Precision::medium);
}

TEST(schedules_and_tiles_change_no_bit) {
  struct Kind {
    DType type;
    Precision exact;
  };
  for (const Kind kind :
       {Kind{DType::f32, Precision::highest}, Kind{DType::f32, Precision::high},
        Kind{DType::f32, Precision::medium}, Kind{DType::bf16, Precision::highest}}) {
    const Case c{.M = 70, .N = 72, .K = 304, .a_type = kind.type, .b_type = kind.type};
    const auto first = check_product(c, TileSize::large, kind.exact);
    {
      const Scheduled scheduled(emulator::Order::reversed);
      CHECK(same_bits(first, check_product(c, TileSize::medium, kind.exact)));
    }
    for (const unsigned seed : {1u, 2u}) {
      const Scheduled scheduled(emulator::Order::shuffled, seed);
      CHECK(same_bits(first, check_product(c, TileSize::flat, kind.exact)));
    }
  }
}

// The longest chain of additions has 256 terms: 3000 equal ones would otherwise lose 3 digits.
TEST(long_sums_of_one_sign) {
  const Device<float> a(3000, 0.1f), b(3000, 0.3f), out(1);
  Matmul op;
  op.a = view_of(a.get(), {1, 3000}), op.b = view_of(b.get(), {3000, 1});
  op.out = view_of(out.get(), {1, 1});
  cuda::matmul(op, TileSize::flat);
  const double want = 3000 * double(0.1f) * double(0.3f);
  CHECK(std::abs(double(out[0]) - want) <= (256 + 12) * 0x1p-24 * want);
}

TEST(infinities_and_nan_stay_what_they_are) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr float kMost = std::numeric_limits<float>::max();
  const float starts[] = {kInf, -kInf, NAN, kMost, std::bit_cast<float>(0x7fffffff)};
  for (const Precision exact : {Precision::highest, Precision::high, Precision::medium}) {
    const Exactly exactly(exact);
    for (const float start : starts) {
      const Device<float> a(32, 1.0f), b(32, 1.0f), out(4);
      a[3] = start;
      for (int k = 0; k < 16; ++k) b[std::size_t(2 * k + 1)] = 0.7f;
      Matmul op;
      op.a = view_of(a.get(), {2, 16}), op.b = view_of(b.get(), {16, 2});
      op.out = view_of(out.get(), {2, 2});
      cuda::matmul(op, TileSize::medium);
      const float want = start + 15, other = 0.7f * start;
      CHECK(std::isnan(start) ? std::isnan(out[0]) && std::isnan(out[1])
            : std::isinf(start)
                ? out[0] == want && out[1] == other
                : std::abs(out[0] / want - 1) < 0.001f && std::abs(out[1] / other - 1) < 0.002f);
      CHECK(out[2] == 16.0f && std::abs(out[3] - 11.2f) < 0.01f);
    }
  }
}

TEST(batches_broadcast_and_merge) {
  // a (2, 1, M, K), b (3, K, N), and a batch of weights: (2, 3, M, K) with b (K, N)
  const std::int64_t M = 5, N = 12, K = 16;
  Array a({2, 1, M, K}, DType::f32, Layout::rows, 1), b({3, K, N}, DType::f32, Layout::rows, 2);
  Array out({2, 3, M, N}, DType::f32, Layout::rows, 3);
  Matmul op;
  op.a = a.view(), op.b = b.view(), op.out = out.view();
  cuda::matmul(op);
  const auto check = [&](auto at_a, auto at_b) {
    for (std::int64_t x = 0; x < 2; ++x) {
      for (std::int64_t y = 0; y < 3; ++y) {
        for (std::int64_t i = 0; i < M; ++i) {
          for (std::int64_t j = 0; j < N; ++j) {
            double sum = 0, size = 0;
            for (std::int64_t k = 0; k < K; ++k) {
              const double term = double(at_a(x, y, i, k)) * double(at_b(y, k, j));
              sum += term, size += std::abs(term);
            }
            CHECK(std::abs(double(out.at({x, y, i, j})) - sum) <= 8 * 0x1p-24 * size);
          }
        }
      }
    }
  };
  check([&](auto x, auto, auto i, auto k) { return a.at({x, 0, i, k}); },
        [&](auto y, auto k, auto j) { return b.at({y, k, j}); });

  Array rows({2, 3, M, K}, DType::f32, Layout::rows, 4),
      weights({K, N}, DType::f32, Layout::columns, 5);
  op.a = rows.view(), op.b = weights.view();
  emulator::take_counters();
  cuda::matmul(op, TileSize::medium);
  CHECK(emulator::take_counters().blocks == 1);  // 30 rows of one matrix
  check([&](auto x, auto y, auto i, auto k) { return rows.at({x, y, i, k}); },
        [&](auto, auto k, auto j) { return weights.at({k, j}); });
}

TEST(the_epilogue_in_its_order) {
  const Activation activations[] = {Activation::none,   Activation::relu,      Activation::gelu,
                                    Activation::silu,   Activation::gelu_tanh, Activation::tanh,
                                    Activation::sigmoid};
  const std::int64_t M = 18, N = 20, K = 16;
  for (const DType t : {DType::f32, DType::bf16}) {
    for (const Activation activation : activations) {
      Array a({M, K}, t, Layout::rows, 1), b({K, N}, t, Layout::rows, 2);
      Array bias({N}, t, Layout::rows, 4), out({M, N}, DType::f32, Layout::rows, 3);
      std::vector<double> residual;
      for (std::int64_t i = 0; i < M * N; ++i) residual.push_back(double(out.at({i / N, i % N})));
      Matmul op;
      op.a = a.view(), op.b = b.view(), op.out = op.residual = out.view(), op.bias = bias.view();
      op.alpha = 0.75f, op.activation = activation;
      cuda::matmul(op, TileSize::medium);
      for (std::int64_t i = 0; i < M; ++i) {
        for (std::int64_t j = 0; j < N; ++j) {
          double z = 0, size = std::abs(double(bias.at({j})));
          for (std::int64_t k = 0; k < K; ++k) {
            const double term = 0.75 * double(a.at({i, k})) * double(b.at({k, j}));
            z += term, size += std::abs(term);
          }
          z += double(bias.at({j}));
          const double s = 1 / (1 + std::exp(-z)),
                       u = std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z);
          const double y = activation == Activation::relu   ? std::max(z, 0.0)
                           : activation == Activation::gelu ? 0.5 * z * std::erfc(-z / std::sqrt(2))
                           : activation == Activation::gelu_tanh ? 0.5 * z * (1 + std::tanh(u))
                           : activation == Activation::silu      ? z * s
                           : activation == Activation::tanh      ? std::tanh(z)
                           : activation == Activation::sigmoid   ? s
                                                                 : z;
          const double want = y + residual[std::size_t(i * N + j)];
          const double bound =
              1.2 * 10 * 0x1p-24 * size + 12 * 0x1p-24 * (std::abs(y) + std::abs(want));
          CHECK(std::abs(double(out.at({i, j})) - want) <= bound);
        }
      }
    }
  }
}

// Main paths: no read of shared memory meets a bank twice, and sectors are used.
TEST(wavefronts_and_sectors) {
  const auto check = [](const Case& c, TileSize size, Precision exact) {
    emulator::take_counters();
    check_product(c, size, exact);
    check_traffic(emulator::take_counters(), __FILE__, __LINE__, describe(c, size));
  };
  for (const TileSize size : kSizes) {
    for (const Layout a : {Layout::rows, Layout::columns}) {
      for (const Layout b : {Layout::rows, Layout::columns}) {
        for (const DType t : {DType::bf16, DType::f16}) {
          check({128, 128, 64, a, b, Layout::rows, t, t, t}, size, Precision::highest);
        }
        for (const Precision exact : {Precision::highest, Precision::high, Precision::medium}) {
          check({128, 128, 32, a, b}, size, exact);
        }
      }
    }
  }
}

TEST(tensor_cores_are_busier_than_shared_memory) {
  for (const DType t : {DType::bf16, DType::f16}) {
    const auto counted = [t](std::int64_t K) {
      emulator::take_counters();
      check_product({.M = 128, .N = 128, .K = K, .a_type = t, .b_type = t}, TileSize::large);
      return emulator::take_counters();
    };
    const emulator::Counters shorter = counted(64);
    const double ratio = tensor_cycles_per_shared_cycle(counted(192), shorter);
    std::printf("%s: %.2f\n", tilewright::dtype_name(t), ratio);
    CHECK(ratio >= 1.3);
  }
}

TEST(packed_operands_are_for_the_cpu) {
  Matmul op;
  op.packed = reinterpret_cast<const tilewright::PackedMatrix*>(&op);
  CHECK_THROWS(tilewright::UnsupportedError, "packing is for the CPU", cuda::matmul(op));
}
