"""Modules on a device: what they give there, and every gradient, is what they give on the CPU.

Collected only where TILEWRIGHT_EMULATED names an emulated extension (README.md).
"""

from __future__ import annotations

import numpy as np
import pytest

import emulated
import harness
import on_device
import tilewright as tw
from tilewright import nn

F32 = np.float32
B, T, S, E = 2, 5, 6, 8
LATER = np.triu(np.ones((T, T), bool), 1)
PADDED = np.arange(S) >= np.array([[S], [4]])


@pytest.fixture(autouse=True)
def _ops_are_the_users():
    with on_device.left_alone():
        yield


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(F32)


def uniform(*shape):
    return np.random.default_rng(0).uniform(0.1, 0.9, shape).astype(F32)


def ids(*shape, below=7):
    return np.random.default_rng(0).integers(0, below, shape)


def runs_alike(make, *inputs, **options):
    """The module's outputs and gradients on the device, held to those on the CPU."""

    def run(device):
        tw.manual_seed(3)
        module = make().to(device)
        given = [tw.tensor(x, device=device, requires_grad=x.dtype == F32) for x in inputs]
        y = module(*given, **options)
        y = y[0] if isinstance(y, tuple) else y
        dy = np.random.default_rng(1).standard_normal(y.shape).astype(F32)
        y.backward(tw.tensor(dy, device=device).data)
        leaves = [*given, *module.parameters()]
        assert all(t.device == device for t in (y, *leaves))
        return [y.numpy(), *(tw.tensor(t.grad).numpy() for t in leaves if t.grad is not None)]

    here, there = run("cpu"), run("emulated")
    assert len(here) == len(there) > 1
    for got, want in zip(there, here, strict=True):
        harness.close(got, want)


POINTWISE = [
    *(nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU),
    *(nn.Softplus, nn.Hardswish, nn.Mish, nn.ReLU6, nn.Hardtanh, nn.Hardsigmoid, nn.LogSigmoid),
    *(nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink, nn.PReLU, nn.GLU),
]  # fmt: skip


@pytest.mark.parametrize("kind", POINTWISE, ids=lambda kind: kind.__name__)
def test_activations(kind):
    runs_alike(kind, normal(3, 8))


def test_activations_with_options():
    runs_alike(lambda: nn.Threshold(0.1, 20.0), normal(3, 8))
    for kind in (nn.Softmax, nn.LogSoftmax, nn.Softmin):
        runs_alike(lambda kind=kind: kind(-1), normal(3, 8))
    runs_alike(lambda: nn.PReLU(8), normal(3, 8))


LOSSES = {
    "mse": (nn.MSELoss, normal(4, 5), normal(4, 5)),
    "l1": (nn.L1Loss, normal(4, 5), normal(4, 5)),
    "huber": (nn.HuberLoss, normal(4, 5), normal(4, 5)),
    "smooth l1": (nn.SmoothL1Loss, normal(4, 5), normal(4, 5)),
    "bce": (nn.BCELoss, uniform(4, 5), uniform(4, 5)),
    "bce of logits": (
        lambda: nn.BCEWithLogitsLoss(pos_weight=uniform(5)), normal(4, 5), uniform(4, 5)
    ),
    "kl": (nn.KLDivLoss, normal(4, 5), uniform(4, 5)),
    "nll": (lambda: nn.NLLLoss(uniform(5)), normal(4, 5), ids(4, below=5)),
    "cross entropy": (lambda: nn.CrossEntropyLoss(uniform(5)), normal(4, 5), ids(4, below=5)),
    "with places": (
        lambda: nn.CrossEntropyLoss(label_smoothing=0.1), normal(2, 5, 3), ids(2, 3, below=5)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    runs_alike(*LOSSES[name])


LAYERS = {
    "linear": (lambda: nn.Linear(E, 5), normal(3, E)),
    "embedding": (lambda: nn.Embedding(7, E, padding_idx=2), ids(3, 4)),
    "layernorm": (lambda: nn.LayerNorm(E), normal(3, E)),
    "rmsnorm": (lambda: nn.RMSNorm(E), normal(3, E)),
    "dropout": (lambda: nn.Dropout(0.3), normal(3, E)),
    "sequential": (lambda: nn.Sequential(nn.Linear(E, 6), nn.ReLU()), normal(3, E)),
    "sinusoidal": (lambda: nn.SinusoidalPositionalEncoding(E), normal(T, B, E)),
    "rotary": (lambda: nn.RotaryEmbedding(E), normal(B, 2, T, E)),
    "transformer": (
        lambda: nn.Transformer(E, 2, 1, 1, 16, dropout=0.0, batch_first=True),
        normal(B, S, E), normal(B, T, E),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    runs_alike(*LAYERS[name])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attn_mask": LATER},
        {"attn_mask": np.where(LATER, F32(-np.inf), F32(0.5))},
        {"is_causal": True, "need_weights": True},
        {"is_causal": True, "attn_mask": LATER},
    ],
)
@pytest.mark.parametrize(
    "more", [{}, {"bias": False}, {"add_zero_attn": True, "add_bias_kv": True}]
)
def test_self_attention(options, more):
    """Masks may be NumPy's: they go where the queries are."""

    class OfOne(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(E, 2, batch_first=True, **more)

        def forward(self, x):
            return self.attention(x, x, x, **options)

    runs_alike(OfOne, normal(B, T, E))


@pytest.mark.parametrize("on_cpu", [True, False])
def test_padded_keys(on_cpu):
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(E, 2, batch_first=True)

        def forward(self, q, kv):
            padded = PADDED if on_cpu or q.device == "cpu" else emulated.to_device(PADDED)
            return self.attention(q, kv, kv, key_padding_mask=padded)

    runs_alike(Padded, normal(B, T, E), normal(B, S, E))


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_linear(bits):
    layer = nn.Linear(32, 5)
    x = normal(3, 32)
    here = nn.QuantizedLinear.from_linear(layer, bits=bits)
    want = here(tw.tensor(x)).numpy()
    got = here.to("emulated")(tw.tensor(x, device="emulated"))
    assert got.device == "emulated"
    harness.close(got.numpy(), want)
