"""Layers and losses against PyTorch: the same names must mean the same."""

import numpy as np
import pytest

import tilewright as tw

torch = pytest.importorskip("torch", reason="torch is not installed: parity is not checked")
pytestmark = pytest.mark.slow

F = torch.nn.functional


def array(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def same(ours, theirs, tolerance=2e-5):
    theirs = theirs.detach().numpy()
    scale = max(1.0, float(np.abs(theirs).max()))
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=tolerance, atol=tolerance * scale)


def adopt(ours, theirs):
    """Give our module the weights of theirs, whose names must be ours."""
    ours.load_state_dict({name: t.detach().numpy() for name, t in theirs.state_dict().items()})


def compare(ours, theirs, x, tolerance=2e-5):
    """Outputs, and the gradients of the input and of every parameter."""
    adopt(ours, theirs)
    a, b = tw.tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    ya, yb = ours(a), theirs(b)
    same(ya, yb, tolerance)
    dy = np.random.default_rng(7).standard_normal(ya.shape).astype(np.float32)
    ya.backward(dy)
    yb.backward(torch.tensor(dy))
    same(a.grad, b.grad, tolerance)
    theirs_by_name = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        same(p.grad, theirs_by_name[name].grad, tolerance)


@pytest.mark.parametrize("bias", [True, False])
def test_linear(rng, bias):
    compare(tw.nn.Linear(17, 9, bias), torch.nn.Linear(17, 9, bias), array(rng, 4, 5, 17))


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}]
)
@pytest.mark.parametrize("shape", [33, (33,), (6, 33), (2, 6, 33)])
def test_layernorm(rng, shape, options):
    ours, theirs = (nn.LayerNorm(shape, **options) for nn in (tw.nn, torch.nn))
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.tensor(array(rng, *p.shape)))
    compare(ours, theirs, array(rng, 4, 2, 6, 33))


@pytest.mark.parametrize("options", [{}, {"elementwise_affine": False}, {"eps": 0.1}])
@pytest.mark.parametrize("shape", [33, (6, 33), (2, 6, 33)])
def test_rmsnorm(rng, shape, options):
    ours, theirs = (nn.RMSNorm(shape, **options) for nn in (tw.nn, torch.nn))
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.tensor(array(rng, *p.shape)))
    compare(ours, theirs, array(rng, 4, 2, 6, 33))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (tw.nn.ReLU(), torch.nn.ReLU()),
        (tw.nn.GELU(), torch.nn.GELU()),
        (tw.nn.GELU("tanh"), torch.nn.GELU("tanh")),
        (tw.nn.SiLU(), torch.nn.SiLU()),
        (tw.nn.Tanh(), torch.nn.Tanh()),
        (tw.nn.Sigmoid(), torch.nn.Sigmoid()),
        (tw.nn.Softmax(-1), torch.nn.Softmax(-1)),
        (tw.nn.Softmax(0), torch.nn.Softmax(0)),
        (tw.nn.LogSoftmax(-1), torch.nn.LogSoftmax(-1)),
        (tw.nn.LogSoftmax(0), torch.nn.LogSoftmax(0)),
        (tw.nn.LeakyReLU(), torch.nn.LeakyReLU()),
        (tw.nn.LeakyReLU(0.3), torch.nn.LeakyReLU(0.3)),
        (tw.nn.ELU(), torch.nn.ELU()),
        (tw.nn.ELU(0.3), torch.nn.ELU(0.3)),
        (tw.nn.Softplus(), torch.nn.Softplus()),
        (tw.nn.Softplus(2.0, 3.0), torch.nn.Softplus(2.0, 3.0)),
        (tw.nn.Hardswish(), torch.nn.Hardswish()),
        (tw.nn.Mish(), torch.nn.Mish()),
        (tw.nn.Softmin(-1), torch.nn.Softmin(-1)),
        (tw.nn.CELU(), torch.nn.CELU()),
        (tw.nn.CELU(0.3), torch.nn.CELU(0.3)),
        (tw.nn.SELU(), torch.nn.SELU()),
        (tw.nn.ReLU6(), torch.nn.ReLU6()),
        (tw.nn.Hardtanh(), torch.nn.Hardtanh()),
        (tw.nn.Hardtanh(-0.3, 2.5), torch.nn.Hardtanh(-0.3, 2.5)),
        (tw.nn.Hardsigmoid(), torch.nn.Hardsigmoid()),
        (tw.nn.LogSigmoid(), torch.nn.LogSigmoid()),
        (tw.nn.Softsign(), torch.nn.Softsign()),
        (tw.nn.Threshold(0.7, -2.0), torch.nn.Threshold(0.7, -2.0)),
        (tw.nn.Hardshrink(), torch.nn.Hardshrink()),
        (tw.nn.Softshrink(0.9), torch.nn.Softshrink(0.9)),
        (tw.nn.Tanhshrink(), torch.nn.Tanhshrink()),
        (tw.nn.PReLU(), torch.nn.PReLU()),
        (tw.nn.PReLU(36, init=0.1), torch.nn.PReLU(36, init=0.1)),
        (tw.nn.GLU(), torch.nn.GLU()),
        (tw.nn.GLU(dim=0), torch.nn.GLU(dim=0)),
        (tw.nn.Flatten(), torch.nn.Flatten()),
        (tw.nn.Identity(), torch.nn.Identity()),
    ],
)
def test_activations(rng, ours, theirs):
    compare(ours, theirs, array(rng, 6, 36) * 3)


def test_sequential(rng):
    def net(nn):
        return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3))

    compare(net(tw.nn), net(torch.nn), array(rng, 10, 8))


def test_embedding(rng):
    ours, theirs = tw.nn.Embedding(11, 6), torch.nn.Embedding(11, 6)
    adopt(ours, theirs)
    ids, dy = rng.integers(0, 11, (4, 5)), array(rng, 4, 5, 6)
    y, z = ours(ids), theirs(torch.tensor(ids))
    same(y, z)
    y.backward(dy)
    z.backward(torch.tensor(dy))
    same(ours.weight.grad, theirs.weight.grad)


@pytest.mark.parametrize("padding", [0, -1])
def test_embedding_with_padding(rng, padding):
    ours, theirs = (nn.Embedding(11, 6, padding_idx=padding) for nn in (tw.nn, torch.nn))
    adopt(ours, theirs)
    ids = rng.integers(0, 11, (40,))
    ours(ids).backward(dy := array(rng, 40, 6))
    theirs(torch.tensor(ids)).backward(torch.tensor(dy))
    same(ours.weight.grad, theirs.weight.grad)


ELEMENTWISE = [
    ("MSELoss", {}),
    ("L1Loss", {}),
    ("HuberLoss", {"delta": 0.4}),
    ("SmoothL1Loss", {}),
    ("SmoothL1Loss", {"beta": 0.3}),
    ("SmoothL1Loss", {"beta": 0.0}),
    ("BCELoss", {}),
    ("BCELoss", {"weight": True}),
    ("BCEWithLogitsLoss", {}),
    ("BCEWithLogitsLoss", {"weight": True, "pos_weight": True}),
    ("KLDivLoss", {}),
    ("KLDivLoss", {"log_target": True}),
]


@pytest.mark.filterwarnings("ignore:reduction. 'mean'")  # of KLDivLoss, for a future version
@pytest.mark.parametrize(
    ("name", "options", "reduction"),
    [
        (name, options, reduction)
        for name, options in ELEMENTWISE
        for reduction in ["mean", "sum", "none", "batchmean"][: 4 if name == "KLDivLoss" else 3]
    ],
)
def test_elementwise_losses(rng, name, options, reduction):
    """Values, and gradients by both inputs."""
    weights = {n: rng.random(7).astype(np.float32) + 0.5 for n, v in options.items() if v is True}
    options = {n: v for n, v in options.items() if n not in ("weight", "pos_weight")}
    if "log_target" in options:
        weights["log_target"] = options.pop("log_target")
    ours = getattr(tw.nn, name)(**options, **weights, reduction=reduction)
    theirs = getattr(torch.nn, name)(
        **options,
        **{n: torch.tensor(v) if n.endswith("weight") else v for n, v in weights.items()},
        reduction=reduction,
    )
    uniform = rng.uniform(0.02, 0.98, (2, 12, 7)).astype(np.float32)
    x, y = array(rng, 12, 7), array(rng, 12, 7)
    if name.startswith(("BCE", "KL")) and "log_target" not in weights:
        y = uniform[1]
    if name == "BCELoss":
        x = uniform[0]
    a, b = ([f(x), f(y)] for f in (leaf, torch_leaf))
    la, lb = ours(*a), theirs(*b)
    same(la, lb)
    dy = array(rng, *la.shape)
    la.backward(dy)
    lb.backward(torch.tensor(dy))
    for p, q in zip(a, b, strict=True):
        same(p.grad, q.grad)


def leaf(x):
    return tw.tensor(x, requires_grad=True)


def torch_leaf(x):
    return torch.tensor(x, requires_grad=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["CrossEntropyLoss", "NLLLoss"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(7,), (12, 7), (5, 7, 3), (4, 7, 2, 3)])
def test_losses_of_classes(rng, name, reduction, weighted, shape):
    options = {"reduction": reduction, "ignore_index": 6}
    weight = rng.random(7).astype(np.float32) + 0.5 if weighted else None
    target = rng.integers(0, 7, shape[:1] + shape[2:] if len(shape) > 1 else ())
    check_classes(rng, name, options, weight, array(rng, *shape), target)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(7,), (12, 7), (5, 7, 3)])
@pytest.mark.parametrize("probabilities", [False, True])
def test_every_option_of_cross_entropy(rng, reduction, smoothing, weighted, shape, probabilities):
    options = {"reduction": reduction, "label_smoothing": smoothing}
    weight = rng.random(7).astype(np.float32) + 0.5 if weighted else None
    if probabilities:
        target = rng.random(shape).astype(np.float32)
        target /= target.sum(0 if len(shape) == 1 else 1, keepdims=True)
    else:
        target = rng.integers(0, 7, shape[:1] + shape[2:] if len(shape) > 1 else ())
        if target.ndim:
            target.flat[1] = -100
    check_classes(rng, "CrossEntropyLoss", options, weight, array(rng, *shape), target)


def check_classes(rng, name, options, weight, logits, target):
    ours = getattr(tw.nn, name)(weight, **options)
    theirs = getattr(torch.nn, name)(weight if weight is None else torch.tensor(weight), **options)
    a, b = leaf(logits), torch_leaf(logits)
    la, lb = ours(a, target), theirs(b, torch.tensor(target))
    if torch.isnan(lb).any():  # the one target is ignored
        assert np.isnan(la.numpy())
        return
    same(la, lb)
    dy = array(rng, *la.shape)
    la.backward(dy)
    lb.backward(torch.tensor(dy))
    same(a.grad, b.grad)


@pytest.mark.parametrize(
    "name",
    ["xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_", "trunc_normal_"],
)
def test_initial_weights_have_the_same_spread(name):
    tw.manual_seed(0)
    ours = getattr(tw.nn.init, name)(tw.nn.Parameter(np.empty((300, 200), np.float32)))
    theirs = getattr(torch.nn.init, name)(torch.empty(300, 200))
    assert ours.numpy().std() == pytest.approx(theirs.std().item(), rel=0.02)
    assert np.abs(ours.numpy()).max() == pytest.approx(theirs.abs().max().item(), rel=0.25)


def test_dropout_has_the_same_scale():
    x = np.ones((300, 300), np.float32)
    ours = tw.nn.Dropout(0.3)(x)
    theirs = torch.nn.Dropout(0.3)(torch.tensor(x))
    assert np.unique(ours).tolist() == pytest.approx(np.unique(theirs.numpy()).tolist())
    assert ours.mean() == pytest.approx(theirs.mean().item(), abs=0.02)


def of_floats(rng):
    return [array(rng, 6, 4, 24)]


def of_two(rng):
    return [array(rng, 6, 4, 24), array(rng, 5, 4, 24)]


def of_three(rng):
    return [*of_two(rng), array(rng, 5, 4, 24)]


TRAINED = {
    "Linear": (lambda nn: nn.Linear(24, 24), of_floats),
    "LayerNorm": (lambda nn: nn.LayerNorm((4, 24)), of_floats),
    "RMSNorm": (lambda nn: nn.RMSNorm(24), of_floats),
    "Embedding": (
        lambda nn: nn.Embedding(11, 24, padding_idx=3),
        lambda rng: [rng.integers(0, 11, (6, 4))],
    ),
    "Sequential": (
        lambda nn: nn.Sequential(
            nn.Linear(24, 40), nn.Mish(), nn.RMSNorm(40), nn.Linear(40, 24, bias=False), nn.Tanh()
        ),
        of_floats,
    ),
    "MultiheadAttention": (lambda nn: nn.MultiheadAttention(24, 3), of_three),
    "EncoderLayer": (lambda nn: nn.TransformerEncoderLayer(24, 3, 40, 0.0, "gelu"), of_floats),
    "EncoderLayer, norm first": (
        lambda nn: nn.TransformerEncoderLayer(24, 3, 40, 0.0, norm_first=True),
        of_floats,
    ),
    "DecoderLayer": (lambda nn: nn.TransformerDecoderLayer(24, 3, 40, 0.0), of_two),
    "DecoderLayer, norm first": (
        lambda nn: nn.TransformerDecoderLayer(24, 3, 40, 0.0, norm_first=True),
        of_two,
    ),
}


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_layers_train_alike(rng, name, momentum):
    """20 steps of SGD from the same weights towards the same goal."""
    make, inputs_of = TRAINED[name]
    ours, theirs = make(tw.nn), make(torch.nn)
    adopt(ours, theirs)
    inputs = inputs_of(rng)
    goal = array(rng, 6, 4, 24)
    a = tw.optim.SGD(ours.parameters(), lr=0.1, momentum=momentum)
    b = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=momentum)
    losses = []
    for _ in range(20):
        y, z = ours(*inputs), theirs(*(torch.tensor(x) for x in inputs))
        if isinstance(y, tuple):
            y, z = y[0], z[0]
        loss = tw.nn.HuberLoss()(y, goal)
        other = torch.nn.HuberLoss()(z, torch.tensor(goal))
        assert loss.item() == pytest.approx(other.item(), rel=2e-5)
        losses.append(loss.item())
        for optimizer, value in ((a, loss), (b, other)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    assert losses[-1] < losses[0]
    state = theirs.state_dict()
    for key, p in ours.state_dict().items():
        same(p, state[key], 1e-4)


def test_gpt_step_by_step(rng):
    """The whole model and its training, against the same one written with torch's layers."""
    config = tw.models.GPTConfig(vocab_size=37, context=24, layers=2, heads=3, width=48)
    model = tw.models.GPT(config, seed=1)
    weights = {
        name: torch.tensor(value.copy(), requires_grad=True)
        for name, value in model.state_dict().items()
    }
    ids, targets = rng.integers(0, 37, (2, 4, 24))
    ours = tw.optim.AdamW(model.parameters(), lr=1e-2)
    theirs = torch.optim.AdamW(weights.values(), lr=1e-2)
    for _ in range(5):
        ours.zero_grad()
        theirs.zero_grad()
        loss, other = model.loss(ids, targets), torch_loss(weights, config, ids, targets)
        assert loss.item() == pytest.approx(other.item(), rel=1e-4)
        loss.backward()
        other.backward()
        for name, p in model.named_parameters():
            grad = weights[name].grad.numpy()
            assert np.abs(p.grad - grad).max() <= 2e-3 * np.abs(grad).max() + 1e-7, name
        ours.step()
        theirs.step()


def torch_loss(w, config, ids, targets):
    ids, targets = torch.tensor(ids), torch.tensor(targets)
    B, T = ids.shape
    x = w["token.weight"][ids] + w["position.weight"][:T]

    def norm(x, name):
        return F.layer_norm(x, (config.width,), w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    for i in range(config.layers):
        b = f"blocks.{i}"
        q, k, v = (
            part.reshape(B, T, config.heads, -1).transpose(1, 2)
            for part in linear(norm(x, f"{b}.ln1"), f"{b}.qkv").split(config.width, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(y.transpose(1, 2).reshape(B, T, -1), f"{b}.proj")
        h = F.gelu(linear(norm(x, f"{b}.ln2"), f"{b}.up"), approximate="tanh")
        x = x + linear(h, f"{b}.down")
    logits = norm(x, "ln") @ w["token.weight"].T
    return F.cross_entropy(logits.reshape(-1, config.vocab_size), targets.reshape(-1))


# Ops ---------------------------------------------------------------------------------------------


def same_op(ours, theirs, *arrays, tolerance=2e-5):
    """Values, and gradients of every array."""
    a, b = [leaf(x) for x in arrays], [torch_leaf(x) for x in arrays]
    ya, yb = ours(*a), theirs(*b)
    same(ya, yb, tolerance)
    dy = np.asarray(np.random.default_rng(7).standard_normal(ya.shape), np.float32)
    ya.backward(dy)
    yb.backward(torch.tensor(dy))
    for x, z in zip(a, b, strict=True):
        same(x.grad, z.grad, tolerance)


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_rmsnorm_op(rng, eps):
    same_op(
        lambda x, w: tw.rmsnorm(x, w, eps=eps),
        lambda x, w: F.rms_norm(x, (33,), w, eps),
        array(rng, 4, 5, 33), array(rng, 33),
    )  # fmt: skip


@pytest.mark.parametrize("axis", [-1, 0, 1])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmaxes(rng, name, axis):
    same_op(
        lambda x: getattr(tw, name)(x, axis), lambda x: getattr(F, name)(x, axis),
        5 * array(rng, 6, 7, 9),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_tanh_and_sigmoid(rng, name):
    same_op(getattr(tw, name), getattr(torch, name), 4 * array(rng, 9, 37))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_mse_op(rng, reduction):
    same_op(
        lambda x, y: tw.mse(x, y, reduction=reduction),
        lambda x, y: F.mse_loss(x, y, reduction=reduction),
        array(rng, 9, 37), array(rng, 9, 37),
    )  # fmt: skip


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_op(rng, interleaved):
    """Against complex products; the halves also as Hugging Face's rotate_half writes them."""
    x, angles = array(rng, 2, 3, 5, 16), array(rng, 5, 8)
    cos, sin = np.cos(angles), np.sin(angles)
    turn = torch.polar(torch.ones(5, 8), torch.tensor(angles))

    def theirs(x):
        if interleaved:
            pairs = torch.view_as_complex(x.reshape(2, 3, 5, 8, 2))
            return torch.view_as_real(pairs * turn).reshape(x.shape)
        c, s = (torch.cat([torch.tensor(t)] * 2, -1) for t in (cos, sin))
        return x * c + torch.cat([-x[..., 8:], x[..., :8]], -1) * s

    same_op(lambda x: tw.rope(x, cos, sin, interleaved=interleaved), theirs, x)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["ids", "ignored", "probabilities"])
def test_cross_entropy_op(rng, kind, weighted, smoothing, reduction):
    target = rng.integers(0, 7, 12)
    if kind == "ignored":
        target[::3] = -100
    if kind == "probabilities":
        p = rng.random((12, 7)).astype(np.float32)
        target = p / p.sum(-1, keepdims=True)
    weight = rng.random(7).astype(np.float32) + 0.5 if weighted else None
    options = {"reduction": reduction, "label_smoothing": smoothing}
    theirs_weight = None if weight is None else torch.tensor(weight)
    same_op(
        lambda x: tw.cross_entropy(x, target, weight=weight, **options),
        lambda x: F.cross_entropy(x, torch.tensor(target), theirs_weight, **options),
        3 * array(rng, 12, 7),
    )  # fmt: skip
