"""Initial weights: each function fills a parameter in place and returns it; PyTorch's names.

    xavier    keeps the variance of activations and gradients alike  (Glorot & Bengio 2010)
    kaiming   keeps it through layers of ReLU                        (He et al. 2015)

Fans are those of an (out, in) weight: fan_in = in, fan_out = out.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tilewright import random
from tilewright.autograd import Tensor
from tilewright.errors import ShapeError

_GAINS = {"linear": 1.0, "sigmoid": 1.0, "tanh": 5.0 / 3.0, "relu": math.sqrt(2.0)}


def calculate_gain(nonlinearity: str, param: float = 0.01) -> float:
    """The factor by which a layer before this nonlinearity is to be larger than a linear one."""
    if nonlinearity == "leaky_relu":
        return math.sqrt(2.0 / (1.0 + param**2))
    if nonlinearity not in _GAINS:
        known = ", ".join([*_GAINS, "leaky_relu"])
        raise ValueError(f"init: nonlinearity must be one of {known}, got {nonlinearity!r}")
    return _GAINS[nonlinearity]


def uniform_(t: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform in [low, high)."""
    return _fill(t, random.generator().random(t.shape, np.float32) * (high - low) + low)


def normal_(t: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Normal with the given mean and standard deviation."""
    return _fill(t, random.generator().standard_normal(t.shape, np.float32) * std + mean)


def trunc_normal_(
    t: Tensor, mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0
) -> Tensor:
    """Normal, but what falls outside of [a, b] is drawn again: at most 99 in 100."""
    share = (math.erf((b - mean) / std * 0.5**0.5) - math.erf((a - mean) / std * 0.5**0.5)) / 2
    if not share >= 0.01:
        raise ValueError(f"init: [a, b] must hold a hundredth of the curve, got {a}, {b}: {share}")
    generator = random.generator()
    drawn = generator.standard_normal(t.shape, np.float32) * std + mean
    while (outside := (drawn < a) | (drawn > b)).any():
        drawn[outside] = generator.standard_normal(int(outside.sum()), np.float32) * std + mean
    return _fill(t, drawn)


def constant_(t: Tensor, val: float) -> Tensor:
    """One number everywhere."""
    return _fill(t, val)


def zeros_(t: Tensor) -> Tensor:
    """0 everywhere."""
    return _fill(t, 0.0)


def ones_(t: Tensor) -> Tensor:
    """1 everywhere."""
    return _fill(t, 1.0)


def xavier_uniform_(t: Tensor, gain: float = 1.0) -> Tensor:
    """Uniform within gain * sqrt(6 / (fan_in + fan_out))."""
    bound = gain * math.sqrt(6.0 / sum(_fans(t)))
    return uniform_(t, -bound, bound)


def xavier_normal_(t: Tensor, gain: float = 1.0) -> Tensor:
    """Normal with the standard deviation gain * sqrt(2 / (fan_in + fan_out))."""
    return normal_(t, 0.0, gain * math.sqrt(2.0 / sum(_fans(t))))


def kaiming_uniform_(
    t: Tensor, a: float = 0.0, mode: str = "fan_in", nonlinearity: str = "leaky_relu"
) -> Tensor:
    """Uniform within gain * sqrt(3 / fan); a is leaky_relu's slope."""
    bound = math.sqrt(3.0) * calculate_gain(nonlinearity, a) / math.sqrt(_fan(t, mode))
    return uniform_(t, -bound, bound)


def kaiming_normal_(
    t: Tensor, a: float = 0.0, mode: str = "fan_in", nonlinearity: str = "leaky_relu"
) -> Tensor:
    """Normal with the standard deviation gain / sqrt(fan); a is leaky_relu's slope."""
    return normal_(t, 0.0, calculate_gain(nonlinearity, a) / math.sqrt(_fan(t, mode)))


def _fill(t: Tensor, values: Any) -> Tensor:
    t.data[...] = values
    t.mark_written()
    return t


def _fans(t: Tensor) -> tuple[int, int]:
    if t.ndim < 2:
        raise ShapeError(f"init: the weight must have 2 axes or more, got shape {t.shape}")
    field = math.prod(t.shape[2:])
    return max(1, t.shape[1] * field), max(1, t.shape[0] * field)


def _fan(t: Tensor, mode: str) -> int:
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"init: mode must be fan_in or fan_out, got {mode!r}")
    return _fans(t)[mode == "fan_out"]
