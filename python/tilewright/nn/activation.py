"""Activations as modules. After a Linear, its ``activation=`` saves a pass over memory.

ReLU, GELU, SiLU, Tanh, Sigmoid, Softmax and LogSoftmax are kernels; NumPy computes the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tilewright.nn.module import Module, tw
from tilewright.registry import Context, Op, rule
from tilewright.tensor import check_dtype


class ReLU(Module):
    """max(x, 0)."""

    def forward(self, x: Any) -> Any:
        return tw.relu(x)


class GELU(Module):
    """X times the normal distribution function of x; approximate="tanh" for its common formula."""

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        if approximate not in ("none", "tanh"):
            raise ValueError(f'GELU: approximate must be "none" or "tanh", got {approximate!r}')
        self.approximate = approximate

    def forward(self, x: Any) -> Any:
        return tw.gelu_tanh(x) if self.approximate == "tanh" else tw.gelu(x)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class SiLU(Module):
    """X times its logistic function."""

    def forward(self, x: Any) -> Any:
        return tw.silu(x)


class Tanh(Module):
    """Hyperbolic tangent."""

    def forward(self, x: Any) -> Any:
        return tw.tanh(x)


class Sigmoid(Module):
    """1 / (1 + exp(-x)), the logistic function."""

    def forward(self, x: Any) -> Any:
        return tw.sigmoid(x)


class Softmax(Module):
    """Exponentials along the axis ``dim``, divided by their sum."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Any) -> Any:
        return tw.softmax(x, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class LogSoftmax(Softmax):
    """Logarithms of the softmax along the axis ``dim``."""

    def forward(self, x: Any) -> Any:
        return tw.log_softmax(x, self.dim)


# Without kernels ------------------------------------------------------------------------------


def _pointwise(name: str, value: Callable[..., Any], slope: Callable[..., Any]) -> Op:
    """The rule y = value(x, options), dx = dy * slope(x, options), computed in float32."""

    def forward(ctx: Context, x: Any, options: tuple[float, ...] = ()) -> Any:
        x = np.asarray(x)
        check_dtype(name, "x", x)
        ctx.save(x, options)
        with np.errstate(over="ignore", invalid="ignore"):
            return value(x.astype(np.float32, copy=False), *options).astype(x.dtype, copy=False)

    def backward(ctx: Context, dy: Any) -> Any:
        x, options = ctx.saved
        with np.errstate(over="ignore", invalid="ignore"):
            dx = dy * slope(x.astype(np.float32, copy=False), *options)
        return dx.astype(x.dtype, copy=False)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return rule(grads=("x",))(type(name, (), members))


def _logistic(x: Any) -> Any:
    e = np.exp(-abs(x))
    return np.where(x < 0, e, np.float32(1)) / (1 + e)


def _softplus(x: Any, beta: float, threshold: float) -> Any:
    z = x * np.float32(beta)
    return np.where(z > threshold, x, np.logaddexp(z, np.float32(0)) / np.float32(beta))


def _softplus_slope(x: Any, beta: float, threshold: float) -> Any:
    z = x * np.float32(beta)
    return np.where(z > threshold, np.float32(1), _logistic(z))


def _mish_slope(x: Any) -> Any:
    t = np.tanh(np.logaddexp(x, np.float32(0)))
    return t + x * (1 - t * t) * _logistic(x)


def _hardswish_slope(x: Any) -> Any:
    return np.where(x > 3, np.float32(1), np.where(x < -3, np.float32(0), x / 3 + np.float32(0.5)))


_leaky_relu = _pointwise(
    "leaky_relu",
    lambda x, slope: np.where(x > 0, x, x * np.float32(slope)),
    lambda x, slope: np.where(x > 0, np.float32(1), np.float32(slope)),
)
_elu = _pointwise(
    "elu",
    lambda x, alpha: np.where(x > 0, x, np.float32(alpha) * np.expm1(x)),
    lambda x, alpha: np.where(x > 0, np.float32(1), np.float32(alpha) * np.exp(x)),
)
_softplus_rule = _pointwise("softplus", _softplus, _softplus_slope)
_hardswish = _pointwise("hardswish", lambda x: x * (np.clip(x + 3, 0, 6) / 6), _hardswish_slope)
_mish = _pointwise("mish", lambda x: x * np.tanh(np.logaddexp(x, np.float32(0))), _mish_slope)


class LeakyReLU(Module):
    """X where it is above 0, else ``negative_slope`` times x."""

    def __init__(self, negative_slope: float = 0.01) -> None:
        super().__init__()
        self.negative_slope = negative_slope

    def forward(self, x: Any) -> Any:
        return _leaky_relu(x, (self.negative_slope,))

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope}"


class ELU(Module):
    """X where it is above 0, else alpha * (exp(x) - 1)."""

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Any) -> Any:
        return _elu(x, (self.alpha,))

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class Softplus(Module):
    """log(1 + exp(beta * x)) / beta; x itself where beta * x is above the threshold."""

    def __init__(self, beta: float = 1.0, threshold: float = 20.0) -> None:
        super().__init__()
        self.beta, self.threshold = beta, threshold

    def forward(self, x: Any) -> Any:
        return _softplus_rule(x, (self.beta, self.threshold))

    def extra_repr(self) -> str:
        return f"beta={self.beta}, threshold={self.threshold}"


class Hardswish(Module):
    """X times (x + 3) clipped to [0, 6], divided by 6."""

    def forward(self, x: Any) -> Any:
        return _hardswish(x)


class Mish(Module):
    """X times the hyperbolic tangent of log(1 + exp(x))."""

    def forward(self, x: Any) -> Any:
        return _mish(x)
