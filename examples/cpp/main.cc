// tilewright from C++: a product with bias and GELU, layernorm, causal attention, an int8 product,
// packed weights (float32 and 4 bits), decoding over a KVCache, and options of a scope; each checked
// against a plain loop in double precision.
#include <tilewright/tilewright.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

namespace tw = tilewright;
using Floats = std::vector<float>;
using Bytes = std::vector<int8_t>;

namespace {

std::mt19937 g_random{1};
int g_failures = 0;

Floats normal(int64_t n) {
  std::normal_distribution<float> draw;
  Floats x(static_cast<size_t>(n));
  for (float& v : x) v = draw(g_random);
  return x;
}

Bytes bytes(int64_t n) {
  std::uniform_int_distribution<int> draw(-128, 127);
  Bytes x(static_cast<size_t>(n));
  for (int8_t& v : x) v = static_cast<int8_t>(draw(g_random));
  return x;
}

void report(const char* what, double error, double bound) {
  const bool right = error <= bound;  // false for NaN
  std::printf("%-10s largest error %.1e, allowed %.0e: %s\n", what, error, bound,
              right ? "right" : "WRONG");
  g_failures += !right;
}

// The larger error; NaN stays.
double worse(double error, double got, double want) {
  const double e = std::abs(got - want);
  return e <= error ? error : e;
}

// y = gelu(x w + bias)
void linear() {
  const int64_t M = 33, K = 70, N = 41;
  const Floats x = normal(M * K), w = normal(K * N), bias = normal(N);
  Floats y(M * N);
  tw::Matmul op;
  op.a = tw::view_of(x.data(), {M, K});
  op.b = tw::view_of(w.data(), {K, N});
  op.bias = tw::view_of(bias.data(), {N});
  op.out = tw::view_of(y.data(), {M, N});
  op.activation = tw::Activation::gelu;
  tw::run(op);
  double error = 0;
  for (int64_t i = 0; i < M; ++i) {
    for (int64_t j = 0; j < N; ++j) {
      double z = bias[j];
      for (int64_t k = 0; k < K; ++k) z += double(x[i * K + k]) * w[k * N + j];
      error = worse(error, y[i * N + j], z * 0.5 * std::erfc(-z / std::sqrt(2.0)));
    }
  }
  report("matmul", error, 1e-4);
}

void layernorm() {
  const int64_t rows = 5, C = 100;
  const Floats x = normal(rows * C), gamma = normal(C), beta = normal(C);
  Floats y(rows * C);
  tw::LayernormForward op;
  op.x = tw::view_of(x.data(), {rows, C});
  op.gamma = tw::view_of(gamma.data(), {C});
  op.beta = tw::view_of(beta.data(), {C});
  op.y = tw::view_of(y.data(), {rows, C});
  op.eps = 1e-5f;
  tw::run(op);
  double error = 0;
  for (int64_t i = 0; i < rows; ++i) {
    double mean = 0, variance = 0;
    for (int64_t c = 0; c < C; ++c) mean += x[i * C + c] / double(C);
    for (int64_t c = 0; c < C; ++c) variance += std::pow(x[i * C + c] - mean, 2) / double(C);
    for (int64_t c = 0; c < C; ++c) {
      const double normalised = (x[i * C + c] - mean) / std::sqrt(variance + 1e-5);
      error = worse(error, y[i * C + c], normalised * gamma[c] + beta[c]);
    }
  }
  report("layernorm", error, 1e-5);
}

// One head of 9 queries, the last of 12 tokens: query i sees keys <= i + 3.
void attention() {
  const int64_t Tq = 9, Tk = 12, D = 16;
  const Floats q = normal(Tq * D), k = normal(Tk * D), v = normal(Tk * D);
  Floats out(Tq * D);
  tw::Attention op;
  op.q = tw::view_of(q.data(), {1, 1, Tq, D});
  op.k = tw::view_of(k.data(), {1, 1, Tk, D});
  op.v = tw::view_of(v.data(), {1, 1, Tk, D});
  op.out = tw::view_of(out.data(), {1, 1, Tq, D});
  op.scores.causal = true;
  op.scores.scale = 1 / std::sqrt(float(D));
  tw::run(op);
  double error = 0;
  for (int64_t i = 0; i < Tq; ++i) {
    std::vector<double> want(D);
    double sum = 0;
    for (int64_t j = 0; j <= i + Tk - Tq; ++j) {
      double score = 0;
      for (int64_t d = 0; d < D; ++d) score += double(q[i * D + d]) * k[j * D + d];
      const double weight = std::exp(score * op.scores.scale);
      sum += weight;
      for (int64_t d = 0; d < D; ++d) want[d] += weight * v[j * D + d];
    }
    for (int64_t d = 0; d < D; ++d) error = worse(error, out[i * D + d], want[d] / sum);
  }
  report("attention", error, 1e-5);
}

// b is (N, K) in memory, as weights often are: a view with its strides exchanged is (K, N).
void int8_product() {
  const int64_t M = 5, K = 70, N = 9;
  const Bytes a = bytes(M * K), b = bytes(N * K);
  std::vector<int32_t> out(M * N);
  tw::Int8Matmul op;
  op.a = tw::view_of(a.data(), {M, K});
  op.b = tw::view_of(b.data(), {K, N});
  op.b.stride[0] = 1, op.b.stride[1] = K;
  op.out = tw::view_of(out.data(), {M, N});
  tw::run(op);
  double error = 0;
  for (int64_t i = 0; i < M; ++i) {
    for (int64_t j = 0; j < N; ++j) {
      int32_t want = 0;
      for (int64_t k = 0; k < K; ++k) want += a[i * K + k] * b[j * K + k];
      error = worse(error, out[i * N + j], want);
    }
  }
  report("int8", error, 0);
}

// y = x w, the weights packed once: as they are, and in 4 bits with a scale for every 16 rows.
void packed_weights() {
  const int64_t M = 3, K = 70, N = 41, group = 16, groups = (K + group - 1) / group;
  const Floats x = normal(M * K), w = normal(K * N);
  Floats y(M * N);
  const tw::Packed weights = tw::pack(tw::view_of(w.data(), {K, N}));
  tw::Matmul op;
  op.a = tw::view_of(x.data(), {M, K});
  op.packed = weights.get();
  op.out = tw::view_of(y.data(), {M, N});
  tw::run(op);
  const auto error_of = [&](const Floats& right) {
    double error = 0;
    for (int64_t i = 0; i < M; ++i) {
      for (int64_t j = 0; j < N; ++j) {
        double want = 0;
        for (int64_t k = 0; k < K; ++k) want += double(x[i * K + k]) * right[k * N + j];
        error = worse(error, y[i * N + j], want);
      }
    }
    return error;
  };
  report("packed", error_of(w), 1e-4);

  Bytes nibbles((K + 1) / 2 * N);  // two weights a byte along K, the first one in the lower half
  Floats scale(groups * N);
  tw::Quantize quantize;
  quantize.x = tw::view_of(w.data(), {K, N});
  quantize.axis = 1, quantize.along = 0, quantize.group = group, quantize.bits = 4;
  quantize.data = tw::view_of(nibbles.data(), {(K + 1) / 2, N});
  quantize.scale = tw::view_of(scale.data(), {groups, N});
  tw::run(quantize);
  tw::QuantizedView view;
  view.data = quantize.data;
  view.scale = quantize.scale;
  view.bits = 4, view.K = K, view.group = group;
  const tw::Packed small = tw::pack(view);
  Floats stands_for(K * N);
  tw::unpack(*small, tw::view_of(stands_for.data(), {K, N}));
  double error = 0;
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t j = 0; j < N; ++j) {
      const int pair = nibbles[k / 2 * N + j];
      const int q = k % 2 ? pair >> 4 : static_cast<int8_t>(pair << 4) >> 4;
      error = worse(error, stands_for[k * N + j], double(q) * scale[k / group * N + j]);
    }
  }
  report("unpack", error, 1e-6);
  tw::QuantizedMatmul product;
  product.a = op.a, product.out = op.out;
  product.packed = small.get();
  product.compute = tw::Compute::floats;
  tw::run(product);
  report("4 bits", error_of(stands_for), 1e-4);
}

// A prompt of 5 tokens, then one at a time: what the last token sees is what it would see in one
// call. A fork goes on from the prompt without copying it.
void decoding() {
  const int64_t T = 9, prompt = 5, heads = 2, D = 16;
  const Floats q = normal(heads * D), k = normal(heads * T * D), v = normal(heads * T * D);
  const auto tokens = [&](const Floats& x, int64_t first, int64_t count) {
    tw::View part = tw::view_of(x.data() + first * D, {1, heads, count, D});
    part.stride[1] = T * D;  // x is (heads, T, D)
    return part;
  };
  tw::KVShape shape{.layers = 1, .batch = 1, .heads = heads, .head_dim = D, .max_tokens = T};
  shape.dtype = tw::DType::f32;
  tw::KVCache cache(shape);
  cache.append(0, tokens(k, 0, prompt), tokens(v, 0, prompt));
  tw::KVCache other = cache.fork({0});
  for (int64_t t = prompt; t < T; ++t) other.append(0, tokens(k, t, 1), tokens(v, t, 1));
  Floats out(heads * D);
  const tw::KVSnapshot keys = other.snapshot(0);
  tw::Attention op;
  op.q = tw::view_of(q.data(), {1, heads, 1, D});
  op.cache = &keys;
  op.out = tw::view_of(out.data(), {1, heads, 1, D});
  op.scores.scale = 1 / std::sqrt(float(D));
  tw::run(op);
  double error = cache.length(0, 0) == prompt && other.length(0, 0) == T ? 0 : 1;
  for (int64_t h = 0; h < heads; ++h) {
    std::vector<double> want(D);
    double sum = 0;
    for (int64_t j = h * T; j < (h + 1) * T; ++j) {
      double score = 0;
      for (int64_t d = 0; d < D; ++d) score += double(q[h * D + d]) * k[j * D + d];
      const double weight = std::exp(score * op.scores.scale);
      sum += weight;
      for (int64_t d = 0; d < D; ++d) want[d] += weight * v[j * D + d];
    }
    for (int64_t d = 0; d < D; ++d) error = worse(error, out[h * D + d], want[d] / sum);
  }
  report("decoding", error, 1e-5);
}

// On one thread and at the lowest ISA level, for this scope; the recording says what ran.
void options() {
  const int64_t M = 64, K = 300, N = 200;
  const Floats a = normal(M * K), b = normal(K * N);
  Floats y(M * N);
  tw::Matmul op;
  op.a = tw::view_of(a.data(), {M, K});
  op.b = tw::view_of(b.data(), {K, N});
  op.out = tw::view_of(y.data(), {M, N});
  tw::Recording recording;
  {
    const tw::OptionScope scope({.threads = 1, .isa = "generic", .precision = tw::Precision::high});
    tw::run(op);
    g_failures += tw::precision() != tw::Precision::high;
  }
  g_failures += tw::precision() != tw::Precision::highest;
  const tw::CallRecord& call = recording.calls.front();
  std::printf("%-10s %s: %s at %s, %d thread\n", "recorded", call.op.c_str(), call.kernel.c_str(),
              call.isa.c_str(), call.threads);
  g_failures += call.isa != "generic" || call.threads != 1;
  double error = 0;
  for (int64_t i = 0; i < M * N; ++i) {
    double want = 0;
    for (int64_t k = 0; k < K; ++k) want += double(a[i / N * K + k]) * b[k * N + i % N];
    error = worse(error, y[i], want);
  }
  report("options", error, 1e-3);
}

// Wrong arguments throw, and say what is wrong.
void errors() {
  Floats x(6), y(6);
  tw::SoftmaxForward op;
  op.x = tw::view_of(x.data(), {2, 3});
  op.y = tw::view_of(y.data(), {3, 2});
  try {
    tw::run(op);
    ++g_failures;
  } catch (const tw::ShapeError& e) {
    std::printf("%-10s %s\n", "ShapeError", e.what());
  }
}

}  // namespace

int main() {
  for (const tw::IsaLevel& level : tw::isa_levels()) {
    if (level.active) std::printf("level %s, %d threads\n", level.name, tw::num_threads());
  }
  linear();
  layernorm();
  attention();
  int8_product();
  packed_weights();
  decoding();
  options();
  errors();
  return g_failures;
}
