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
]


@pytest.mark.parametrize(("layer", "definition"), DEFINITIONS, ids=lambda p: repr(p)[:30])
def test_values_and_gradients(rng, layer, definition):
    agrees(layer, definition, (3 * rng.standard_normal((5, 37))).astype(np.float32))


@pytest.mark.parametrize(("layer", "definition"), DEFINITIONS, ids=lambda p: repr(p)[:30])
def test_bfloat16_in_and_out(rng, layer, definition):
    x = (3 * rng.standard_normal((5, 37))).astype(bf16)
    y = layer(tw.tensor(x, requires_grad=True))
    assert y.dtype == bf16
    close(y.numpy(), definition(x.astype(float)), 2**-7)
    y.sum().backward()
    assert layer(x[:0]).shape == (0, 37)


WITHOUT_KERNELS = [nn.LeakyReLU(), nn.ELU(), nn.Softplus(), nn.Hardswish(), nn.Mish()]


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


def test_what_they_refuse():
    with pytest.raises(ValueError, match="approximate"):
        nn.GELU("none of them")
    with pytest.raises(tw.DtypeError, match="float64"):
        nn.ELU()(np.zeros(3))
    with pytest.raises(tw.ShapeError, match="axis"):
        nn.Softmax(2)(np.zeros((3, 4), np.float32))
