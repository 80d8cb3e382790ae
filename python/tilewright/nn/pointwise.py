"""Activations that have no kernel: NumPy computes each element by itself, in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np

from tilewright.device import as_array
from tilewright.errors import ShapeError
from tilewright.nn.module import Module, Parameter
from tilewright.registry import Context, Op, rule
from tilewright.tensor import check_dtype

_0, _1 = np.float32(0), np.float32(1)


def _pointwise(name: str, value: Callable[..., Any], slope: Callable[..., Any]) -> Op:
    """The rule y = value(x, *options), dx = dy * slope(x, *options), computed in float32.

    What overflows where the other branch is taken is nobody's business.
    """

    def forward(ctx: Context, x: Any, options: tuple[float, ...] = ()) -> Any:
        x, options = as_array(x), tuple(map(np.float32, options))
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


class _Pointwise(Module):
    """``rule`` of the attributes that ``options`` names."""

    rule: Op
    options: tuple[str, ...] = ()

    def forward(self, x: Any) -> Any:
        return self.rule(x, tuple(getattr(self, name) for name in self.options))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)}" for name in self.options)


def _within(x: Any, low: Any, high: Any) -> Any:
    """1 between the two and where x is NaN, else 0."""
    return np.where((x <= low) | (x >= high), _0, _1)


# Linear in pieces ---------------------------------------------------------------------------------


class LeakyReLU(_Pointwise):
    """X where it is above 0, else ``negative_slope`` times x."""

    options = ("negative_slope",)
    rule = _pointwise(
        "leaky_relu",
        lambda x, slope: np.where(x > 0, x, x * slope),
        lambda x, slope: np.where(x > 0, _1, slope),
    )

    def __init__(self, negative_slope: float = 0.01) -> None:
        super().__init__()
        self.negative_slope = negative_slope


class Threshold(_Pointwise):
    """X where it is above ``threshold``, else ``value``."""

    options = ("threshold", "value")
    rule = _pointwise(
        "threshold",
        lambda x, threshold, value: np.where(x <= threshold, value, x),
        lambda x, threshold, value: np.where(x <= threshold, _0, _1),
    )

    def __init__(self, threshold: float, value: float) -> None:
        super().__init__()
        self.threshold, self.value = threshold, value


class Hardtanh(_Pointwise):
    """X clipped to [min_val, max_val]."""

    options = ("min_val", "max_val")
    rule = _pointwise("hardtanh", np.clip, _within)

    def __init__(self, min_val: float = -1.0, max_val: float = 1.0) -> None:
        super().__init__()
        if not max_val > min_val:
            raise ValueError(f"Hardtanh: max_val must be above min_val {min_val}, got {max_val}")
        self.min_val, self.max_val = min_val, max_val


class ReLU6(Hardtanh):
    """X clipped to [0, 6]."""

    def __init__(self) -> None:
        super().__init__(0.0, 6.0)

    def extra_repr(self) -> str:
        return ""


class Hardsigmoid(_Pointwise):
    """(x + 3) / 6, clipped to [0, 1]."""

    rule = _pointwise(
        "hardsigmoid", lambda x: np.clip(x + 3, 0, 6) / 6, lambda x: _within(x, -3, 3) / 6
    )


class Hardswish(_Pointwise):
    """X times (x + 3) clipped to [0, 6], divided by 6."""

    rule = _pointwise(
        "hardswish",
        lambda x: x * (np.clip(x + 3, 0, 6) / 6),
        lambda x: np.where(x > 3, _1, np.where(x < -3, _0, x / 3 + np.float32(0.5))),
    )


class _Shrink(_Pointwise):
    options = ("lambd",)

    def __init__(self, lambd: float = 0.5) -> None:
        super().__init__()
        if not lambd >= 0:
            raise ValueError(f"{type(self).__name__}: lambd must not be negative, got {lambd}")
        self.lambd = lambd


class Hardshrink(_Shrink):
    """X, but 0 from -lambd to lambd."""

    rule = _pointwise(
        "hardshrink",
        lambda x, lambd: np.where(abs(x) <= lambd, _0, x),
        lambda x, lambd: np.where(abs(x) <= lambd, _0, _1),
    )


class Softshrink(_Shrink):
    """X moved by lambd towards 0, and 0 where it would pass it."""

    rule = _pointwise(
        "softshrink",
        lambda x, lambd: x - np.clip(x, -lambd, lambd),
        lambda x, lambd: np.where(abs(x) <= lambd, _0, _1),
    )


# Of exponentials ----------------------------------------------------------------------------------


def _logistic(x: Any) -> Any:
    e = np.exp(-abs(x))
    return np.where(x < 0, e, _1) / (1 + e)


def _log1p_exp(x: Any) -> Any:
    return np.logaddexp(x, _0)


# outer * x above 0, outer * alpha * (exp(inner * x) - 1) below
_elu = _pointwise(
    "elu",
    lambda x, alpha, outer, inner: outer * np.where(x > 0, x, alpha * np.expm1(inner * x)),
    lambda x, alpha, outer, inner: outer * np.where(x > 0, _1, alpha * inner * np.exp(inner * x)),
)


class ELU(_Pointwise):
    """X where it is above 0, else alpha * (exp(x) - 1)."""

    options = ("alpha",)

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Any) -> Any:
        return _elu(x, (self.alpha, 1.0, 1.0))


class CELU(ELU):
    """X where it is above 0, else alpha * (exp(x / alpha) - 1)."""

    def __init__(self, alpha: float = 1.0) -> None:
        if not alpha:
            raise ValueError("CELU: alpha must not be 0")
        super().__init__(alpha)

    def forward(self, x: Any) -> Any:
        return _elu(x, (self.alpha, 1.0, 1 / self.alpha))


class SELU(_Pointwise):
    """1.0507 times the ELU of alpha 1.6733: mean 0 and variance 1 stay through deep networks.

    Source: Klambauer et al., Self-Normalizing Neural Networks, 2017.
    """

    def forward(self, x: Any) -> Any:
        return _elu(x, (1.6732632423543772, 1.0507009873554805, 1.0))


class Softplus(_Pointwise):
    """log(1 + exp(beta * x)) / beta; x itself where beta * x is above the threshold."""

    options = ("beta", "threshold")
    rule = _pointwise(
        "softplus",
        lambda x, beta, threshold: np.where(x * beta > threshold, x, _log1p_exp(x * beta) / beta),
        lambda x, beta, threshold: np.where(x * beta > threshold, _1, _logistic(x * beta)),
    )

    def __init__(self, beta: float = 1.0, threshold: float = 20.0) -> None:
        super().__init__()
        self.beta, self.threshold = beta, threshold


class LogSigmoid(_Pointwise):
    """The logarithm of the logistic function, -log(1 + exp(-x))."""

    rule = _pointwise("logsigmoid", lambda x: -_log1p_exp(-x), lambda x: _logistic(-x))


def _mish_slope(x: Any) -> Any:
    t = np.tanh(_log1p_exp(x))
    return t + x * (1 - t * t) * _logistic(x)


class Mish(_Pointwise):
    """X times the hyperbolic tangent of log(1 + exp(x))."""

    rule = _pointwise("mish", lambda x: x * np.tanh(_log1p_exp(x)), _mish_slope)


class Tanhshrink(_Pointwise):
    """X less its hyperbolic tangent."""

    rule = _pointwise("tanhshrink", lambda x: x - np.tanh(x), lambda x: np.tanh(x) ** 2)


class Softsign(_Pointwise):
    """X / (1 + abs(x))."""

    rule = _pointwise(
        "softsign", lambda x: x / (1 + abs(x)), lambda x: 1 / ((1 + abs(x)) * (1 + abs(x)))
    )


# With a parameter ---------------------------------------------------------------------------------


@rule(grads=("x", "weight"))
class _prelu:
    @staticmethod
    def forward(ctx: Context, x: Any, weight: Any) -> Any:
        x, weight = as_array(x), as_array(weight)
        check_dtype("PReLU", "x", x)
        channels = x.shape[1] if x.ndim > 1 else 1
        if weight.shape not in ((1,), (channels,)):
            raise ShapeError(
                f"PReLU: x must have {weight.size} channels in axis 1 to match num_parameters, "
                f"got {x.shape}"
            )
        slope = weight.astype(np.float32).reshape(-1, *[1] * max(x.ndim - 2, 0))
        slope = slope if x.ndim else slope[0]
        ctx.save(x, weight, slope)
        wide = x.astype(np.float32, copy=False)
        return np.where(x > 0, wide, slope * wide).astype(x.dtype, copy=False)

    @staticmethod
    def backward(ctx: Context, dy: Any) -> Any:
        x, weight, slope = ctx.saved
        dx, dweight = np.where(x > 0, _1, slope) * dy, None
        if "weight" in ctx.needs:
            products = np.where(x > 0, _0, x.astype(np.float32) * dy)
            others = None if weight.size == 1 else tuple(d for d in range(x.ndim) if d != 1)
            dweight = products.sum(others, dtype=np.float64).reshape(weight.shape)
            dweight = dweight.astype(weight.dtype)
        return dx.astype(x.dtype, copy=False), dweight


class PReLU(Module):
    """X where it is above 0, else a learned slope times x.

    Attributes:
        weight: num_parameters, each ``init`` at first: one for all of x, or one for each index of
            its axis 1. Weight decay would pull them towards a ReLU.
    """

    def __init__(self, num_parameters: int = 1, init: float = 0.25) -> None:
        super().__init__()
        self.num_parameters = num_parameters
        self.weight = Parameter(np.full(num_parameters, init, np.float32))

    def forward(self, x: Any) -> Any:
        return cast(Op, _prelu)(x, self.weight)

    def extra_repr(self) -> str:
        return f"num_parameters={self.num_parameters}"
