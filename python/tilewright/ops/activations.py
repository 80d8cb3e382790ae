"""Activations: csrc/ops/elementwise.cc (rule) · csrc/simd/{elementwise.cc,activation.h}."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tilewright import _core
from tilewright.registry import Context, Cost, Reference, op

CASES = ("1", "3", "17", "4,5", "2,3,31", "0", "3,0", "2,33;transposed", "64,65;sliced", "4096")


def make(case: str, rng: np.random.Generator, dtype: Any) -> tuple[tuple[Any], dict[str, Any]]:
    """Build x for a case: a shape, then "transposed" or "sliced" for other strides."""
    sizes, _, layout = case.partition(";")
    shape = tuple(int(n) for n in sizes.split(","))
    if layout == "transposed":
        return ((3 * rng.standard_normal(shape[::-1])).astype(dtype).T,), {}
    if layout == "sliced":
        wide = (*shape[:-1], 2 * shape[-1])
        return ((3 * rng.standard_normal(wide)).astype(dtype)[..., ::-2],), {}
    return ((3 * rng.standard_normal(shape)).astype(dtype),), {}


# Kernels are accurate relative to the result (csrc/simd/activation.h), but for the smallest
# numbers, where float32 has no digits left: _TINY leaves room for 2^-149.
_TINY = 1e-36
_OPERATIONS = 32  # roundings on the way to a result


def _sigmoid(x: Any) -> Any:
    e = np.exp(-abs(x))
    return np.where(x < 0, e, 1.0) / (1.0 + e)


def _relu(x: Any) -> Any:
    return np.maximum(x, 0.0)


def _gelu(x: Any) -> Any:
    erfc = np.frompyfunc(math.erfc, 1, 1)
    return 0.5 * x * np.asarray(erfc(-x / math.sqrt(2.0)), np.float64)


def _twice_u(x: Any) -> Any:
    return 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)


def _gelu_tanh(x: Any) -> Any:
    return x * _sigmoid(_twice_u(x))


def _silu(x: Any) -> Any:
    return x * _sigmoid(x)


REFERENCES: dict[str, Callable[[Any], Any]] = {
    "relu": _relu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
}


class _Elementwise:
    """What the ops of this file share; the kernel is chosen by the op's name."""

    rows = ("x",)
    cases = CASES
    make = staticmethod(make)
    flops = 30.0  # an element

    @classmethod
    def forward(cls, ctx: Context, x: Any, *, out: Any = None) -> Any:
        ctx.save(x)
        y = _core.empty_like(x) if out is None else out
        _core.activation_forward(x, y, cls.__name__)
        return y

    @classmethod
    def backward(cls, ctx: Context, dy: Any) -> Any:
        (x,) = ctx.saved
        dx = _core.empty_like(x)
        _core.activation_backward(x, dy, dx, cls.__name__)
        return dx

    @classmethod
    def cost(cls, x: Any, **_: Any) -> Cost:
        return Cost(cls.flops * x.size, 2 * x.nbytes)


@op(grads=("x",))
class relu(_Elementwise):
    """Rectifier: y = max(x, 0).

    Args:
        x: (...) float32, bfloat16 or float16, any strides.
        out: where to write y; no overlap with x.

    Returns:
        y, like x. NaN stays NaN; the derivative at 0 is 0.

    Raises:
        ShapeError, DtypeError: naming the argument.
    """

    flops = 1.0

    @staticmethod
    def reference(x: Any) -> Reference:
        y = _relu(x)
        return Reference(y, abs(y), 1)


@op(grads=("x",))
class gelu(_Elementwise):
    """Gaussian error linear unit: y = x Phi(x), Phi the normal distribution function.

    Args:
        x: (...) float32, bfloat16 or float16, any strides.
        out: where to write y; no overlap with x.

    Returns:
        y, like x: within 9 ulp of the exact value, the negative tail included.

    Raises:
        ShapeError, DtypeError: naming the argument.

    Source: Hendrycks & Gimpel 2016.
    """

    flops = 60.0

    @staticmethod
    def reference(x: Any) -> Reference:
        y = _gelu(x)
        return Reference(y, abs(y) + _TINY, _OPERATIONS)


@op(grads=("x",))
class gelu_tanh(_Elementwise):
    """The tanh form of gelu: y = 0.5 x (1 + tanh u), u = sqrt(2/pi) (x + 0.044715 x^3).

    Args:
        x: (...) float32, bfloat16 or float16, any strides.
        out: where to write y; no overlap with x.

    Returns:
        y, like x: within 5 + 4.5 |2u| ulp of the exact value.

    Raises:
        ShapeError, DtypeError: naming the argument.

    Source: Hendrycks & Gimpel 2016, section 2.
    """

    flops = 40.0

    @staticmethod
    def reference(x: Any) -> Reference:
        y = _gelu_tanh(x)
        return Reference(y, abs(y) * (1 + abs(_twice_u(x))) + _TINY, _OPERATIONS)


@op(grads=("x",))
class silu(_Elementwise):
    """Sigmoid linear unit (swish): y = x / (1 + exp(-x)).

    Args:
        x: (...) float32, bfloat16 or float16, any strides.
        out: where to write y; no overlap with x.

    Returns:
        y, like x: within 4 ulp of the exact value where that is above 1e-36.

    Raises:
        ShapeError, DtypeError: naming the argument.

    Source: Elfwing, Uchibe & Doya 2017; Hendrycks & Gimpel 2016.
    """

    @staticmethod
    def reference(x: Any) -> Reference:
        y = _silu(x)
        return Reference(y, abs(y) + _TINY, _OPERATIONS)


@op(grads=("x",))
class tanh(_Elementwise):
    """Hyperbolic tangent: y = (e^x - e^-x) / (e^x + e^-x).

    Args:
        x: (...) float32, bfloat16 or float16, any strides.
        out: where to write y; no overlap with x.

    Returns:
        y, like x: within 1.5 ulp of the exact value.

    Raises:
        ShapeError, DtypeError: naming the argument.
    """

    @staticmethod
    def reference(x: Any) -> Reference:
        y = np.tanh(x)
        return Reference(y, abs(y) + _TINY, _OPERATIONS)


@op(grads=("x",))
class sigmoid(_Elementwise):
    """The logistic function: y = 1 / (1 + exp(-x)).

    Args:
        x: (...) float32, bfloat16 or float16, any strides.
        out: where to write y; no overlap with x.

    Returns:
        y, like x: within 3 ulp of the exact value, the negative tail included.

    Raises:
        ShapeError, DtypeError: naming the argument.
    """

    @staticmethod
    def reference(x: Any) -> Reference:
        y = _sigmoid(x)
        return Reference(y, abs(y) + _TINY, _OPERATIONS)
