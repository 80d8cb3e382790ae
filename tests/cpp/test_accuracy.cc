// How wrong the elementary functions are, in ulp of the exact result, on every level: the claims of
// simd/vec.h and simd/activation.h.
//
// Every 499th float32 is tried; with TILEWRIGHT_ACCURACY_STEP=1 in the environment all 2^32 of them
// (.ci/nightly: some minutes). The reference is the C library in double, whose own error is far
// below a float's.
#include <cmath>
#include <cstdlib>
#include <limits>
#include <mutex>

#include "core/parallel.h"
#include "simd_levels.h"
#include "test.h"

using namespace tilewright;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kChunk = 4096;

struct Claim {
  const char* name;
  double (*exact)(double x);
  void (*got)(const SimdFunctions& s, const float* x, float* y, int64_t n);
  double ulp, ulp_without_fma;
  // What is allowed beside that: of x, absolute.
  double (*also)(double x, bool fused) = nullptr;
};

// The distance between float32 numbers around x.
double ulp_at(double x) {
  return std::abs(x) < 0x1p-126 ? 0x1p-149 : std::ldexp(1.0, std::ilogb(x) - 23);
}

// Error in ulp beyond what is allowed beside them; infinity where the result is of another kind.
double error_of(const Claim& claim, double x, float got, double want, bool fused) {
  if (std::isnan(want) || std::isnan(got))
    return std::isnan(want) == std::isnan(got) ? 0 : kInfinity;
  if (double(got) == want || float(want) == got) return 0;
  if (std::isinf(want)) return kInfinity;
  const double value = std::isinf(got) ? std::copysign(0x1p128, got) : double(got);
  const double error = std::abs(value - want) - (claim.also ? claim.also(x, fused) : 0);
  return error <= 0 ? 0 : error / ulp_at(want);
}

// Whether the level has fused multiply-add.
bool is_fused(const SimdFunctions& s) {
  return std::strcmp(s.isa, "generic") != 0;
}

struct Worst {
  double ulp = 0;
  float x = 0;
};

// The largest errors by level.
std::vector<Worst> worst_of(const Claim& claim, const std::vector<SimdFunctions>& levels,
                            int64_t step) {
  std::vector<Worst> worst(levels.size());
  std::mutex mutex;
  const int64_t total = (int64_t(1) << 32) / step;
  parallel_for((total + kChunk - 1) / kChunk, 1e9, [&](int64_t chunk) {
    float x[kChunk], y[kChunk];
    double want[kChunk];
    const int64_t first = chunk * kChunk, n = std::min(kChunk, total - first);
    for (int64_t i = 0; i < n; ++i) {
      const auto bits = uint32_t((first + i) * step);
      std::memcpy(&x[i], &bits, 4);
      want[i] = claim.exact(x[i]);
    }
    for (size_t level = 0; level < levels.size(); ++level) {
      claim.got(levels[level], x, y, n);
      const bool fused = is_fused(levels[level]);
      Worst here;
      for (int64_t i = 0; i < n; ++i) {
        const double ulp = error_of(claim, x[i], y[i], want[i], fused);
        if (ulp > here.ulp) here = {ulp, x[i]};
      }
      const std::lock_guard lock(mutex);
      if (here.ulp > worst[level].ulp) worst[level] = here;
    }
  });
  return worst;
}

void check(const Claim& claim) {
  const char* step = std::getenv("TILEWRIGHT_ACCURACY_STEP");
  const std::vector<SimdFunctions> levels = test::simd_levels();
  const std::vector<Worst> worst = worst_of(claim, levels, step ? std::atoll(step) : 499);
  for (size_t i = 0; i < levels.size(); ++i) {
    const double allowed = is_fused(levels[i]) ? claim.ulp : claim.ulp_without_fma;
    std::printf("        %-18s %-8s %7.3f ulp, claimed %.1f, at %a\n", claim.name, levels[i].isa,
                worst[i].ulp, allowed, double(worst[i].x));
    CHECK(worst[i].ulp <= allowed);
  }
}

void exponential(const SimdFunctions& s, const float* x, float* y, int64_t n) {
  s.exp(x, y, n);
}
template <Activation F>
void value(const SimdFunctions& s, const float* x, float* y, int64_t n) {
  s.activate(F, x, y, n);
}
template <Activation F>
void slope(const SimdFunctions& s, const float* x, float* y, int64_t n) {
  s.slope(F, x, y, n);
}

// --- definitions ---------------------------------------------------------------------------------

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}
double gelu(double x) {
  return x == -kInfinity ? NAN : 0.5 * x * std::erfc(-x / std::sqrt(2.0));
}
double silu(double x) {
  return x * sigmoid(x);
}
const double kRootTwoByPi = std::sqrt(2 / M_PI);
double twice_u(double x) {
  return 2 * kRootTwoByPi * (x + 0.044715 * x * x * x);
}
double gelu_tanh(double x) {
  return x * sigmoid(twice_u(x));
}
// Subnormal results of exp have an absolute error, half of 2^-149, which is multiplied by x.
double lost_by_underflow(double z, double x) {
  return z < -87 ? std::abs(x) * 0x1p-149 : 0;
}
double also_silu(double x, bool) {
  return lost_by_underflow(x, x);
}
// e^2u takes up the roundings of 2u.
double also_gelu_tanh(double x, bool fused) {
  const double z = twice_u(x), roundings = x < -1 ? (fused ? 3.5 : 4.5) * std::abs(z) : 0;
  return lost_by_underflow(z, x) + roundings * ulp_at(gelu_tanh(x));
}
double tanh_slope(double x) {
  const double e = std::exp(-2 * std::abs(x));
  return 4 * e / ((1 + e) * (1 + e));
}
double sigmoid_slope(double x) {
  const double e = std::exp(-std::abs(x));
  return e / ((1 + e) * (1 + e));
}

}  // namespace

TEST(exp_is_accurate) {
  check({"exp", std::exp, exponential, 0.9, 1.2});
}

TEST(tanh_is_accurate) {
  check({"tanh", std::tanh, value<Activation::tanh>, 1.5, 1.5});
  check({"tanh'", tanh_slope, slope<Activation::tanh>, 5.5, 5.5});
}

TEST(sigmoid_is_accurate) {
  check({"sigmoid", sigmoid, value<Activation::sigmoid>, 3, 3});
  check({"sigmoid'", sigmoid_slope, slope<Activation::sigmoid>, 5.5, 5.5});
}

TEST(gelu_is_accurate) {
  check({"gelu", gelu, value<Activation::gelu>, 6.5, 9});
}

TEST(silu_is_accurate) {
  check({"silu", silu, value<Activation::silu>, 4, 4, also_silu});
}

TEST(gelu_tanh_is_accurate) {
  check({"gelu_tanh", gelu_tanh, value<Activation::gelu_tanh>, 4.5, 5, also_gelu_tanh});
}
