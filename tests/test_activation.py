"""Activations as modules: values, gradients, far and non-finite inputs, and what they refuse."""

import math

import ml_dtypes
import numpy as np
import pytest

import tilewright as tw
from harness import agrees, close
from tilewright import nn

bf16 = ml_dtypes.bfloat16


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def softplus(x, beta=1.0):
    return np.logaddexp(0, beta * x) / beta


# A standard normal z has mean 0 and variance 1 after it; Klambauer et al., equation 14.
TAIL, ROOT = math.erfc(math.sqrt(0.5)), math.sqrt(math.e)
SELU_ALPHA = math.sqrt(2 / math.pi) / (1 - TAIL * ROOT)
SELU_SCALE = (1 - TAIL * ROOT) * math.sqrt(
    2
    * math.pi
    / (
        2 * math.erfc(math.sqrt(2)) * math.e**2
        + math.pi * TAIL**2 * math.e
        - 2 * (2 + math.pi) * TAIL * ROOT
        + math.pi
        + 2
    )
)


DEFINITIONS = [
    (nn.ReLU(), lambda x: np.maximum(x, 0)),
    (nn.GELU(), gelu),
    (nn.GELU("tanh"), gelu_tanh),
    (nn.GELU(approximate="tanh"), gelu_tanh),
    (nn.SiLU(), lambda x: x / (1 + np.exp(-x))),
    (nn.Tanh(), np.tanh),
    (nn.Sigmoid(), lambda x: 1 / (1 + np.exp(-x))),
    (nn.Softmax(-1), softmax),
    (nn.Softmax(dim=0), lambda x: softmax(x, 0)),
    (nn.LogSoftmax(-1), lambda x: np.log(softmax(x))),
    (nn.LogSoftmax(dim=0), lambda x: np.log(softmax(x, 0))),
    (nn.LeakyReLU(), lambda x: np.where(x > 0, x, 0.01 * x)),
    (nn.LeakyReLU(0.3), lambda x: np.where(x > 0, x, 0.3 * x)),
    (nn.ELU(), lambda x: np.where(x > 0, x, np.expm1(x))),
    (nn.ELU(0.4), lambda x: np.where(x > 0, x, 0.4 * np.expm1(x))),
    (nn.Softplus(), softplus),
    (nn.Softplus(beta=3.0), lambda x: softplus(x, 3.0)),
    (nn.Softplus(threshold=1.0), lambda x: np.where(x > 1, x, softplus(x))),
    (nn.Hardswish(), lambda x: x * np.clip(x + 3, 0, 6) / 6),
    (nn.Mish(), lambda x: x * np.tanh(softplus(x))),
    (nn.Softmin(-1), lambda x: softmax(-x)),
    (nn.Softmin(dim=0), lambda x: softmax(-x, 0)),
    (nn.CELU(), lambda x: np.where(x > 0, x, np.expm1(x))),
    (nn.CELU(0.4), lambda x: np.where(x > 0, x, 0.4 * np.expm1(x / 0.4))),
    (nn.SELU(), lambda x: SELU_SCALE * np.where(x > 0, x, SELU_ALPHA * np.expm1(x))),
    (nn.ReLU6(), lambda x: np.clip(x, 0, 6)),
    (nn.Hardtanh(), lambda x: np.clip(x, -1, 1)),
    (nn.Hardtanh(-0.3, max_val=2.5), lambda x: np.clip(x, -0.3, 2.5)),
    (nn.Hardsigmoid(), lambda x: np.clip(x / 6 + 0.5, 0, 1)),
    (nn.LogSigmoid(), lambda x: -softplus(-x)),
    (nn.Softsign(), lambda x: x / (1 + abs(x))),
    (nn.Threshold(0.7, -2.0), lambda x: np.where(x > 0.7, x, -2)),
    (nn.Hardshrink(), lambda x: np.where(abs(x) > 0.5, x, 0)),
    (nn.Softshrink(1.5), lambda x: np.sign(x) * np.maximum(abs(x) - 1.5, 0)),
    (nn.Tanhshrink(), lambda x: x - np.tanh(x)),
]


def shown(parameter):
    """As a test's name has it: the same in each process."""
    return repr(parameter)[:30] if isinstance(parameter, nn.Module) else None


@pytest.mark.parametrize(("layer", "definition"), DEFINITIONS, ids=shown)
def test_values_and_gradients(rng, layer, definition):
    agrees(layer, definition, (3 * rng.standard_normal((5, 37))).astype(np.float32))


@pytest.mark.parametrize(("layer", "definition"), DEFINITIONS, ids=shown)
def test_bfloat16_in_and_out(rng, layer, definition):
    x = (3 * rng.standard_normal((5, 37))).astype(bf16)
    y = layer(tw.tensor(x, requires_grad=True))
    assert y.dtype == bf16
    close(y.numpy(), definition(x.astype(float)), 2**-7)
    y.sum().backward()
    assert layer(x[:0]).shape == (0, 37)


WITHOUT_KERNELS = [nn.LeakyReLU(), nn.ELU(), nn.Softplus(), nn.Hardswish(), nn.Mish()]
WITHOUT_KERNELS += [nn.CELU(0.5), nn.PReLU(), nn.Hardshrink(), nn.Threshold(0.0, -1.0)]
BOUNDED = {  # the values at -inf and inf
    nn.ReLU6(): (0, 6),
    nn.Hardtanh(): (-1, 1),
    nn.Hardsigmoid(): (0, 1),
    nn.Softsign(): (-1, 1),
}


@pytest.mark.parametrize("layer", WITHOUT_KERNELS, ids=repr)
def test_far_away_and_nan(layer):
    """No overflow far out: neither in the value nor, times its gradient, as NaN."""
    x = tw.tensor([-1e30, -200.0, 0.0, 200.0, 1e30, np.nan], requires_grad=True)
    y = layer(x)
    assert y.numpy()[3:5] == pytest.approx([200.0, 1e30])
    assert np.isfinite(y.numpy()[:5]).all()
    y.sum().backward()
    assert x.grad[3:5].tolist() == [1.0, 1.0]
    assert np.isfinite(x.grad[:5]).all()
    assert np.isnan(y.numpy()[5])


@pytest.mark.parametrize(("layer", "ends"), BOUNDED.items(), ids=repr)
def test_bounded_ones_far_away(layer, ends):
    x = tw.tensor([-1e30, 1e30, np.nan], requires_grad=True)
    y = layer(x)
    assert y.numpy()[:2].tolist() == list(ends)
    assert np.isnan(y.numpy()[2])
    y.sum().backward()
    assert x.grad[:2].tolist() == [0, 0]


def test_log_sigmoid_far_away():
    x = tw.tensor([-1e30, -200.0, 200.0, 1e30], requires_grad=True)
    y = nn.LogSigmoid()(x)
    assert y.numpy() == pytest.approx([-1e30, -200.0, 0.0, 0.0])
    y.sum().backward()
    assert x.grad.tolist() == pytest.approx([1, 1, 0, 0])


@pytest.mark.parametrize(
    ("edge", "layer"),
    [(-1.0, nn.Hardtanh()), (1.0, nn.Hardtanh()), (6.0, nn.ReLU6()), (0.5, nn.Softshrink())],
)
def test_no_slope_at_the_edge(edge, layer):
    x = tw.tensor([edge], requires_grad=True)
    layer(x).sum().backward()
    assert x.grad[0] == 0


@pytest.mark.parametrize("shape", [(8,), (4, 6), (2, 6, 3, 5), (2, 3, 7)])
def test_glu(shape, rng):
    for dim in [d for d, n in enumerate(shape) if n % 2 == 0]:

        def definition(x, dim=dim):
            a, b = np.split(x, 2, dim)
            return a / (1 + np.exp(-b))

        x = rng.standard_normal(shape).astype(np.float32)
        for layer in (nn.GLU(dim), nn.GLU(dim - len(shape))):
            agrees(layer, definition, x)
    with pytest.raises(tw.ShapeError, match=r"GLU: x must have an even axis 0 .*\(3,\)"):
        nn.GLU(0)(x.ravel()[:3])
    with pytest.raises(tw.ShapeError, match="GLU: x must have an even axis 4"):
        nn.GLU(4)(x)


@pytest.mark.parametrize("dtype", [np.float32, bf16])
@pytest.mark.parametrize(
    ("channels", "shape"),
    [(1, (7,)), (1, ()), (1, (4, 5)), (5, (4, 5)), (3, (2, 3, 4)), (1, (0, 2))],
)
def test_prelu(channels, shape, dtype, rng):
    layer = nn.PReLU(channels, init=0.3)
    layer.weight.data[:] += np.arange(channels, dtype=np.float32)
    x = rng.standard_normal(shape).astype(dtype)
    weight = layer.weight.numpy().astype(float)

    def definition(x, w):
        if x.ndim > 1:
            w = np.broadcast_to(w, x.shape[1]).reshape(-1, *[1] * (x.ndim - 2))
        return np.where(x > 0, x, w * x) if x.ndim else np.where(x > 0, x, w[0] * x)

    close(layer(x), definition(x.astype(float), weight), 2**-7 if dtype == bf16 else 1e-6)
    assert layer(x).dtype == dtype
    if dtype == np.float32:

        def run(x, w):
            layer.weight = w
            return layer(x)

        agrees(run, definition, x, weight.astype(np.float32))


def test_prelu_wants_its_channels():
    with pytest.raises(tw.ShapeError, match=r"PReLU: x must have 3 channels in axis 1 .*\(4, 5\)"):
        nn.PReLU(3)(np.ones((4, 5), np.float32))
    layer = nn.PReLU(2)
    assert [n for n, _ in layer.named_parameters()] == ["weight"]
    assert layer.weight.numpy().tolist() == [0.25, 0.25]
    layer(tw.tensor([[0.0, -2.0]])).sum().backward()
    assert layer.weight.grad.tolist() == [0.0, -2.0]


def test_what_they_refuse():
    with pytest.raises(ValueError, match="max_val must be above min_val 1"):
        nn.Hardtanh(1.0, 1.0)
    with pytest.raises(ValueError, match="Softshrink: lambd must not be negative"):
        nn.Softshrink(-0.1)
    with pytest.raises(ValueError, match="CELU: alpha must not be 0"):
        nn.CELU(0)
    with pytest.raises(ValueError, match="approximate"):
        nn.GELU("none of them")
    with pytest.raises(tw.DtypeError, match="float64"):
        nn.ELU()(np.zeros(3))
    with pytest.raises(tw.ShapeError, match="axis"):
        nn.Softmax(2)(np.zeros((3, 4), np.float32))
