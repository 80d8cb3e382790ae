// Integer products, quantized products and quantization: exact, and the bits of the CPU's kernels,
// whose own tests hold them to NumPy. Device memory here is memory of the CPU as well.
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "matrices.h"
#include "traffic.h"

namespace cuda = tilewright::cuda;
namespace emulator = tilewright::emulator;
using tilewright::Activation, tilewright::Compute, tilewright::DType, tilewright::Int8Matmul;
using tilewright::Dequantize, tilewright::Quantize, tilewright::QuantizedMatmul, tilewright::View;

namespace {

constexpr Layout kLayouts[] = {Layout::rows, Layout::columns, Layout::odd, Layout::reversed};

template <class Op>
std::vector<char> bytes_after(const Op& run, const Array& out) {
  run();
  std::vector<char> bytes;
  const View& v = out.view();
  for (std::int64_t i = 0; i < v.size(); ++i) {
    std::int64_t at = 0, rest = i;
    for (int d = v.rank - 1; d >= 0; --d) at += rest % v.shape[d] * v.stride[d], rest /= v.shape[d];
    const auto size = tilewright::dtype_size(v.dtype);
    const char* const from = static_cast<char*>(v.data) + at * size;
    bytes.insert(bytes.end(), from, from + size);
  }
  return bytes;
}

void check_integers(std::int64_t M, std::int64_t N, std::int64_t K, DType type, Layout a_layout,
                    Layout b_layout, Layout out_layout = Layout::rows) {
  const Array a({M, K}, type, a_layout, 1), b({K, N}, DType::s8, b_layout, 2);
  const Array out({M, N}, DType::s32, out_layout, 3);
  Int8Matmul op;
  op.a = a.view(), op.b = b.view(), op.out = out.view();
  cuda::int8_matmul(op);
  out.check_margins(__FILE__, __LINE__);
  for (std::int64_t i = 0; i < M; ++i) {
    for (std::int64_t j = 0; j < N; ++j) {
      std::int32_t sum = 0;
      for (std::int64_t k = 0; k < K; ++k) sum += a.integer({i, k}) * b.integer({k, j});
      CHECK(out.integer({i, j}) == sum);
    }
  }
}

struct Case {
  std::int64_t M, N, K;
  int bits = 8;
  bool is_signed = true;
  std::int64_t group = 0;
  bool offset_b = false, offset_a = false, per_row_a = false;
  DType a_type = DType::f32;  // s8 and u8: a comes quantized
  Layout b_layout = Layout::rows;
  Compute compute = Compute::integers;
  bool epilogue = false;
};

// The kernel's bits are those of the CPU's kernel.
void check_quantized(const Case& c) {
  const bool given = !tilewright::is_float(c.a_type);
  const DType bytes = c.is_signed ? DType::s8 : DType::u8;
  const DType out_type = given ? DType::f32 : c.a_type;
  const std::int64_t lines = c.bits == 4 ? (c.K + 1) / 2 : c.K;
  const std::int64_t groups = c.group ? (c.K + c.group - 1) / c.group : 1;
  const Array a({2, c.M, c.K}, c.a_type, Layout::rows, 1), data({lines, c.N}, bytes, c.b_layout, 2);
  const Array scale(c.group ? std::vector{groups, c.N} : std::vector{c.N}, DType::f32, Layout::rows,
                    3);
  const Array offset(c.group ? std::vector{groups, c.N} : std::vector{c.N}, DType::f32,
                     Layout::rows, 4);
  const Array scale_a(c.per_row_a ? std::vector{c.M} : std::vector<std::int64_t>{}, DType::f32,
                      Layout::rows, 5);
  const Array offset_a(c.per_row_a ? std::vector{c.M} : std::vector<std::int64_t>{}, DType::f32,
                       Layout::rows, 6);
  const Array bias({c.N}, DType::f32, Layout::rows, 7);
  const Array residual({2, c.M, c.N}, DType::bf16, Layout::rows, 8);
  const Array out({2, c.M, c.N}, out_type, Layout::rows, 9);
  QuantizedMatmul op;
  op.a = a.view(), op.out = out.view();
  op.b = {data.view(), scale.view(), c.offset_b ? offset.view() : View{}, c.bits, c.K, c.group};
  if (given) op.scale_a = scale_a.view();
  if (c.offset_a) op.offset_a = offset_a.view();
  op.compute = c.compute;
  if (c.epilogue) op.bias = bias.view(), op.residual = residual.view();
  if (c.epilogue) op.activation = Activation::relu;
  const auto got = bytes_after([&] { cuda::quantized_matmul(op); }, out);
  out.check_margins(__FILE__, __LINE__);
  const auto want = bytes_after([&] { tilewright::run(op); }, out);
  if (got == want) return;
  test::fail(__FILE__, __LINE__,
             "other bits: " + std::to_string(c.M) + "," + std::to_string(c.N) + "," +
                 std::to_string(c.K) + " bits " + std::to_string(c.bits) + " group " +
                 std::to_string(c.group) + " signed " + std::to_string(c.is_signed));
}

}  // namespace

TEST(integers_are_exact) {
  for (const DType type : {DType::s8, DType::u8}) {
    for (const Layout a : kLayouts) {
      for (const Layout b : kLayouts) {
        check_integers(21, 24, 80, type, a, b);
        check_integers(3, 40, 77, type, a, b);
      }
    }
    for (const Layout out : kLayouts) {
      check_integers(130, 135, 33, type, Layout::rows, Layout::columns, out);
    }
  }
  check_integers(5, 6, 0, DType::s8, Layout::rows, Layout::rows);
}

TEST(quantized_products_have_the_cpus_bits) {
  for (const std::int64_t M : {3, 20}) {
    for (const DType a : {DType::f32, DType::bf16, DType::s8, DType::u8}) {
      check_quantized({.M = M, .N = 36, .K = 100, .per_row_a = true, .a_type = a});
      check_quantized(
          {.M = M, .N = 36, .K = 96, .a_type = a, .b_layout = Layout::columns, .epilogue = true});
    }
    for (const int bits : {8, 4}) {
      for (const bool is_signed : {true, false}) {
        for (const std::int64_t group : {0, 6, 32, 80}) {
          for (const bool offset : {false, true}) {
            check_quantized({.M = M,
                             .N = 20,
                             .K = 101,
                             .bits = bits,
                             .is_signed = is_signed,
                             .group = group,
                             .offset_b = offset,
                             .epilogue = offset});
          }
        }
      }
    }
  }
  for (const bool rows : {false, true}) {
    check_quantized({.M = 18,
                     .N = 20,
                     .K = 64,
                     .group = 16,
                     .offset_b = true,
                     .offset_a = true,
                     .per_row_a = rows,
                     .a_type = DType::u8,
                     .epilogue = true});
    check_quantized({.M = 18,
                     .N = 20,
                     .K = 64,
                     .bits = 4,
                     .offset_a = true,
                     .per_row_a = rows,
                     .a_type = DType::s8});
  }
  check_quantized({.M = 5, .N = 20, .K = 0, .epilogue = true});
}

// By floats the bits are those of a product with the floats that b stands for.
TEST(floats_are_those_of_dequantize) {
  for (const int bits : {8, 4}) {
    for (const std::int64_t group : {0, 16, 7}) {
      for (const Layout layout : {Layout::rows, Layout::columns}) {
        const std::int64_t M = 5, N = 24, K = 300, lines = bits == 4 ? K / 2 : K;
        const std::int64_t groups = group ? (K + group - 1) / group : 1;
        const Array a({M, K}, DType::bf16, Layout::rows, 1);
        const Array data({lines, N}, DType::u8, layout, 2);
        const Array scale({groups, N}, DType::f32, Layout::rows, 3);
        const Array offset({groups, N}, DType::f32, Layout::rows, 4);
        const Array floats({K, N}, DType::f32, Layout::rows, 5);
        const Array out({M, N}, DType::f32, Layout::rows, 6);
        for (std::int64_t k = 0; k < K; ++k) {
          for (std::int64_t j = 0; j < N; ++j) {
            const int byte = data.integer({bits == 4 ? k / 2 : k, j});
            const int q = bits == 8 ? byte : k % 2 ? byte >> 4 : byte & 15;
            const std::int64_t g = group ? k / group : 0;
            floats.view().ptr<float>()[k * N + j] =
                std::fma(scale.at({g, j}), float(q), offset.at({g, j}));
          }
        }
        QuantizedMatmul op;
        op.a = a.view(), op.out = out.view(), op.compute = Compute::floats;
        op.b = {data.view(), scale.view(), offset.view(), bits, K, group ? group : K};
        const auto got = bytes_after([&] { cuda::quantized_matmul(op); }, out);
        tilewright::Matmul plain;
        plain.a = a.view(), plain.b = floats.view(), plain.out = out.view();
        CHECK(got == bytes_after([&] { cuda::matmul(plain); }, out));
      }
    }
  }
}

TEST(quantize_and_back_have_the_cpus_bits) {
  struct Shape {
    std::vector<std::int64_t> x;
    int axis, along;
    std::int64_t group;
  };
  const Shape shapes[] = {{{37}, -1, -1, 0},      {{9, 70}, 0, -1, 0},     {{9, 70}, 1, -1, 0},
                          {{3, 5, 40}, 1, -1, 0}, {{9, 70}, 0, 1, 16},     {{70, 9}, 1, 0, 32},
                          {{50}, -1, 0, 8},       {{100, 150}, -1, -1, 0}, {{4, 0}, 0, -1, 0}};
  for (const Shape& s : shapes) {
    for (const Layout layout : kLayouts) {
      for (const bool symmetric : {true, false}) {
        std::vector<std::int64_t> of_scale;
        if (s.group) {
          of_scale = s.x;
          auto& along = of_scale[std::size_t(s.along)];
          along = (along + s.group - 1) / s.group;
        } else if (s.axis >= 0) {
          of_scale = {s.x[std::size_t(s.axis)]};
        }
        const Array x(s.x, DType::bf16, layout, 1), y(s.x, DType::f16, Layout::rows, 2);
        const Array data(s.x, symmetric ? DType::s8 : DType::u8, Layout::rows, 3);
        const Array scale(of_scale, DType::f32, Layout::rows, 4);
        const Array offset(of_scale, DType::f32, Layout::rows, 5);
        Quantize op;
        op.x = x.view(), op.data = data.view(), op.scale = scale.view();
        op.axis = s.axis, op.along = s.along, op.group = s.group;
        if (!symmetric) op.offset = offset.view();
        Dequantize back;
        back.data = data.view(), back.scale = scale.view(), back.offset = op.offset;
        back.axis = s.axis, back.along = s.along, back.group = s.group, back.out = y.view();
        const auto all = [&](auto quantize, auto dequantize) {
          std::vector<std::vector<char>> found;
          found.push_back(bytes_after([&] { quantize(op); }, data));
          found.push_back(bytes_after([] {}, scale));
          found.push_back(bytes_after([] {}, offset));
          found.push_back(bytes_after([&] { dequantize(back); }, y));
          return found;
        };
        const auto got = all(cuda::quantize, cuda::dequantize);
        const auto want = all([](const Quantize& q) { tilewright::run(q); },
                              [](const Dequantize& q) { tilewright::run(q); });
        if (got != want) {
          test::fail(__FILE__, __LINE__,
                     "other bits: axis " + std::to_string(s.axis) + " group " +
                         std::to_string(s.group) + " layout " + std::to_string(int(layout)));
        }
      }
    }
  }
}

TEST(wavefronts_of_integer_tiles) {
  emulator::take_counters();
  check_integers(128, 128, 128, DType::s8, Layout::rows, Layout::columns);
  check_integers(16, 128, 128, DType::u8, Layout::rows, Layout::columns);
  const emulator::Counters counters = emulator::take_counters();
  CHECK(counters.ldmatrix > 0);
  check_traffic(counters, __FILE__, __LINE__, "8 bits");
}

TEST(tensor_cores_are_busier_than_shared_memory) {
  const auto counted = [](std::int64_t K) {
    emulator::take_counters();
    check_integers(128, 128, K, DType::s8, Layout::rows, Layout::columns);
    return emulator::take_counters();
  };
  const emulator::Counters shorter = counted(128);
  const double ratio = tensor_cycles_per_shared_cycle(counted(384), shorter);
  std::printf("8 bits: %.2f\n", ratio);
  CHECK(ratio >= 1.3);
}

TEST(schedules_change_no_bit) {
  for (const unsigned seed : {1u, 2u}) {
    const Scheduled scheduled(emulator::Order::shuffled, seed);
    check_quantized({.M = 20, .N = 36, .K = 200, .group = 32, .offset_b = true});
  }
  const Scheduled scheduled(emulator::Order::reversed);
  check_integers(21, 24, 300, DType::s8, Layout::rows, Layout::columns);
}
