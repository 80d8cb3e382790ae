// Whole ops on arrays between guard pages, from both ends and at sizes around every vector width:
// nothing outside of an array is read or written, and every element of the output is.
// What the values are, the Python tests check.
#include <cmath>
#include <cstring>
#include <string>
#include <utility>

#include "core/check.h"
#include "guarded.h"
#include "test.h"
#include "tilewright/tilewright.h"

using namespace tilewright;
using test::Against;
using test::Operand;

namespace {

constexpr int64_t kSizes[] = {1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 31, 32, 33, 63, 65};

void fill(const View& v, float value) {
  const int64_t n = v.size(), step = v.rank && v.stride[v.rank - 1] < 0 ? -1 : 1;
  for (int64_t i = 0; i < n; ++i) test::set_element(v.data, i * step, v.dtype, value);
}

bool all_finite(const View& v) {
  const int64_t n = v.size(), step = v.rank && v.stride[v.rank - 1] < 0 ? -1 : 1;
  for (int64_t i = 0; i < n; ++i) {
    if (!std::isfinite(test::element(v.data, i * step, v.dtype))) return false;
  }
  return true;
}

// An output, full of NaN.
struct Output : Operand {
  Output(DType t, std::initializer_list<int64_t> shape, Against against)
      : Operand(t, shape, against) {
    fill(view, NAN);
  }
};

template <class F>
void everywhere(const F& f) {
  test::for_each_level([&](const KernelTable&) {
    for (const Against against : {Against::end, Against::start}) {
      for (const DType t : kFloats) f(t, against);
    }
  });
}

void matmul_of(DType t, Against at, int64_t M, int64_t K, int64_t N) {
  const Operand a(t, {M, K}, at), b(t, {K, N}, at), bias(t, {N}, at), residual(t, {M, N}, at);
  const Output out(t, {M, N}, at);
  Matmul op;
  op.a = a.view, op.b = b.view, op.bias = bias.view, op.residual = residual.view;
  op.out = out.view;
  op.activation = Activation::gelu;
  run(op);
  CHECK(all_finite(out.view));
}

}  // namespace

TEST(matmul_stays_inside) {
  everywhere([](DType t, Against at) {
    for (const int64_t n : kSizes) {
      matmul_of(t, at, n, 5, 7);
      matmul_of(t, at, 3, n, 7);
      matmul_of(t, at, 3, 5, n);
    }
    matmul_of(t, at, 2, 257, 33);
    matmul_of(t, at, 15, 257, 33);
    matmul_of(t, at, 169, 3, 5);
    matmul_of(t, at, 4, 1, 769);
  });
}

TEST(activations_stay_inside) {
  everywhere([](DType t, Against at) {
    for (const int64_t n : kSizes) {
      const Operand x(t, {2, n}, at), dy(t, {2, n}, at, 2);
      const Output y(t, {2, n}, at), dx(t, {2, n}, at);
      for (const Activation kind : {Activation::relu, Activation::gelu, Activation::gelu_tanh,
                                    Activation::silu, Activation::tanh, Activation::sigmoid}) {
        run(ActivationForward{x.view, y.view, kind});
        run(ActivationBackward{x.view, dy.view, dx.view, kind});
        CHECK(all_finite(y.view));
        CHECK(all_finite(dx.view));
      }
    }
  });
}

TEST(dropout_stays_inside) {
  everywhere([](DType t, Against at) {
    for (const int64_t n : kSizes) {
      const Operand x(t, {3, n}, at);
      const Output y(t, {3, n}, at);
      run(Dropout{x.view, 0.5, uint64_t(n), y.view});
      CHECK(all_finite(y.view));
    }
  });
}

TEST(sum_rows_stays_inside) {
  everywhere([](DType t, Against at) {
    for (const int64_t n : kSizes) {
      const Operand x(t, {67, n}, at);
      const Output out(t, {n}, at);
      run(SumRows{x.view, out.view});
      CHECK(all_finite(out.view));
    }
  });
}

TEST(layernorm_and_rmsnorm_stay_inside) {
  everywhere([](DType t, Against at) {
    for (const int64_t C : kSizes) {
      const Operand x(t, {3, C}, at), residual(t, {3, C}, at, 2), dy(t, {3, C}, at, 3);
      const Operand gamma(t, {C}, at, 4), beta(t, {C}, at, 5);
      const Output y(t, {3, C}, at), s(t, {3, C}, at), dx(t, {3, C}, at);
      const Output mean(DType::f32, {3}, Against::end), rstd(DType::f32, {3}, Against::end);
      const Output dgamma(t, {C}, at), dbeta(t, {C}, at);
      LayernormForward forward;
      forward.x = x.view, forward.gamma = gamma.view, forward.beta = beta.view;
      forward.residual = residual.view, forward.y = y.view, forward.s = s.view;
      forward.mean = mean.view, forward.rstd = rstd.view;
      run(forward);
      LayernormBackward backward;
      backward.s = s.view, backward.gamma = gamma.view, backward.mean = mean.view;
      backward.rstd = rstd.view, backward.dy = dy.view, backward.dx = dx.view;
      backward.dgamma = dgamma.view, backward.dbeta = dbeta.view;
      run(backward);
      for (const Output* out : {&y, &s, &dx, &mean, &rstd, &dgamma, &dbeta}) {
        CHECK(all_finite(out->view));
      }
      for (const Output* out : {&y, &s, &dx, &rstd, &dgamma}) fill(out->view, NAN);
      forward.centred = false, forward.beta = forward.mean = View{};
      run(forward);
      backward.mean = backward.dbeta = View{};
      run(backward);
      for (const Output* out : {&y, &s, &dx, &rstd, &dgamma}) CHECK(all_finite(out->view));
    }
  });
}

TEST(quantization_stays_inside) {
  everywhere([](DType t, Against at) {
    for (const int64_t n : kSizes) {
      for (const int axis : {-1, 0, 1}) {
        const Operand x(t, {3, n}, at), data(DType::s8, {3, n}, at);
        const int64_t channels = axis < 0 ? 1 : axis == 0 ? 3 : n;
        Output scale(DType::f32, {channels}, at);
        if (axis < 0) scale.view.rank = 0;
        run(Quantize{x.view, axis, data.view, scale.view});
        const Output out(t, {3, n}, at);
        run(Dequantize{data.view, scale.view, View{}, axis, out.view});
        CHECK(all_finite(out.view));
      }
      const Operand x(t, {3, n}, at), data(DType::u8, {3, (n + 1) / 2}, at);
      const Output out(t, {3, n}, at);
      for (const int64_t group : {2, 3}) {  // whole bytes, and groups that share them
        const int64_t groups = (n + group - 1) / group;
        const Output scale(DType::f32, {3, groups}, at), offset(DType::f32, {3, groups}, at);
        run(Quantize{x.view, 0, data.view, scale.view, offset.view, 4, group, 1});
        run(Dequantize{data.view, scale.view, offset.view, 0, out.view, 4, group, 1});
        CHECK(all_finite(out.view));
      }
    }
  });
}

TEST(four_bits_need_an_axis_for_pairs) {
  const Against at = Against::end;
  const Operand x(DType::f32, {3, 5}, at);
  const Output data(DType::s8, {3, 3}, at), wide(DType::s8, {3, 5}, at), scale(DType::f32, {3}, at);
  const Output out(DType::f32, {3, 5}, at), short_out(DType::f32, {3, 4}, at);
  CHECK_THROWS(UnsupportedError, "quantize: bits must be 8 or 4, got 2",
               run(Quantize{x.view, 0, data.view, scale.view, View{}, 2, 0, 1}));
  CHECK_THROWS(ShapeError, "quantize: along must be below the 2 axes of x, got -1",
               run(Quantize{x.view, 0, data.view, scale.view, View{}, 4}));
  CHECK_THROWS(ShapeError, "quantize: along must be another axis than axis, got 0 for both",
               run(Quantize{x.view, 0, data.view, scale.view, View{}, 4, 0, 0}));
  CHECK_THROWS(ShapeError, "quantize: data must have shape (3, 3) for pairs of 4 bits",
               run(Quantize{x.view, 0, wide.view, scale.view, View{}, 4, 0, 1}));
  run(Quantize{x.view, 0, data.view, scale.view, View{}, 4, 0, 1});
  run(Dequantize{data.view, scale.view, View{}, 0, out.view, 4, 0, 1});
  CHECK_THROWS(UnsupportedError, "dequantize: bits must be 8 or 4, got 3",
               run(Dequantize{data.view, scale.view, View{}, 0, out.view, 3, 0, 1}));
  CHECK_THROWS(ShapeError, "dequantize: along must be below the 2 axes of data, got 2",
               run(Dequantize{data.view, scale.view, View{}, 0, out.view, 4, 0, 2}));
  CHECK_THROWS(ShapeError, "dequantize: out must have shape (3, 6)",
               run(Dequantize{data.view, scale.view, View{}, 0, short_out.view, 4, 0, 1}));
}

namespace {

void int8_of(DType t, Against at, int64_t M, int64_t K, int64_t N) {
  const Operand a8(DType::s8, {M, K}, at), b8(DType::s8, {K, N}, at, 2), a(t, {M, K}, at, 3);
  const Operand sums(DType::s32, {M, N}, at), bias(t, {N}, at), residual(t, {M, N}, at);
  Operand scale_b(DType::f32, {N}, at);
  fill(scale_b.view, 0.5f);
  const Output out(t, {M, N}, at);
  Int8Matmul exact;
  exact.a = a8.view, exact.b = b8.view, exact.out = sums.view;
  run(exact);
  QuantizedMatmul quantized;
  quantized.a = a.view, quantized.b = {b8.view, scale_b.view, View{}, 8, K};
  quantized.bias = bias.view, quantized.residual = residual.view, quantized.out = out.view;
  quantized.activation = Activation::silu;
  for (const Compute compute : {Compute::integers, Compute::floats}) {
    quantized.compute = compute;
    run(quantized);
    CHECK(all_finite(out.view));
  }
}

// Groups of 6 with offsets, in 8 and 4 bits, by integers and by floats.
void groups_of(DType t, Against at, int64_t M, int64_t K, int64_t N) {
  const int64_t groups = (K + 5) / 6;
  const Operand a(t, {M, K}, at, 3), scale(DType::f32, {groups, N}, at);
  const Operand offset(DType::f32, {groups, N}, at, 4), bias(t, {N}, at);
  for (const int bits : {8, 4}) {
    const Operand data(DType::u8, {bits == 8 ? K : (K + 1) / 2, N}, at, 2);
    const Output out(t, {M, N}, at);
    QuantizedMatmul op;
    op.a = a.view, op.bias = bias.view, op.out = out.view;
    op.b = {data.view, scale.view, offset.view, bits, K, 6};
    for (const Compute compute : {Compute::integers, Compute::floats}) {
      op.compute = compute;
      run(op);
      CHECK(all_finite(out.view));
    }
  }
}

}  // namespace

TEST(int8_products_stay_inside) {
  everywhere([](DType t, Against at) {
    for (const int64_t n : kSizes) {
      int8_of(t, at, n, 5, 7);
      int8_of(t, at, 3, n, 7);
      int8_of(t, at, 3, 5, n);
      groups_of(t, at, n, 5, 7);
      groups_of(t, at, 3, n, 7);
      groups_of(t, at, 3, 5, n);
    }
    int8_of(t, at, 15, 515, 33);
  });
}

TEST(softmax_stays_inside) {
  everywhere([](DType t, Against at) {
    for (const int64_t C : kSizes) {
      const Operand x(t, {3, C}, at), dy(t, {3, C}, at, 2);
      const Output y(t, {3, C}, at), dx(t, {3, C}, at);
      run(SoftmaxForward{x.view, y.view});
      run(SoftmaxBackward{y.view, dy.view, dx.view});
      CHECK(all_finite(y.view));
      CHECK(all_finite(dx.view));
      const Output log_y(t, {3, C}, at), log_dx(t, {3, C}, at);
      run(SoftmaxForward{x.view, log_y.view, true});
      run(SoftmaxBackward{log_y.view, dy.view, log_dx.view, true});
      CHECK(all_finite(log_y.view));
      CHECK(all_finite(log_dx.view));
    }
  });
}

TEST(rope_stays_inside) {
  everywhere([](DType t, Against at) {
    for (const int64_t half : kSizes) {
      for (const int64_t D : {2 * half, 2 * half + 3}) {
        const Operand x(t, {2, 3, D}, at), cos(t, {3, half}, at, 2), sin(t, {3, half}, at, 3);
        for (const bool interleaved : {false, true}) {
          const Output y(t, {2, 3, D}, at);
          run(Rope{x.view, cos.view, sin.view, interleaved, half % 2 == 0, y.view});
          CHECK(all_finite(y.view));
        }
      }
    }
  });
}

TEST(mse_stays_inside) {
  everywhere([](DType t, Against at) {
    for (const int64_t n : kSizes) {
      const Operand x(t, {3, n}, at), y(t, {3, n}, at, 2), dloss(t, {3, n}, at, 3);
      const Output losses(DType::f32, {3, n}, at), loss(DType::f32, {}, at), dx(t, {3, n}, at);
      run(MseForward{x.view, y.view, Reduction::none, losses.view});
      run(MseForward{x.view, y.view, Reduction::mean, loss.view});
      run(MseBackward{x.view, y.view, dloss.view, 2.0f, dx.view});
      for (const Output* out : {&losses, &loss, &dx}) CHECK(all_finite(out->view));
    }
  });
}

TEST(embedding_stays_inside_and_refuses_bad_ids) {
  everywhere([](DType t, Against at) {
    for (const int64_t C : kSizes) {
      const Operand table(t, {5, C}, at), dy(t, {2, 3, C}, at);
      for (const DType id : {DType::s32, DType::s64}) {
        Operand ids(id, {2, 3}, at);
        fill(ids.view, 4);
        const Output y(t, {2, 3, C}, at), dtable(t, {5, C}, at);
        run(EmbeddingForward{ids.view, table.view, y.view});
        run(EmbeddingBackward{ids.view, dy.view, dtable.view});
        CHECK(all_finite(y.view));
        CHECK(all_finite(dtable.view));
        for (const float bad : {-1.0f, 5.0f, 1e9f, -2e9f}) {
          test::set_element(ids.view.data, 0, id, bad);
          CHECK_THROWS(ShapeError, "embedding: ids",
                       run(EmbeddingForward{ids.view, table.view, y.view}));
        }
      }
    }
  });
}

TEST(cross_entropy_stays_inside_and_refuses_bad_targets) {
  everywhere([](DType t, Against at) {
    for (const int64_t C : kSizes) {
      const Operand logits(t, {3, C}, at), dloss(t, {3}, at);
      Operand target(DType::s64, {3}, at);
      fill(target.view, float(C - 1));
      const Output loss(DType::f32, {3}, at), lse(DType::f32, {3}, Against::end);
      const Output dlogits(t, {3, C}, at);
      CrossEntropyForward forward;
      forward.logits = logits.view, forward.target = target.view;
      forward.reduction = Reduction::none, forward.loss = loss.view, forward.lse = lse.view;
      run(forward);
      CrossEntropyBackward backward;
      backward.logits = logits.view, backward.target = target.view, backward.lse = lse.view;
      backward.dloss = dloss.view, backward.dlogits = dlogits.view;
      run(backward);
      for (const Output* out : {&loss, &lse, &dlogits}) CHECK(all_finite(out->view));
      const Output mean(DType::f32, {}, at), scale(DType::f32, {}, at);
      CrossEntropyForward reduced = forward;
      reduced.reduction = Reduction::mean, reduced.loss = mean.view, reduced.scale = scale.view;
      run(reduced);
      CHECK(*scale.view.ptr<float>() == 1.0f / 3.0f);
      const Operand soft(t, {3, C}, at, 2), weight(t, {C}, at, 3);
      for (const View& other : {target.view, soft.view}) {
        for (const Output* out : {&loss, &lse, &dlogits}) fill(out->view, NAN);
        forward.target = backward.target = other;
        forward.weight = backward.weight = weight.view;
        forward.label_smoothing = backward.label_smoothing = 0.5f;
        run(forward);
        run(backward);
        for (const Output* out : {&loss, &lse, &dlogits}) CHECK(all_finite(out->view));
      }
      forward.target = target.view;
      for (const int64_t bad : {int64_t(-1), C, int64_t(1) << 40}) {
        test::set_element(target.view.data, 0, DType::s64, float(bad));
        CHECK_THROWS(ShapeError, "cross_entropy: target", run(forward));
      }
    }
  });
}

TEST(optimizers_stay_inside) {
  everywhere([](DType t, Against at) {
    for (const int64_t n : kSizes) {
      const Operand p(t, {n}, at), g(t, {n}, at, 2), p2(t, {3, n}, at), g2(t, {3, n}, at, 2);
      Operand m(DType::f32, {n}, at), v(DType::f32, {n}, at);
      Operand m2(DType::f32, {3, n}, at), v2(DType::f32, {3, n}, at);
      for (Operand* state : {&m, &v, &m2, &v2}) fill(state->view, 0.0f);
      const View params[] = {p.view, p2.view}, grads[] = {g.view, g2.view};
      const View ms[] = {m.view, m2.view}, vs[] = {v.view, v2.view};
      Operand w(DType::f32, {n}, at), w2(DType::f32, {3, n}, at);
      for (Operand* state : {&w, &w2}) fill(state->view, 0.0f);
      const View ws[] = {w.view, w2.view};
      for (const ViewList& largest : {ViewList{}, ViewList{ws, 2}}) {
        run(Adam{
            {params, 2}, {grads, 2}, {ms, 2}, {vs, 2}, largest, 1e-2, 0.9, 0.99, 1e-8, 0.1, 1});
      }
      run(Sgd{{params, 2}, {grads, 2}, {ms, 2}, 1e-2, 0.9, 0.1, true});
      run(Sgd{{params, 2}, {grads, 2}, {}, 1e-2, 0.0, 0.0});
      for (const ViewList& optional : {ViewList{}, ViewList{ms, 2}}) {
        const double momentum = optional.size ? 0.9 : 0.0;
        run(Rmsprop{{params, 2}, {grads, 2}, {vs, 2}, optional, {}, 1e-2, 0.9, 1e-3, 0.1, 0.0});
        run(Rmsprop{
            {params, 2}, {grads, 2}, {vs, 2}, {}, optional, 1e-2, 0.9, 1e-3, 0.1, momentum});
        run(Rmsprop{
            {params, 2}, {grads, 2}, {vs, 2}, {ws, 2}, optional, 1e-2, 0.9, 1e-3, 0.1, momentum});
      }
      run(ScaleTensors{{params, 2}, 0.5});
      CHECK(run(SumSquares{{grads, 2}}) >= 0);
      const Operand* written[] = {&p, &p2, &m, &m2, &v, &v2, &w, &w2};
      for (const Operand* out : written) CHECK(all_finite(out->view));
    }
  });
}

namespace {

// The forward and the backward pass of one problem; `op` has what is optional.
void attention_of(DType t, Against at, int64_t n, int64_t D, Attention op) {
  const Operand q(t, {2, 2, n, D}, at), k(t, {2, 1, n + 2, D}, at, 2);
  const Operand v(t, {2, 1, n + 2, D + 1}, at, 3), dout(t, {2, 2, n, D + 1}, at, 5);
  const Operand dlse(DType::f32, {2, 2, n}, at, 6);
  const Output out(t, {2, 2, n, D + 1}, at), lse(DType::f32, {2, 2, n}, at);
  const Output dq(t, {2, 2, n, D}, at), dk(t, {2, 1, n + 2, D}, at),
      dv(t, {2, 1, n + 2, D + 1}, at);
  op.q = q.view, op.k = k.view, op.v = v.view, op.out = out.view, op.lse = lse.view;
  run(op);
  AttentionBackward back{op, dout.view, dlse.view, dq.view, dk.view, dv.view};
  run(back);
  for (const Output* o : {&out, &lse, &dq, &dk, &dv}) CHECK(all_finite(o->view));
}

}  // namespace

TEST(attention_stays_inside) {
  everywhere([](DType t, Against at) {
    for (const int64_t n : {1, 3, 8, 15, 17, 33}) {
      for (const int64_t D : {1, 7, 16, 33}) {
        const Operand bias(t, {2, 2, n, n + 2}, at, 4), slopes(DType::f32, {2, 2}, at, 5);
        Operand lengths(DType::s32, {2}, at);
        fill(lengths.view, float(n + 1));
        Attention op;
        op.kv_lengths = lengths.view, op.scores.causal = true;
        attention_of(t, at, n, D, op);  // few rows without a mask go another way
        op.mask = bias.view;
        attention_of(t, at, n, D, op);
        op.scores.left = 3, op.scores.softcap = 2.0f, op.scores.alibi_slopes = slopes.view;
        attention_of(t, at, n, D, op);
        op.mask = {};
        attention_of(t, at, n, D, op);
      }
    }
    attention_of(t, at, 131, 16, {});  // more than a block of keys
  });
}

TEST(packed_right_hand_sides_are_those_of_the_call) {
  test::for_each_level([](const KernelTable& table) {
    for (const DType t : {DType::f32, DType::bf16, DType::f16}) {
      const Operand a(t, {5, 37}), b(t, {37, 19}, Against::start, 2);
      const Output y(DType::f32, {5, 19}, Against::end), z(DType::f32, {5, 19}, Against::end);
      Matmul op;
      op.a = a.view, op.b = b.view, op.out = y.view;
      run(op);
      const Packed packed = pack(b.view);
      op.b = {}, op.packed = packed.get(), op.out = z.view;
      run(op);
      CHECK(!std::memcmp(y.view.data, z.view.data, 5 * 19 * 4));
      const PackedInfo about = info(*packed);
      CHECK(about.K == 37 && about.N == 19 && about.dtype == t && about.bits == 0);
      CHECK(about.isa == table.isa && about.nbytes >= 37 * 19 * dtype_size(t));
      CHECK_THROWS(DtypeError, "dequantize: q must be packed", unpack(*packed, z.view));
    }
    const Operand a(DType::s8, {3, 10}), b(DType::s8, {10, 6});
    const Operand out(DType::s32, {3, 6});
    const Packed packed = pack(b.view);
    Int8Matmul op;
    op.a = a.view, op.packed = packed.get(), op.out = out.view;
    run(op);
    Matmul floats;
    floats.a = Operand(DType::f32, {3, 10}).view, floats.packed = packed.get();
    CHECK_THROWS(DtypeError, "matmul: b must be packed from floats", run(floats));
  });
}

TEST(packed_weights_stand_for_their_floats) {
  test::for_each_level([](const KernelTable&) {
    for (const int bits : {8, 4}) {
      const int64_t K = 11, N = 18, group = bits == 4 ? 4 : 0;
      const Operand data(DType::s8, {bits == 4 ? 6 : K, N}), scales(DType::f32, {3, N});
      const Operand scale(DType::f32, {N}), a(DType::f32, {2, K});
      QuantizedView b;
      b.data = data.view, b.scale = group ? scales.view : scale.view;
      b.bits = bits, b.K = K, b.group = group;
      const Packed packed = pack(b);
      CHECK(info(*packed).bits == bits && info(*packed).K == K);
      const Output w(DType::f32, {K, N}, Against::end);
      unpack(*packed, w.view);
      const Output y(DType::f32, {2, N}, Against::end), z(DType::f32, {2, N}, Against::end);
      Matmul product;
      product.a = a.view, product.b = w.view, product.out = y.view;
      run(product);
      QuantizedMatmul op;
      op.a = a.view, op.packed = packed.get(), op.out = z.view;
      op.compute = Compute::floats;
      run(op);
      CHECK(!std::memcmp(y.view.data, z.view.data, size_t(2 * N) * 4));
      CHECK_THROWS(ShapeError, "dequantize: out must have shape", unpack(*packed, y.view));
      b.bits = 5;
      CHECK_THROWS(UnsupportedError, "pack: b must have 4 or 8 bits", pack(b));
    }
  });
}

TEST(pack_refuses_what_it_cannot_pack) {
  CHECK_THROWS(ShapeError, "pack: b must have 2 axes", pack(Operand(DType::f32, {3, 4, 5}).view));
  CHECK_THROWS(DtypeError, "pack: b must be", pack(Operand(DType::s32, {3, 4}).view));
  CHECK_THROWS(DtypeError, "pack: b", pack(View{}));
  const Operand a(DType::f32, {2, 3}), b(DType::f32, {3, 4}), out(DType::f32, {2, 4});
  set_isa("generic");
  const Packed packed = pack(b.view);
  set_isa("");
  Matmul op;
  op.a = a.view, op.packed = packed.get(), op.out = out.view;
  if (isa_levels()[0].active) return;  // nothing but generic here
  CHECK_THROWS(UnsupportedError, "was packed for ISA level generic", run(op));
  const OptionScope scope({.isa = "generic"});
  run(op);
}

TEST(a_cache_from_outside) {
  const Operand k(DType::f32, {2, 1, 3, 4}), v(DType::bf16, {2, 1, 3, 4}),
      q(DType::f32, {2, 2, 1, 4});
  KVShape shape{.layers = 2, .batch = 2, .heads = 1, .head_dim = 4, .max_tokens = 8};
  CHECK(shape.page == 128 && shape.dtype == DType::bf16);
  KVCache cache(shape);
  cache.append(1, k.view, v.view);
  cache.append(1, k.view, v.view);
  KVCache other = cache.fork({1, 0, 1});
  other.truncate(0, 2);
  CHECK(cache.length(1, 0) == 6 && other.length(1, 0) == 2 && other.length(1, 2) == 6);
  const KVSnapshot keys = cache.snapshot(1);
  cache = std::move(other);
  CHECK(cache.shape().batch == 3 && keys.longest() == 6 && keys.lengths().shape[0] == 2);
  Attention op;
  const Output out(DType::f32, {2, 2, 1, 4}, Against::end);
  op.q = q.view, op.cache = &keys, op.out = out.view;
  run(op);
  CHECK(all_finite(out.view));

  CHECK_THROWS(ShapeError, "KVCache.snapshot: layer must lie between 0 and 1", cache.snapshot(2));
  CHECK_THROWS(ShapeError, "KVCache.length: b must lie between 0 and 2", cache.length(0, 3));
  CHECK_THROWS(ShapeError, "KVCache.fork: sequences must lie", cache.fork({0, -1}));
  CHECK_THROWS(ShapeError, "KVCache.truncate: n must not be negative", cache.truncate(0, -1));
  CHECK_THROWS(ShapeError, "KVCache.append: k must have", cache.append(0, k.view, v.view));
  shape.head_dim = 257;
  CHECK_THROWS(ShapeError, "KVCache: head_dim must lie", KVCache{shape});
  shape.head_dim = 4, shape.dtype = DType::s32;
  CHECK_THROWS(DtypeError, "KVCache: dtype must be", KVCache{shape});
}

TEST(options_belong_to_their_scope) {
  const Operand a(DType::f32, {300, 200}), b(DType::f32, {200, 300}), out(DType::f32, {300, 300});
  Matmul op;
  op.a = a.view, op.b = b.view, op.out = out.view;
  const int before = num_threads();
  Recording recording;
  {
    const OptionScope outer({.threads = 2, .isa = "generic"});
    CHECK(num_threads() == 2);
    {
      const OptionScope inner({.precision = Precision::medium, .batch_invariant = Choice::no});
      CHECK(num_threads() == 2 && precision() == Precision::medium && !batch_invariant());
      run(op);
    }
    {
      const OptionScope inner({.threads = 1});
      run(op);
    }
    CHECK(precision() == Precision::highest && batch_invariant());
    CHECK_THROWS(ShapeError, "options: threads must be in 1..1024", OptionScope({.threads = -1}));
    CHECK_THROWS(UnsupportedError, "isa: level must be one of", OptionScope({.isa = "no"}));
    CHECK(num_threads() == 2);
  }
  CHECK(num_threads() == before);
  CHECK(recording.calls.size() == 2 && recording.calls[0].op == "matmul");
  CHECK(recording.calls[0].isa == "generic" && recording.calls[1].isa == "generic");
  // At most two: on a crowded machine a product so small stays alone (core/sharing.h).
  CHECK(recording.calls[0].threads <= 2 && recording.calls[1].threads == 1);
  bool counted = false;
  for (const CallCount& c : call_counts()) counted = counted || std::string(c.isa) == "generic";
  CHECK(counted);
}
