"""Answers in float64, written apart from the ops' own references; the check before any timing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

# A wrong kernel is off by far more than this share of the largest element, float32 rounding by far
# less. How exact each op must be is the tests' business (tests/tolerance.py).
TOLERANCE = 1e-4
TOLERANCES = {"bfloat16": 2.0**-7}  # of results of 8 bits
BF16_GRADIENTS = 2.0**-5  # where engines round what lies between two products to 8 bits as well


class WrongAnswer(Exception):
    """An engine's answer is not the float64 one."""


def check(
    engine: str,
    got: Sequence[Any],
    want: Sequence[Any],
    dtype: str = "float32",
    tolerance: float | None = None,
) -> None:
    """Compare every array with the oracle's: integers exactly, floats against the largest element.

    Raises:
        WrongAnswer: naming engine, output, place, both values.
    """
    if len(got) != len(want):
        raise WrongAnswer(f"{engine}: {len(got)} arrays, expected {len(want)}")
    for number, (g, w) in enumerate(zip(got, want, strict=True)):
        g = np.asarray(g)
        if g.shape != w.shape:
            raise WrongAnswer(f"{engine}: output {number} has shape {g.shape}, expected {w.shape}")
        exact = np.issubdtype(w.dtype, np.integer)
        share = tolerance or TOLERANCES.get(dtype, TOLERANCE)
        allowed = 0.0 if exact else share * float(np.max(np.abs(w), initial=0.0))
        error = np.abs(np.subtract(g, w, dtype=np.float64))
        if not np.all(error <= allowed):  # so written that NaN fails
            place = np.unravel_index(np.argmax(np.nan_to_num(error, nan=np.inf)), w.shape)
            at = tuple(int(i) for i in place)
            raise WrongAnswer(
                f"{engine}: output {number} at {at} is {g[place]!s}, expected {w[place]!s} "
                f"(allowed error {allowed:.2g})"
            )


def gelu(x: Any) -> Any:
    """Return x Φ(x)."""
    return x * _normal_distribution(x)


def gelu_grad(x: Any, dy: Any) -> list[Any]:
    """[y, dx]."""
    below = _normal_distribution(x)
    density = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return [x * below, dy * (below + x * density)]


def _normal_distribution(x: Any) -> Any:
    erf = np.fromiter(map(math.erf, (x / math.sqrt(2)).ravel()), np.float64, x.size)
    return 0.5 * (1.0 + erf.reshape(x.shape))


def softmax(x: Any) -> Any:
    """Over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def softmax_grad(x: Any, dy: Any) -> list[Any]:
    """[y, dx]."""
    y = softmax(x)
    return [y, y * (dy - (dy * y).sum(axis=-1, keepdims=True))]


def rmsnorm(x: Any, gamma: Any, eps: float = 1e-6) -> Any:
    """Over the last axis."""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * gamma


def rmsnorm_grad(x: Any, gamma: Any, dy: Any, eps: float = 1e-6) -> list[Any]:
    """[y, dx, dgamma]."""
    rstd = 1.0 / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)
    xhat, g = x * rstd, dy * gamma
    dx = rstd * (g - xhat * (g * xhat).mean(axis=-1, keepdims=True))
    return [xhat * gamma, dx, (dy * xhat).sum(axis=0)]


def mse_grad(x: Any, y: Any) -> list[Any]:
    """[mean loss, dx, dy]."""
    dx = 2.0 * (x - y) / x.size
    return [np.asarray(np.mean((x - y) ** 2)), dx, -dx]


def rope(x: Any, cos: Any, sin: Any) -> Any:
    """Pairs of halves as complex numbers, turned."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * (cos.astype(float) + 1j * sin)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def dropout(x: Any, p: float, seed: int) -> Any:
    """Kept where the element's word of Philox4x32-10 says so."""
    blocks: Any = np.arange(-(-x.size // 4)).astype(np.uint64)
    a, b, c, d = blocks & 0xFFFFFFFF, blocks >> 32, 0 * blocks, 0 * blocks
    for n in range(10):
        low = (seed + n * 0x9E3779B9) & 0xFFFFFFFF
        high = ((seed >> 32) + n * 0xBB67AE85) & 0xFFFFFFFF
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b = second >> 32 ^ b ^ low, second & 0xFFFFFFFF
        c, d = first >> 32 ^ d ^ high, first & 0xFFFFFFFF
    words = np.stack([a, b, c, d], axis=-1).ravel()[: x.size].reshape(x.shape)
    return np.where(words >= round(p * 2**32), x / (1 - p), 0.0)


def layernorm(x: Any, gamma: Any, beta: Any, dy: Any = None, eps: float = 1e-5) -> list[Any]:
    """[y], or [y, dx, dgamma, dbeta]."""
    centred = x - x.mean(axis=-1, keepdims=True)
    rstd = 1.0 / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    xhat = centred * rstd
    y = xhat * gamma + beta
    if dy is None:
        return [y]
    g = dy * gamma
    dx = g - g.mean(axis=-1, keepdims=True) - xhat * (g * xhat).mean(axis=-1, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    return [y, rstd * dx, (dy * xhat).sum(axis=rows), dy.sum(axis=rows)]


def add_layernorm(x: Any, residual: Any, gamma: Any, beta: Any, dy: Any) -> list[Any]:
    """[y, dx, dresidual, dgamma, dbeta], y the norm of the sum."""
    y, ds, dgamma, dbeta = layernorm(x + residual, gamma, beta, dy)
    return [y, ds, ds, dgamma, dbeta]


def attention(q: Any, k: Any, v: Any, causal: bool, do: Any = None) -> list[Any]:
    """[o], or [o, dq, dk, dv]; one head at a time, so that long sequences fit."""
    out = [np.empty(q.shape)] + ([] if do is None else [np.empty(x.shape) for x in (q, k, v)])
    group = q.shape[1] // k.shape[1]
    hidden = np.triu(np.ones((q.shape[2], k.shape[2]), bool), 1 + k.shape[2] - q.shape[2])
    scale = 1.0 / math.sqrt(q.shape[3])
    for b, h in np.ndindex(q.shape[:2]):
        qh, kh, vh = (
            q[b, h].astype(float),
            k[b, h // group].astype(float),
            v[b, h // group].astype(float),
        )
        scores = qh @ kh.T * scale
        if causal:
            scores[hidden] = -np.inf
        p = softmax(scores)
        out[0][b, h] = p @ vh
        if do is not None:
            doh = do[b, h].astype(float)
            dp = doh @ vh.T
            ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) * scale
            out[1][b, h], out[2][b, h], out[3][b, h] = ds @ kh, ds.T @ qh, p.T @ doh
    return out


def cross_entropy(logits: Any, target: Any) -> list[Any]:
    """[mean loss, dlogits]."""
    p = softmax(logits)
    rows = np.arange(len(target))
    loss = -np.log(p[rows, target]).mean()
    p[rows, target] -= 1.0
    return [np.asarray(loss), p / len(target)]


def adamw_first_step(
    p: Any, g: Any, *, lr: float, betas: Any, eps: float, weight_decay: float
) -> Any:
    """The parameter after it: both means are corrected to g and g squared."""
    return p * (1 - lr * weight_decay) - lr * g / (np.abs(g) + eps)
