"""Attention's options against PyTorch's flex_attention, and gradients against its autograd."""

import numpy as np
import pytest

import tilewright as tw

torch = pytest.importorskip("torch", reason="torch is not installed: parity is not checked")
flex = pytest.importorskip("torch.nn.attention.flex_attention")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning:torch")]


def score_mod(Tq, Tk, causal=False, window=(-1, -1), softcap=None, alibi_slopes=None):
    """The options as flex_attention wants them: a function of one score and its place."""
    left, right = window
    slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float64)

    def modify(score, b, h, i, j):
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        behind = i + Tk - Tq - j
        if slopes is not None:
            score = score - slopes[h] * abs(behind)
        hidden = behind < (0 if causal else -right if right >= 0 else -Tk - Tq)
        if left >= 0:
            hidden = hidden | (behind > left)
        return torch.where(hidden, -torch.inf, score)

    return modify


SLOPES = np.exp2(-np.arange(1, 5, dtype=np.float32))
OPTIONS = [
    {"causal": True},
    {"window": (7, 3)},
    {"window": (20, -1), "causal": True},
    {"softcap": 2.0},
    {"alibi_slopes": SLOPES, "causal": True},
    {"softcap": 1.0, "alibi_slopes": SLOPES, "window": (30, 1)},
]


@pytest.mark.parametrize(("Tq", "Tk"), [(33, 33), (2, 150), (40, 90)])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o))
def test_options(rng, options, Tq, Tk):
    arrays = [
        rng.standard_normal(shape, dtype=np.float32)
        for shape in ((2, 4, Tq, 16), (2, 2, Tk, 16), (2, 2, Tk, 16))
    ]
    dy = rng.standard_normal((2, 4, Tq, 16), dtype=np.float32)
    ours = [tw.tensor(x, requires_grad=True) for x in arrays]
    theirs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in arrays]
    y = tw.attention(*ours, **options)
    y.backward(dy)
    modify = score_mod(Tq, Tk, **options)
    detached = (x.detach() for x in theirs)  # flex_attention has no backward on the CPU
    z = flex.flex_attention(*detached, score_mod=modify, enable_gqa=True)
    np.testing.assert_allclose(y.data, z.numpy(), rtol=2e-5, atol=2e-5)
    q, k, v = theirs[0], *(x.repeat_interleave(2, dim=1) for x in theirs[1:])
    heads, rows, keys = (torch.arange(n) for n in (4, Tq, Tk))
    scores = modify(q @ k.mT / 4, None, heads[:, None, None], rows[:, None], keys)
    (torch.softmax(scores, -1) @ v).backward(torch.tensor(dy, dtype=torch.float64))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.grad, b.grad.numpy(), rtol=1e-4, atol=1e-4)
