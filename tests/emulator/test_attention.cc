// The attention kernels against a reference in double from the formula, under every schedule and with
// the accumulation of tensor cores; what their counters promise; and that rows stand alone.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "core/dtype.h"
#include "cuda/kernels.h"
#include "device.h"
#include "traffic.h"

using namespace tilewright;
using emulator::Order;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
std::mt19937 g_random;

double unit_roundoff(DType t) {
  return t == DType::f32 ? 0x1p-24 : t == DType::f16 ? 0x1p-11 : 0x1p-8;
}

// An array on the device: (B, H, T, D) or (B, H, T), its rows `gap` elements apart from each other.
struct Tensor {
  std::vector<int64_t> shape;
  DType dtype;
  int64_t gap;
  ::Device<char> memory;

  Tensor(std::vector<int64_t> s, DType t, int64_t row_gap = 0)
      : shape(std::move(s)), dtype(t), gap(row_gap), memory(size_t(rows() * pitch() * 8 + 16)) {}
  int64_t last() const { return shape.back(); }
  int64_t pitch() const { return last() + gap; }
  int64_t rows() const {
    int64_t n = 1;
    for (size_t d = 0; d + 1 < shape.size(); ++d) n *= shape[d];
    return n;
  }
  View view() const {
    View v;
    v.data = memory.get(), v.dtype = dtype, v.present = v.writable = true;
    v.rank = int(shape.size());
    int64_t stride = pitch();
    for (int d = v.rank - 1; d >= 0; --d) {
      v.shape[d] = shape[size_t(d)];
      v.stride[d] = d == v.rank - 1 ? 1 : stride;
      if (d < v.rank - 1) stride *= v.shape[d];
    }
    return v;
  }
  double get(int64_t row, int64_t i) const {
    const int64_t at = row * pitch() + i;
    if (dtype == DType::boolean) return memory.get()[at];
    return load_float(memory.get(), at, dtype);
  }
  void set(int64_t row, int64_t i, double x) {
    if (dtype == DType::boolean) {
      memory.get()[row * pitch() + i] = char(x);
    } else {
      store_float(memory.get(), row * pitch() + i, dtype, float(x));
    }
  }
  void fill_normal() {
    std::normal_distribution<float> normal;
    for (int64_t r = 0; r < rows(); ++r) {
      for (int64_t i = 0; i < last(); ++i) set(r, i, normal(g_random));
    }
  }
};

struct Options {
  DType dtype = DType::f32;
  int64_t B = 1, H = 1, Hkv = 1, Tq = 1, Tk = 1, D = 8, Dv = 0;  // Dv 0: D
  AttentionScores scores;
  enum Mask { none, boolean, additive } mask = none;
  bool lengths = false, alibi = false;
  int64_t gap = 0;
};

struct Inputs {
  Options o;
  Tensor q, k, v, mask, slopes;
  ::Device<int64_t> lengths;

  explicit Inputs(Options x)
      : o((x.Dv = x.Dv ? x.Dv : x.D, x.scores.scale = float(1 / std::sqrt(double(x.D))), x)),
        q({o.B, o.H, o.Tq, o.D}, o.dtype, o.gap),
        k({o.B, o.Hkv, o.Tk, o.D}, o.dtype, o.gap),
        v({o.B, o.Hkv, o.Tk, o.Dv}, o.dtype, o.gap),
        mask({o.B, o.H, o.Tq, o.Tk}, o.mask == Options::boolean ? DType::boolean : DType::f32),
        slopes({o.B, o.H}, DType::f32),
        lengths(size_t(o.B)) {
    q.fill_normal(), k.fill_normal(), v.fill_normal();
    std::uniform_real_distribution<float> uniform;
    for (int64_t r = 0; r < mask.rows(); ++r) {
      for (int64_t i = 0; i < o.Tk; ++i) {
        const bool hidden = uniform(g_random) < 0.3f;
        const double bias = hidden ? -kInf : uniform(g_random);
        mask.set(r, i, o.mask == Options::boolean ? !hidden : bias);
      }
    }
    for (int64_t b = 0; b < o.B; ++b) {
      for (int64_t h = 0; h < o.H; ++h) slopes.set(b, h, uniform(g_random));
      lengths[size_t(b)] = int64_t(uniform(g_random) * float(o.Tk + 1));
    }
  }

  Attention op() const {
    Attention a;
    a.q = q.view(), a.k = k.view(), a.v = v.view();
    if (o.mask) a.mask = mask.view();
    a.scores = o.scores;
    if (o.alibi) a.scores.alibi_slopes = slopes.view();
    if (o.lengths) {
      a.kv_lengths.data = lengths.get(), a.kv_lengths.dtype = DType::s64;
      a.kv_lengths.present = true, a.kv_lengths.rank = 1;
      a.kv_lengths.shape[0] = o.B, a.kv_lengths.stride[0] = 1;
    }
    return a;
  }
};

// Philox4x32-10, from the paper.
uint32_t word(uint64_t seed, uint64_t element) {
  uint32_t c[4] = {uint32_t(element / 4), uint32_t(element / 4 >> 32), 0, 0};
  uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  for (int i = 0; i < 10; ++i) {
    const uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
    const uint32_t next[4] = {uint32_t(b >> 32) ^ c[1] ^ key[0], uint32_t(b),
                              uint32_t(a >> 32) ^ c[3] ^ key[1], uint32_t(a)};
    std::memcpy(c, next, sizeof c);
    key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
  }
  return c[element % 4];
}

// A row in double: weights P, those that dropout keeps, and how far float32 may move each of them.
struct Row {
  std::vector<double> P, kept, slope, spread;  // slope: of the softcap
  double lse = -kInf, lse_spread = 0;

  Row(const Inputs& x, int64_t b, int64_t h, int64_t i)
      : P(size_t(x.o.Tk)), kept(P), slope(P.size(), 1.0), spread(P) {
    const Options& o = x.o;
    const AttentionScores& s = o.scores;
    const int64_t length = o.lengths ? x.lengths[size_t(b)] : o.Tk, own = i + length - o.Tq;
    const int64_t row = (b * o.H + h) * o.Tq + i, unit = b * o.Hkv + h / (o.H / o.Hkv);
    std::vector<double> t(P.size(), -kInf), size(P.size());
    double top = -kInf, total = 0;
    for (int64_t j = 0; j < length; ++j) {
      if (s.left >= 0 && own - j > s.left) continue;
      if ((s.causal && j > own) || (s.right >= 0 && j - own > s.right)) continue;
      double dot = 0, absolute = 0;
      for (int64_t d = 0; d < o.D; ++d) {
        const double term = x.q.get(row, d) * x.k.get(unit * o.Tk + j, d);
        dot += term, absolute += std::abs(term);
      }
      double score = s.scale * dot, e = s.scale * absolute;
      const auto n = size_t(j);
      if (s.softcap > 0) {
        const double th = std::tanh(score / s.softcap);
        score = s.softcap * th, slope[n] = 1 - th * th, e = e * slope[n] + 2 * std::abs(score);
      }
      if (o.alibi) {
        const double bias = x.slopes.get(b, h) * double(std::abs(own - j));
        score -= bias, e += bias;
      }
      if (o.mask == Options::boolean && x.mask.get(row, j) == 0) continue;
      if (o.mask == Options::additive) score += x.mask.get(row, j), e += 1;
      t[n] = score, size[n] = e;
      top = std::max(top, score);
    }
    for (size_t j = 0; j < P.size(); ++j) {
      P[j] = t[j] == -kInf ? 0 : std::exp(t[j] - top);
      total += P[j];
    }
    for (size_t j = 0; j < P.size(); ++j) {
      P[j] = total == 0 ? 0 : P[j] / total;
      spread[j] = P[j] == 0 ? 0 : P[j] * (1 + size[j] + std::abs(top));
      kept[j] = P[j];
      lse_spread += spread[j];
      if (s.dropout_p > 0) {
        const auto threshold = uint32_t(std::nearbyint(s.dropout_p * 0x1p32));
        const uint64_t element = uint64_t(row) * uint64_t(o.Tk) + j;
        kept[j] *= word(s.seed, element) >= threshold ? 1 / (1 - s.dropout_p) : 0;
      }
    }
    if (total > 0) lse = top + std::log(total);
    lse_spread += std::abs(top == -kInf ? 0 : top);
  }
};

struct Result {
  Tensor out, lse;
  explicit Result(const Inputs& x, DType dtype)
      : out({x.o.B, x.o.H, x.o.Tq, x.o.Dv}, dtype, x.o.gap),
        lse({x.o.B, x.o.H, x.o.Tq}, DType::f32) {}
};

void forward(const Inputs& x, Result& r) {
  Attention op = x.op();
  op.out = r.out.view(), op.lse = r.lse.view();
  cuda::attention_forward(op);
}

double g_worst = 0;
void check_near(double got, double want, double bound, const char* what) {
  if (std::isnan(want) ? std::isnan(got) : got == want) return;
  const double ratio = std::abs(got - want) / bound;
  g_worst = std::max(g_worst, ratio);
  if (ratio <= 1) return;
  test::fail(__FILE__, __LINE__,
             std::string(what) + ": got " + std::to_string(got) + ", want " + std::to_string(want) +
                 ", " + std::to_string(ratio) + " times the bound");
}

void check_forward(const Inputs& x, const Result& r) {
  const Options& o = x.o;
  const double n = 2 * std::sqrt(double(o.D + o.Tk)) * 0x1p-24, u = unit_roundoff(r.out.dtype);
  for (int64_t b = 0; b < o.B; ++b) {
    for (int64_t h = 0; h < o.H; ++h) {
      for (int64_t i = 0; i < o.Tq; ++i) {
        const Row row(x, b, h, i);
        const int64_t at = (b * o.H + h) * o.Tq + i, unit = b * o.Hkv + h / (o.H / o.Hkv);
        check_near(r.lse.get(at / o.Tq, i), row.lse,
                   n * row.lse_spread + 0x1p-24 * std::abs(row.lse), "lse");
        double whole = 0;
        for (double e : row.spread) whole += e;
        for (int64_t d = 0; d < o.Dv; ++d) {
          double want = 0, magnitude = 0;
          for (int64_t j = 0; j < o.Tk; ++j) {
            const double v = x.v.get(unit * o.Tk + j, d), kept = row.kept[size_t(j)];
            if (kept == 0) continue;
            want += kept * v;
            magnitude += (row.spread[size_t(j)] / row.P[size_t(j)] + whole) * std::abs(kept * v);
          }
          check_near(r.out.get(at, d), want, n * magnitude + u * std::abs(want) + 0x1p-120, "out");
        }
      }
    }
  }
}

struct Grads {
  Tensor dout, dlse, dq, dk, dv;
  explicit Grads(const Inputs& x)
      : dout({x.o.B, x.o.H, x.o.Tq, x.o.Dv}, x.o.dtype, x.o.gap),
        dlse({x.o.B, x.o.H, x.o.Tq}, DType::f32),
        dq({x.o.B, x.o.H, x.o.Tq, x.o.D}, x.o.dtype, x.o.gap),
        dk({x.o.B, x.o.Hkv, x.o.Tk, x.o.D}, x.o.dtype, x.o.gap),
        dv({x.o.B, x.o.Hkv, x.o.Tk, x.o.Dv}, x.o.dtype, x.o.gap) {
    dout.fill_normal(), dlse.fill_normal();
  }
};

void backward(const Inputs& x, const Result& r, Grads& g) {
  AttentionBackward op;
  op.forward = x.op();
  op.forward.out = r.out.view(), op.forward.lse = r.lse.view();
  op.dout = g.dout.view(), op.dlse = g.dlse.view();
  op.dq = g.dq.view(), op.dk = g.dk.view(), op.dv = g.dv.view();
  cuda::attention_backward(op);
}

// A gradient in double, and what its terms sum up to by their absolute values.
struct Sums {
  std::vector<double> value, size;
  explicit Sums(const Tensor& t) : value(size_t(t.rows() * t.last())), size(value) {}
  void add(int64_t i, double term, double absolute) {
    value[size_t(i)] += term, size[size_t(i)] += absolute;
  }
  void check(const Tensor& got, double n, const char* what) const {
    const double u = unit_roundoff(got.dtype), most = *std::max_element(size.begin(), size.end());
    for (int64_t r = 0; r < got.rows(); ++r) {
      for (int64_t d = 0; d < got.last(); ++d) {
        const double want = value[size_t(r * got.last() + d)];
        const double bound = 4 * (std::sqrt(n) * 0x1p-24 + u) * most + u * std::abs(want);
        check_near(got.get(r, d), want, bound + 0x1p-25 * (u > 0x1p-20), what);
      }
    }
  }
};

void check_backward(const Inputs& x, const Grads& g) {
  const Options& o = x.o;
  Sums dq(g.dq), dk(g.dk), dv(g.dv);
  for (int64_t r = 0; r < g.dq.rows(); ++r) {
    const int64_t i = r % o.Tq, h = r / o.Tq % o.H, b = r / o.Tq / o.H;
    const int64_t unit = b * o.Hkv + h / (o.H / o.Hkv);
    const Row row(x, b, h, i);
    std::vector<double> dP(row.P.size()), size(dP);
    double delta = -g.dlse.get(b * o.H + h, i), delta_size = std::abs(delta);
    for (int64_t j = 0; j < o.Tk; ++j) {
      const auto n = size_t(j);
      if (row.kept[n] == 0) continue;
      for (int64_t d = 0; d < o.Dv; ++d) {
        const double dout = g.dout.get(r, d), term = dout * x.v.get(unit * o.Tk + j, d);
        dP[n] += term * row.kept[n] / row.P[n];
        size[n] += std::abs(term) * row.kept[n] / row.P[n];
        dv.add((unit * o.Tk + j) * o.Dv + d, row.kept[n] * dout, row.spread[n] * std::abs(dout));
      }
      delta += row.P[n] * dP[n], delta_size += row.P[n] * size[n];
    }
    for (int64_t j = 0; j < o.Tk; ++j) {
      const auto n = size_t(j);
      if (row.P[n] == 0) continue;
      const double factor = o.scores.scale * row.slope[n];
      const double dS = factor * row.P[n] * (dP[n] - delta);
      const double absolute = factor * row.spread[n] * (size[n] + delta_size);
      for (int64_t d = 0; d < o.D; ++d) {
        const double q = x.q.get(r, d), k = x.k.get(unit * o.Tk + j, d);
        dq.add(r * o.D + d, dS * k, absolute * std::abs(k));
        dk.add((unit * o.Tk + j) * o.D + d, dS * q, absolute * std::abs(q));
      }
    }
  }
  const double n = double(o.D + o.Tk + o.Tq);
  dq.check(g.dq, n, "dq"), dk.check(g.dk, n, "dk"), dv.check(g.dv, n, "dv");
}

void run_backward(const Options& options) {
  const Inputs x(options);
  Result r(x, DType::f32);
  emulator::set_accumulation(emulator::Accumulation::truncated);
  forward(x, r);
  Grads g(x);
  backward(x, r, g);
  check_backward(x, g);
  emulator::set_accumulation(emulator::Accumulation::rounded);
}

// As the op is, under this schedule and in this mode.
void run_case(const Options& options, DType out) {
  const Inputs x(options);
  Result first(x, out);
  emulator::set_accumulation(emulator::Accumulation::truncated);
  forward(x, first);
  check_forward(x, first);
  for (const auto& [order, seed] : {std::pair{Order::reversed, 0u}, {Order::shuffled, 3u}}) {
    const Scheduled schedule(order, seed);
    Result again(x, out);
    forward(x, again);
    for (int64_t r = 0; r < first.out.rows(); ++r) {
      for (int64_t d = 0; d < x.o.Dv; ++d) CHECK(first.out.get(r, d) == again.out.get(r, d));
    }
  }
  emulator::set_accumulation(emulator::Accumulation::rounded);
}

Options sizes(int64_t B, int64_t H, int64_t Hkv, int64_t Tq, int64_t Tk, int64_t D) {
  Options o;
  o.B = B, o.H = H, o.Hkv = Hkv, o.Tq = Tq, o.Tk = Tk, o.D = D;
  return o;
}

std::vector<Options> cases() {
  std::vector<Options> all;
  all.push_back(sizes(1, 1, 1, 1, 1, 1));
  all.push_back(sizes(2, 2, 1, 5, 7, 8));
  all.push_back(sizes(1, 1, 1, 70, 70, 64)), all.back().scores.causal = true;
  all.push_back(sizes(1, 2, 2, 33, 140, 24)), all.back().mask = Options::boolean;
  all.push_back(sizes(1, 2, 1, 9, 40, 17)), all.back().mask = Options::additive;
  all.back().scores.causal = true, all.back().Dv = 5;
  all.push_back(sizes(3, 4, 1, 2, 530, 16)), all.back().lengths = true, all.back().alibi = true;
  all.back().scores.causal = true;
  all.push_back(sizes(1, 2, 2, 65, 200, 16)), all.back().scores.left = 70;
  all.back().scores.right = 9, all.back().scores.softcap = 2;
  all.push_back(sizes(1, 4, 2, 19, 50, 16)), all.back().scores.dropout_p = 0.3;
  all.back().scores.seed = 77;
  all.push_back(sizes(1, 1, 1, 20, 40, 128)), all.back().scores.causal = true;
  all.push_back(sizes(1, 1, 1, 18, 33, 256)), all.back().gap = 3;
  return all;
}

}  // namespace

TEST(forward_is_right_in_float32) {
  for (Options o : cases()) run_case(o, DType::f32);
  std::printf("worst %.3f of the bound\n", g_worst);
}
TEST(forward_is_right_in_16_bits) {
  g_worst = 0;
  for (Options o : cases()) {
    for (const DType t : {DType::bf16, DType::f16}) {
      o.dtype = t;
      run_case(o, t);
    }
  }
  std::printf("worst %.3f of the bound\n", g_worst);
}
TEST(forward_of_16_bits_before_rounding) {
  g_worst = 0;
  for (Options o : cases()) {
    for (const DType t : {DType::bf16, DType::f16}) {
      o.dtype = t;
      run_case(o, DType::f32);
    }
  }
  std::printf("worst %.3f of the bound\n", g_worst);
}

TEST(backward_is_right_in_float32) {
  g_worst = 0;
  for (const Options& o : cases()) run_backward(o);
  std::printf("worst %.3f of the bound\n", g_worst);
}
TEST(backward_is_right_in_16_bits) {
  g_worst = 0;
  for (Options o : cases()) {
    for (const DType t : {DType::bf16, DType::f16}) {
      o.dtype = t;
      run_backward(o);
    }
  }
  std::printf("worst %.3f of the bound\n", g_worst);
}

// A sequence among many, whose chunks one block takes, and by itself, where each has its own.
TEST(a_split_does_not_change_the_bits) {
  for (const DType t : {DType::f32, DType::bf16}) {
    Options o = sizes(270, 1, 1, 1, 600, 8);
    o.dtype = t;
    const Inputs x(o);
    Result together(x, t), apart(x, t);
    forward(x, together);
    Attention op = x.op();
    op.out = apart.out.view(), op.lse = apart.lse.view();
    for (View* v : {&op.q, &op.k, &op.v, &op.out, &op.lse}) {
      v->shape[0] = 1;
      v->data = static_cast<char*>(v->data) + 133 * v->stride[0] * dtype_size(v->dtype);
    }
    emulator::take_counters();
    cuda::attention_forward(op);
    CHECK(emulator::take_counters().launches == 2);
    for (int64_t d = 0; d < o.D; ++d) CHECK(together.out.get(133, d) == apart.out.get(133, d));
    CHECK(together.lse.get(133, 0) == apart.lse.get(133, 0));
  }
}

// Of attention_products.h, where tiles are loaded, multiplied and stored; and of array.h, by which
// the gradients' delta is read.
emulator::Counters of_products(emulator::Counters c) {
  std::erase_if(c.sites, [](const emulator::SiteCounters& site) {
    return site.where.find("attention_products.h") == std::string::npos &&
           site.where.find("array.h") == std::string::npos;
  });
  return c;
}

TEST(tiles_move_without_waste) {
  for (const int64_t D : {64, 128, 256}) {
    for (const DType t : {DType::f32, DType::bf16}) {
      Options o = sizes(1, 1, 1, 64, 128, D);
      o.dtype = t;
      const Inputs x(o);
      Result r(x, t);
      emulator::take_counters();
      forward(x, r);
      const std::string what = std::to_string(D) + " " + dtype_name(t);
      check_traffic(of_products(emulator::take_counters()), __FILE__, __LINE__, "forward " + what);
      Grads g(x);
      backward(x, r, g);
      check_traffic(of_products(emulator::take_counters()), __FILE__, __LINE__, "backward " + what);
    }
  }
}

TEST(tensor_cores_are_busier_than_shared_memory) {
  for (const int64_t D : {64, 128}) {
    const auto counted = [D](int64_t Tk) {
      Options o = sizes(1, 1, 1, 128, Tk, D);
      o.dtype = DType::bf16;
      const Inputs x(o);
      Result r(x, DType::bf16);
      emulator::take_counters();
      forward(x, r);
      return emulator::take_counters();
    };
    const emulator::Counters shorter = counted(64);
    const double ratio = tensor_cycles_per_shared_cycle(counted(256), shorter);
    std::printf("heads of %d: %.2f\n", int(D), ratio);
    CHECK(ratio >= 1.3);
  }
}
