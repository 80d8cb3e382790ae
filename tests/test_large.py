"""Outputs of 64 MiB and more are written past the caches: the same bits, wherever they begin."""

from __future__ import annotations

import numpy as np
import pytest

import tilewright as tw

ROWS, WIDTH = 4099, 4112  # 64.3 MiB of float32; a row is whole vectors on every level


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).standard_normal((ROWS, WIDTH), np.float32)


def fresh(shift):
    """Memory like x, `shift` elements behind a multiple of 64 bytes."""
    memory = np.full(ROWS * WIDTH + 32, np.nan, np.float32)
    start = -memory.__array_interface__["data"][0] // 4 % 16 + shift
    return memory, memory[start : start + ROWS * WIDTH].reshape(ROWS, WIDTH)


def gelu_gradient(x, out):
    t = tw.tensor(x, requires_grad=True)
    tw.gelu(t).backward(x)
    out[...] = t.grad
    return out


OPS = {
    "relu": lambda x, out: tw.relu(x, out=out),
    "silu": lambda x, out: tw.silu(x, out=out),
    "gelu gradient": gelu_gradient,
    "layernorm": lambda x, out: tw.layernorm(x, x[0], x[1], out=out),
    "rmsnorm": lambda x, out: tw.rmsnorm(x, x[0], out=out),
}


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("name", OPS)
def test_large_outputs_have_the_bits_of_small_ones(name, shift, x, isa):
    op = OPS[name]
    memory, out = fresh(shift)
    op(x, out)
    gamma = x[:2]
    for first in range(2, ROWS, 1024):  # the first rows are the vectors of the norms
        piece = np.concatenate([gamma, x[first : first + 1024]])
        want = op(piece, np.empty_like(piece))[2:]
        assert np.array_equal(out[first : first + 1024], want)
    assert np.isnan(memory).sum() == 32
