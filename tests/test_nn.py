"""Layers: values against float64 NumPy, state, copies, packing, dropout, initial weights."""

import concurrent.futures
import math

import ml_dtypes
import numpy as np
import pytest

import tilewright as tw
from tilewright import nn

bf16 = ml_dtypes.bfloat16


def array(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(got), want, rtol=tolerance, atol=tolerance)


# Module --------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.rest = nn.Sequential(nn.ReLU(), nn.Linear(4, 2, bias=False))
        self.scale = nn.Parameter(np.ones(2, np.float32))
        self.register_buffer("seen", np.zeros(1, np.int64))

    def forward(self, x):
        return self.rest(self.first(x)) * self.scale


NAMES = ["scale", "first.weight", "first.bias", "rest.1.weight"]


def test_names_modes_and_repr():
    net = Net()
    assert [name for name, _ in net.named_parameters()] == NAMES
    assert list(net.state_dict()) == [*NAMES, "seen"]
    assert all(p.requires_grad for p in net.parameters())
    net.eval()
    assert not any(module.training for module in net.modules())
    assert net.train().rest.training
    assert "(first): Linear(3, 4, bias=True)" in repr(net)
    net.extra = net.first  # one module under two names: its parameters count once
    assert len(list(net.parameters())) == len(NAMES)
    net.first = None
    assert [name for name, _ in net.named_modules()][1:] == ["rest", "rest.0", "rest.1", "extra"]


def test_training_and_zero_grad(rng):
    net = Net()
    (net(tw.tensor(array(rng, 5, 3))) ** 2).mean().backward()
    assert all(p.grad.shape == p.shape for p in net.parameters())
    assert net.first.weight.grad.flags.c_contiguous
    net.zero_grad()
    assert all(p.grad is None for p in net.parameters())


def test_state_round_trip(rng, tmp_path):
    net, other = Net(), Net()
    x = array(rng, 5, 3)
    tw.save(net.state_dict(), tmp_path / "net")
    other.load_state_dict(tw.load(tmp_path / "net"))
    assert np.array_equal(net(x).numpy(), other(x).numpy())


def test_states_that_do_not_fit_name_the_tensor_and_copy_nothing():
    net = Net()
    before = {name: value.copy() for name, value in net.state_dict().items()}
    other = Net().state_dict()
    missing = {k: v for k, v in other.items() if k != "first.bias"}
    with pytest.raises(tw.FormatError, match=r"missing: first\.bias; unexpected: none"):
        net.load_state_dict(missing)
    with pytest.raises(tw.FormatError, match=r"missing: none; unexpected: more"):
        net.load_state_dict({**other, "more": np.zeros(1)})
    with pytest.raises(tw.ShapeError, match=r"rest\.1\.weight must have shape \(2, 4\).*\(4, 2\)"):
        net.load_state_dict({**other, "rest.1.weight": np.zeros((4, 2), np.float32)})
    with pytest.raises(tw.DtypeError, match=r"scale must not be float64"):
        net.load_state_dict({**other, "scale": np.zeros(2)})
    with pytest.raises(tw.DtypeError, match=r"scale must be float32, got int32"):
        net.load_state_dict({**other, "scale": np.zeros(2, np.int32)})
    with pytest.raises(tw.DtypeError, match=r"seen must be int64"):
        net.load_state_dict({**other, "seen": np.zeros(1, np.float32)})
    assert all(np.array_equal(v, before[k]) for k, v in net.state_dict().items())
    net.load_state_dict({**other, "scale": np.full(2, 0.5, bf16)})
    assert net.scale.numpy().tolist() == [0.5, 0.5]


# Linear --------------------------------------------------------------------------------------


def test_linear_fuses_its_epilogue(rng):
    layer = nn.Linear(5, 3)
    x, residual = array(rng, 2, 4, 5), array(rng, 2, 4, 3)
    w, b = layer.weight.numpy().astype(float), layer.bias.numpy().astype(float)
    close(layer(x), x @ w.T + b)
    y = layer(x, activation="relu", residual=tw.tensor(residual))
    close(y, np.maximum(x @ w.T + b, 0) + residual)


def test_linear_packs_in_eval_and_notices_every_change(rng, monkeypatch):
    packs = []
    pack = tw._core.pack
    monkeypatch.setattr(tw._core, "pack", lambda *args: packs.append(1) or pack(*args))
    layer, x = nn.Linear(5, 3), array(rng, 2, 5)

    def check(packed):
        packs.clear()
        with tw.no_grad():
            for _ in range(2):
                close(layer(x), x @ layer.weight.numpy().T.astype(float) + layer.bias.numpy())
        assert len(packs) == packed

    check(0)  # training
    layer.eval()
    check(1)
    check(0)
    with tw.no_grad():
        layer.weight[0, 0] = 7.0
    check(1)
    layer.weight.data = array(rng, 3, 5)
    check(1)
    layer.load_state_dict(nn.Linear(5, 3).state_dict())
    check(1)
    layer.weight.grad = array(rng, 3, 5)
    tw.optim.SGD([layer.weight], lr=0.1).step()
    check(1)
    layer.weight.data[...] = 1.0  # by hand: the mode switch forgets the pack
    layer.eval()
    check(1)
    layer(tw.tensor(x, requires_grad=True)).sum().backward()  # on the tape: never packed


def test_linear_packs_again_for_another_level(rng):
    layer, x = nn.Linear(20, 30).eval(), array(rng, 4, 20)
    want = x @ layer.weight.numpy().T.astype(float) + layer.bias.numpy()
    for level in [row.name for row in tw.isas() if row.supported]:
        with tw.options(isa=level), tw.no_grad():
            close(layer(x), want)


def test_threads_on_other_levels_share_a_layer(rng):
    """Each gets a pack of its own level, however their calls interleave."""
    layer, x = nn.Linear(20, 30).eval(), array(rng, 4, 20)
    want = x @ layer.weight.numpy().T.astype(float) + layer.bias.numpy()
    levels = [row.name for row in tw.isas() if row.supported]

    def run(level):
        with tw.options(isa=level), tw.no_grad():
            return [layer(x).numpy() for _ in range(300)]

    with concurrent.futures.ThreadPoolExecutor(len(levels)) as pool:
        for found in pool.map(run, levels):
            for y in found:
                close(y, want)


def test_quantized_linear(rng):
    layer = nn.Linear(64, 32)
    q = nn.QuantizedLinear.from_linear(layer)
    x = array(rng, 7, 64)
    want = x @ layer.weight.numpy().T + layer.bias.numpy()
    with tw.no_grad():
        got = q(tw.tensor(x)).numpy()
        assert np.abs(got - want).max() < 0.03 * np.abs(want).max()
        fused = q(x, activation="relu", residual=want)
    close(fused, np.maximum(got, 0) + want)
    assert {n: a.dtype.name for n, a in q.state_dict().items()} == {
        "weight": "int8", "scale": "float32", "bias": "float32",
    }  # fmt: skip
    other = nn.QuantizedLinear(64, 32)
    other(x)  # it has packed its zeros
    other.load_state_dict(q.state_dict())
    assert np.array_equal(np.asarray(other(x)), got)


@pytest.mark.parametrize("options", [
    {"bits": 4, "group_size": 16}, {"bits": 8, "group_size": 24, "symmetric": False},
    {"bits": 4, "symmetric": False},
])  # fmt: skip
def test_quantized_linear_of_few_bits(options, rng, tmp_path):
    layer = nn.Linear(65, 32)
    q = nn.QuantizedLinear.from_linear(layer, **options)
    x, weight = array(rng, 7, 65), tw.dequantize(q.quantized())
    step = np.abs(layer.weight.numpy()).max() / (7 if options["bits"] == 4 else 127)
    assert np.abs(weight - layer.weight.numpy()).max() <= step
    want = x @ weight.T + layer.bias.numpy()
    with tw.no_grad():
        assert np.abs(q(x) - want).max() < 0.03 * np.abs(want).max()
    tw.save(q.state_dict(), tmp_path / "q")
    other = nn.QuantizedLinear(65, 32, **options)
    other.load_state_dict(tw.load(tmp_path / "q"))
    assert np.array_equal(np.asarray(other(x)), np.asarray(q(x)))


@pytest.mark.parametrize("options", [{}, {"bits": 4, "group_size": 8, "symmetric": False}])
def test_a_quantized_layer_in_another_dtype_keeps_float32_scales(options, rng):
    q = nn.QuantizedLinear.from_linear(nn.Linear(24, 8), **options)
    x, weight = array(rng, 5, 24), tw.dequantize(q.quantized())
    assert q.to("bfloat16") is q
    assert q.bias.dtype == "bfloat16"
    assert np.array_equal(tw.dequantize(q.quantized()), weight)
    y = q(x.astype("bfloat16"))
    assert y.dtype == "bfloat16"
    assert np.abs(np.float32(y) - (x @ weight.T + np.float32(q.bias))).max() < 0.1


def test_layers_train_through_quantized_ones(rng):
    """The gradient passes a quantized layer on its way to those before it."""
    first, q = nn.Linear(8, 16), nn.QuantizedLinear.from_linear(nn.Linear(16, 4), bits=4)
    x, dy = array(rng, 5, 8), array(rng, 5, 4)
    q(first(x), activation="relu").backward(dy)
    h = x @ first.weight.numpy().T + first.bias.numpy()
    weight = tw.dequantize(q.quantized())
    dz = dy * (h @ weight.T + q.bias > 0)
    close(first.weight.grad, (dz @ weight).T @ x)
    assert not list(q.parameters())


# Embedding and norm ----------------------------------------------------------------------------


def test_embedding(rng):
    table, ids = nn.Embedding(10, 4), np.array([[1, 9], [1, 0]])
    y = table(ids)
    assert np.array_equal(y.numpy(), table.weight.numpy()[ids])
    y.backward(np.ones(y.shape, np.float32))
    assert table.weight.grad[:, 0].tolist() == [1, 2, 0, 0, 0, 0, 0, 0, 0, 1]


def test_layernorm(rng):
    norm = nn.LayerNorm(6)
    x, residual = array(rng, 3, 6), array(rng, 3, 6)
    want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    close(norm(x), want)
    y, s = norm(x, residual=residual)
    close(s, x + residual)
    close(y, norm(x + residual).numpy())
    assert np.asarray(nn.LayerNorm(6, elementwise_affine=False)(x)).shape == x.shape


# Dropout ---------------------------------------------------------------------------------------


def test_dropout_drops_a_share_and_keeps_the_mean():
    tw.manual_seed(1)
    x = tw.tensor(np.ones((100, 100), np.float32), requires_grad=True)
    layer = nn.Dropout(0.25)
    y = layer(x)
    values = np.unique(y.numpy())
    assert values.tolist() == [0.0, pytest.approx(4 / 3)]
    assert (y.numpy() == 0).mean() == pytest.approx(0.25, abs=0.02)
    y.sum().backward()
    assert np.array_equal(x.grad, y.numpy())
    assert layer.eval()(x) is x
    assert nn.Dropout(0.0)(x) is x
    assert not nn.Dropout(1.0)(x).numpy().any()
    with pytest.raises(ValueError, match="p must be"):
        nn.Dropout(1.5)


def test_the_random_state_is_two_numbers_that_continue_the_stream():
    x, layer = np.ones(1000, np.float32), nn.Dropout(0.5)
    tw.manual_seed(3)
    first = layer(x)
    state = tw.random.get_state()
    second = layer(x)
    assert not np.array_equal(first, second)
    tw.random.set_state(dict(state))
    assert np.array_equal(layer(x), second)
    tw.manual_seed(3)
    assert np.array_equal(layer(x), first)
    before = tw.random.get_state()
    with tw.random.seeded(3):
        assert np.array_equal(layer(x), first)
    assert tw.random.get_state() == before
    with pytest.raises(ValueError, match="seed"):
        tw.manual_seed(-1)


# Initial weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fill", "deviation"),
    [
        (lambda t: nn.init.xavier_uniform_(t), math.sqrt(2 / 500)),
        (lambda t: nn.init.xavier_normal_(t, gain=2.0), 2 * math.sqrt(2 / 500)),
        (lambda t: nn.init.kaiming_uniform_(t, nonlinearity="relu"), math.sqrt(2 / 300)),
        (lambda t: nn.init.kaiming_normal_(t, mode="fan_out"), math.sqrt(2 / (1.0001 * 200))),
        (lambda t: nn.init.normal_(t, 0.0, 0.02), 0.02),
        (lambda t: nn.init.uniform_(t, -1.0, 1.0), math.sqrt(1 / 3)),
        (lambda t: nn.init.trunc_normal_(t, 0.0, 0.02), 0.02),
        # of a normal cut at one deviation: 1 - 2 phi(1) / (Phi(1) - Phi(-1))
        (lambda t: nn.init.trunc_normal_(t, 0.0, 0.1, -0.1, 0.1), 0.1 * math.sqrt(0.29112)),
    ],
)
def test_deviation_of_initial_weights(fill, deviation):
    tw.manual_seed(0)
    t = fill(nn.Parameter(np.empty((200, 300), np.float32)))
    assert t.numpy().std() == pytest.approx(deviation, rel=0.02)
    assert abs(t.numpy().mean()) < 0.02 * deviation


def test_constant_and_cut_off_weights():
    t = nn.Parameter(np.empty((20, 30), np.float32))
    version = t._version
    assert (nn.init.constant_(t, 0.5).numpy() == 0.5).all()
    assert (nn.init.ones_(t).numpy() == 1).all()
    assert not nn.init.zeros_(t).numpy().any()
    assert t._version == version + 3
    values = nn.init.trunc_normal_(t, 1.0, 2.0, 2.0, 3.0).numpy()
    assert 2 <= values.min() < values.max() <= 3
    with pytest.raises(ValueError, match="hundredth"):
        nn.init.trunc_normal_(t, a=5.0, b=6.0)


def test_default_weights_are_seeded_and_within_pytorchs_bounds():
    tw.manual_seed(5)
    a = nn.Linear(100, 50)
    tw.manual_seed(5)
    b = nn.Linear(100, 50)
    assert np.array_equal(a.weight.numpy(), b.weight.numpy())
    for p in (a.weight, a.bias):
        assert 0.09 < np.abs(p.numpy()).max() <= 0.1
    assert nn.Embedding(100, 50).weight.numpy().std() == pytest.approx(1.0, abs=0.05)
