"""Activations as modules. After a Linear, its ``activation=`` saves a pass over memory.

These are kernels; NumPy computes those of ``pointwise.py``.
"""

from __future__ import annotations

from typing import Any

from tilewright.errors import ShapeError
from tilewright.nn.module import Module, tw


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


class Softmin(Softmax):
    """The softmax of -x along the axis ``dim``."""

    def forward(self, x: Any) -> Any:
        return tw.softmax(-x, self.dim)


class GLU(Module):
    """The first half of x along the axis ``dim`` times the logistic function of the second."""

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Any) -> Any:
        shape = tuple(x.shape)
        if not -len(shape) <= self.dim < len(shape) or shape[self.dim] % 2:
            raise ShapeError(f"GLU: x must have an even axis {self.dim} to halve, got {shape}")
        half, before = shape[self.dim] // 2, (slice(None),) * (self.dim % len(shape))
        a, b = (x[at] for at in ((*before, slice(half)), (*before, slice(half, None))))
        return a * tw.sigmoid(b)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
