"""Module's tree and its containers; every layer's copies, pickles and files."""

import copy
import pickle
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest

import tilewright as tw
from harness import agrees, same_bits
from tilewright import nn

bf16 = ml_dtypes.bfloat16


def array(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2), nn.Identity()))


# The tree ---------------------------------------------------------------------------------------


def test_walking_the_tree():
    model = net()
    assert [name for name, _ in model.named_children()] == ["0", "1", "2"]
    assert model.get_submodule("2.0") is model[2][0]
    assert model.get_submodule("") is model
    with pytest.raises(AttributeError, match=r"no module '7' \(2\.7\)"):
        model.get_submodule("2.7")
    seen = []
    assert model.apply(lambda m: seen.append(type(m).__name__)) is model
    assert seen == ["Linear", "ReLU", "Linear", "Identity", "Sequential", "Sequential"]
    loss = nn.NLLLoss(np.ones(3, np.float32))
    assert [name for name, _ in loss.named_buffers()] == ["weight"]
    assert next(loss.buffers()) is loss.weight


def test_frozen_parameters_stay_parameters(rng):
    model = net()
    assert model[0].requires_grad_(False) is model[0]
    model(array(rng, 5, 3)).sum().backward()
    assert [p.grad is None for p in model.parameters()] == [True, True, False, False]
    assert len(model.state_dict()) == 4
    model.zero_grad(set_to_none=False)
    assert not model[2][0].weight.grad.any()
    model.zero_grad()
    assert model[2][0].weight.grad is None


def test_converting_parameters(rng):
    model, x = net().eval(), array(rng, 5, 3)
    with tw.no_grad():
        before = model(x).numpy()
        assert model.to(bf16) is model
        assert all(p.dtype == bf16 for p in model.parameters())
        after = model(x.astype(bf16)).numpy()
    assert after.dtype == bf16
    assert np.abs(after.astype(float) - before).max() < 0.05
    model.register_buffer("count", np.zeros(1, np.int64))
    model.register_buffer("mean", np.zeros(1, np.float32))
    model.to(bf16)
    assert (model.count.dtype, model.state_dict()["mean"].dtype) == (np.int64, bf16)


def test_states_that_share_some_names():
    a, b = net(), net()
    state = {name: value for name, value in a.state_dict().items() if name.startswith("0")}
    b.load_state_dict({**state, "more": np.zeros(1)}, strict=False)
    assert np.array_equal(a[0].weight.numpy(), b[0].weight.numpy())
    assert not np.array_equal(a[2][0].weight.numpy(), b[2][0].weight.numpy())
    with pytest.raises(tw.ShapeError, match=r"0\.bias"):
        b.load_state_dict({"0.bias": np.zeros(9, np.float32)}, strict=False)


def test_names_that_modules_can_have():
    model = net()
    for name in ("", "a.b", "forward"):
        with pytest.raises(KeyError, match="no name"):
            model.add_module(name, nn.ReLU())
    with pytest.raises(TypeError, match="must be a Module"):
        model.add_module("more", np.zeros(1))
    model.add_module("0", nn.Identity())
    assert not list(model[0].parameters())
    model.register_parameter("scale", nn.Parameter(np.ones(1, np.float32)))
    assert "scale" in model.state_dict()
    del model.scale
    assert "scale" not in model.state_dict()
    with pytest.raises(AttributeError):
        model.scale  # noqa: B018


# Containers -------------------------------------------------------------------------------------


def test_sequential_as_a_list(rng):
    model = net()
    assert isinstance(model[:2], nn.Sequential)
    assert model[:2][0] is model[0]
    assert model[-1] is model[2]
    x = array(rng, 5, 3)
    assert np.array_equal(model[1:](model[0](x)).numpy(), model(x).numpy())
    model.append(nn.ReLU())
    assert len(model) == 4
    del model[1:3]
    assert next(iter(model)).out_features == 4
    assert [name for name, _ in model.named_children()] == ["0", "1"]
    named = nn.Sequential(OrderedDict(first=nn.Linear(3, 4), then=nn.ReLU()))
    assert list(named.state_dict()) == ["first.weight", "first.bias"]
    assert named.first is named[0]
    assert named(x).shape == (5, 4)


def test_module_list():
    layers = nn.ModuleList([nn.Linear(1, 2), nn.Linear(2, 3)])
    layers.append(nn.Linear(3, 4)).extend([nn.Linear(4, 5)])
    layers.insert(0, nn.Identity())
    assert [getattr(m, "out_features", 0) for m in layers] == [0, 2, 3, 4, 5]
    layers[0] = nn.Linear(1, 1)
    assert layers[0].out_features == 1
    assert isinstance(layers[1:3], nn.ModuleList)
    del layers[0]
    assert list(layers.state_dict())[::2] == [f"{i}.weight" for i in range(4)]
    with pytest.raises(NotImplementedError, match="no forward"):
        layers(1)


def test_module_dict():
    heads = nn.ModuleDict({"a": nn.Linear(1, 2), "b": nn.Linear(1, 3)})
    heads["c"] = nn.Linear(1, 4)
    heads.update({"a": nn.Linear(1, 5)})
    assert list(heads) == list(heads.keys()) == ["a", "b", "c"]
    assert [m.out_features for m in heads.values()] == [5, 3, 4]
    assert dict(heads.items())["b"] is heads["b"]
    assert "b" in heads
    assert heads.pop("b").out_features == 3
    assert "b" not in heads
    del heads["c"]
    assert list(heads.state_dict()) == ["a.weight", "a.bias"]
    with pytest.raises(KeyError):
        heads["keys"] = nn.ReLU()
    with pytest.raises(NotImplementedError, match="no forward"):
        heads(1)
    heads.clear()
    assert len(heads) == 0


def test_flatten_and_identity(rng):
    x = tw.tensor(array(rng, 2, 3, 4, 5), requires_grad=True)
    assert nn.Flatten()(x).shape == (2, 60)
    assert nn.Flatten(0)(x).shape == (120,)
    assert nn.Flatten(1, 2)(x).shape == (2, 12, 5)
    assert nn.Flatten(-2)(x.numpy()).shape == (2, 3, 20)
    assert nn.Flatten()(x[:0]).shape == (0, 60)
    nn.Flatten()(x).sum().backward()
    assert x.grad.shape == x.shape
    assert nn.Identity(54, unused=1)(x) is x


# Layers that changed ------------------------------------------------------------------------------


def test_padding_row_of_an_embedding(rng):
    for padding in (2, -8):
        layer = nn.Embedding(10, 4, padding_idx=padding)
        assert layer.padding_idx == 2
        assert not layer.weight.numpy()[2].any()
        ids = np.array([[1, 2], [2, 9]])
        y = layer(ids)
        assert np.array_equal(y.numpy(), layer.weight.numpy()[ids])
        y.sum().backward()
        assert layer.weight.grad[:, 0].tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 1]
        with tw.no_grad():
            assert np.array_equal(layer(ids).numpy(), layer.weight.numpy()[ids])
    with pytest.raises(tw.ShapeError, match="padding_idx"):
        nn.Embedding(10, 4, padding_idx=10)


def test_layernorm_over_several_axes(rng):
    layer = nn.LayerNorm((3, 5))
    with tw.no_grad():
        layer.weight[...], layer.bias[...] = array(rng, 3, 5), array(rng, 3, 5)
    w, b = (p.numpy().astype(float) for p in (layer.weight, layer.bias))

    def definition(x):
        x = (x - x.mean((-1, -2), keepdims=True)) / np.sqrt(x.var((-1, -2), keepdims=True) + 1e-5)
        return x * w + b

    x, residual = array(rng, 4, 2, 3, 5), array(rng, 4, 2, 3, 5)
    agrees(layer, definition, x, tolerance=3e-5)
    y, s = layer(x, residual)
    assert np.array_equal(s.numpy(), x + residual)
    assert np.array_equal(y.numpy(), layer(x + residual).numpy())
    assert layer.weight.grad.shape == (3, 5)
    with pytest.raises(tw.ShapeError, match=r"must end in the axes \(3, 5\)"):
        layer(array(rng, 4, 5, 3))


def test_rmsnorm(rng):
    layer = nn.RMSNorm((3, 5), eps=0.1)
    with tw.no_grad():
        layer.weight[...] = array(rng, 3, 5)
    w = layer.weight.numpy().astype(float)

    def definition(x):
        return x / np.sqrt((x * x).mean((-1, -2), keepdims=True) + 0.1) * w

    x, residual = array(rng, 4, 2, 3, 5), array(rng, 4, 2, 3, 5)
    agrees(layer, definition, x, tolerance=3e-5)
    y, s = layer(x, residual)
    assert np.array_equal(s.numpy(), x + residual)
    assert np.array_equal(y.numpy(), layer(x + residual).numpy())
    plain = nn.RMSNorm(5, elementwise_affine=False)
    assert plain.eps == 2.0**-23
    assert not plain.state_dict()
    agrees(plain, lambda x: x / np.sqrt((x * x).mean(-1, keepdims=True) + 2.0**-23), x)


# Copies of everything -----------------------------------------------------------------------------

E = 12
IDS = np.array([[1, 2, 0]])
WEIGHT = np.float32([1, 2, 3])
LAYERS = {
    "Linear": (lambda: nn.Linear(E, 5), 1),
    "LayerNorm": (lambda: nn.LayerNorm(E), 1),
    "Embedding": (lambda: nn.Embedding(9, 4, padding_idx=0), IDS),
    "QuantizedLinear": (lambda: nn.QuantizedLinear.from_linear(nn.Linear(E, 5)), 1),
    "Dropout": (lambda: nn.Dropout(0.3), 1),
    "Identity": (nn.Identity, 1),
    "Flatten": (nn.Flatten, 1),
    "Sequential": (lambda: nn.Sequential(nn.Linear(E, 3), nn.GELU("tanh")), 1),
    "ModuleDict": (lambda: nn.ModuleDict({"a": nn.Linear(E, 3)}), None),
    "ModuleList": (lambda: nn.ModuleList([nn.Linear(E, 3)]), None),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(E, 3, add_bias_kv=True), 3),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(E, 3, 7), 1),
    "TransformerDecoderLayer": (lambda: nn.TransformerDecoderLayer(E, 3, 7), 2),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(E, 3, 7), 2, nn.LayerNorm(E)),
        1,
    ),
    "TransformerDecoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(E, 3, 7), 2),
        2,
    ),
    "Transformer": (lambda: nn.Transformer(E, 3, 1, 1, 7), 2),
    "SinusoidalPositionalEncoding": (lambda: nn.SinusoidalPositionalEncoding(E, 0.1), 1),
    "RMSNorm": (lambda: nn.RMSNorm(E), 1),
    "RotaryEmbedding": (lambda: nn.RotaryEmbedding(6), 1),
    "LogSoftmax": (lambda: nn.LogSoftmax(-1), 1),
    "ReLU": (nn.ReLU, 1),
    "Tanh": (nn.Tanh, 1),
    "Sigmoid": (nn.Sigmoid, 1),
    "GELU": (lambda: nn.GELU("tanh"), 1),
    "SiLU": (nn.SiLU, 1),
    "Softmax": (lambda: nn.Softmax(0), 1),
    "LeakyReLU": (lambda: nn.LeakyReLU(0.2), 1),
    "ELU": (lambda: nn.ELU(0.2), 1),
    "Softplus": (lambda: nn.Softplus(2.0), 1),
    "Hardswish": (nn.Hardswish, 1),
    "Mish": (nn.Mish, 1),
    "CELU": (lambda: nn.CELU(0.5), 1),
    "SELU": (nn.SELU, 1),
    "PReLU": (nn.PReLU, 1),
    "GLU": (nn.GLU, 1),
    "ReLU6": (nn.ReLU6, 1),
    "Hardtanh": (lambda: nn.Hardtanh(-0.5, 0.7), 1),
    "Hardsigmoid": (nn.Hardsigmoid, 1),
    "Hardshrink": (lambda: nn.Hardshrink(0.3), 1),
    "Softshrink": (lambda: nn.Softshrink(0.3), 1),
    "Tanhshrink": (nn.Tanhshrink, 1),
    "LogSigmoid": (nn.LogSigmoid, 1),
    "Softsign": (nn.Softsign, 1),
    "Softmin": (lambda: nn.Softmin(-1), 1),
    "Threshold": (lambda: nn.Threshold(0.1, -1.0), 1),
    "BCELoss": (lambda: nn.BCELoss(WEIGHT), None),
    "BCEWithLogitsLoss": (lambda: nn.BCEWithLogitsLoss(pos_weight=WEIGHT), None),
    "CrossEntropyLoss": (lambda: nn.CrossEntropyLoss(WEIGHT), None),
    "NLLLoss": (lambda: nn.NLLLoss(WEIGHT), None),
    "KLDivLoss": (lambda: nn.KLDivLoss(reduction="batchmean"), 2),
    "HuberLoss": (lambda: nn.HuberLoss(delta=0.3), 2),
    "SmoothL1Loss": (lambda: nn.SmoothL1Loss(beta=0.3), 2),
    "L1Loss": (nn.L1Loss, 2),
    "MSELoss": (nn.MSELoss, 2),
}


def test_every_layer_is_listed_here():
    public = {name for name in nn.__all__ if isinstance(getattr(nn, name), type)}
    assert public - {"Module"} == set(LAYERS)


def run(module, inputs, seed=1):
    """Outputs as arrays; inputs: how many of (2, 3, E), or the ids themselves."""
    if isinstance(inputs, int):
        rng = np.random.default_rng(0)
        inputs = [array(rng, 2, 3, E) for _ in range(inputs)]
    else:
        inputs = [inputs]
    tw.manual_seed(seed)
    found = module(*inputs)
    return [np.asarray(y) for y in (found if isinstance(found, tuple) else (found,))]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("way", ["pickle", "deepcopy", "file"])
def test_copies_compute_the_same(name, way, tmp_path):
    make, inputs = LAYERS[name]
    module = make()
    if inputs is not None:
        with tw.no_grad():
            run(module.eval(), inputs)  # packs and tables are made, and not copied
            module.train()
    if way == "pickle":
        other = pickle.loads(pickle.dumps(module))
    elif way == "deepcopy":
        other = copy.deepcopy(module)
    else:
        tw.save(module.state_dict(), tmp_path / "m")
        other = make()
        other.load_state_dict(tw.load(tmp_path / "m"))
    assert repr(other) == repr(module)
    assert [n for n, _ in other.named_modules()] == [n for n, _ in module.named_modules()]
    for (n, a), (m, b) in zip(module.state_dict().items(), other.state_dict().items(), strict=True):
        assert n == m
        assert same_bits(a, b)
        assert not np.shares_memory(a, b)
    assert all(p.requires_grad for p in other.parameters())
    if inputs is None:
        return
    for mode in (True, False):
        outputs = [run(m.train(mode), inputs) for m in (module, other)]
        for a, b in zip(*outputs, strict=True):
            assert same_bits(a, b)


def test_a_copy_of_model_and_optimizer_trains_on(rng):
    model = nn.Linear(3, 2)
    optimizer = tw.optim.Adam(model.parameters())
    x = array(rng, 5, 3)

    def step(model, optimizer):
        optimizer.zero_grad()
        (model(x) ** 2).sum().backward()
        optimizer.step()

    step(model, optimizer)
    both = pickle.loads(pickle.dumps((model, optimizer)))
    assert both[1].params[0] is both[0].weight
    step(model, optimizer)
    step(*both)
    assert same_bits(model.weight.numpy(), both[0].weight.numpy())


def test_what_is_on_the_tape_is_not_copied():
    t = tw.tensor([1.0, 2.0], requires_grad=True)
    y = t * 2
    for way in (pickle.dumps, copy.deepcopy, copy.copy):
        with pytest.raises(RuntimeError, match="detach"):
            way(y)
    t.grad = np.ones(2, np.float32)
    other = copy.deepcopy(t)
    assert other.requires_grad
    assert other.grad.tolist() == [1, 1]
    assert not np.shares_memory(other.data, t.data)
    assert copy.deepcopy(y.detach()).numpy().tolist() == [2, 4]
    assert pickle.loads(pickle.dumps(tw.matmul)) is tw.matmul
