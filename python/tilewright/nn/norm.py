"""LayerNorm and RMSNorm."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tilewright.errors import ShapeError
from tilewright.nn.module import Module, Parameter, tw


class _Norm(Module):
    """Over the last axes of x, those of ``normalized_shape``: the kernels know one, these merge."""

    def __init__(self, normalized_shape: int | tuple[int, ...]) -> None:
        super().__init__()
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape
        self.normalized_shape = tuple(shape)

    def _apply(self, x: Any, residual: Any, normalise: Any) -> Any:
        axes = len(self.normalized_shape)
        if axes == 1:
            return normalise(x, residual)
        shape = tuple(x.shape)
        if shape[len(shape) - axes :] != self.normalized_shape:
            raise ShapeError(
                f"{type(self).__name__}: x must end in the axes {self.normalized_shape}, "
                f"got {shape}"
            )
        merged = (*shape[: len(shape) - axes], math.prod(self.normalized_shape))
        found = normalise(
            x.reshape(merged), residual if residual is None else residual.reshape(merged)
        )
        if residual is None:
            return found.reshape(shape)
        return tuple(y.reshape(shape) for y in found)


def _flat(parameter: Any) -> Any:
    return parameter if parameter is None or parameter.ndim == 1 else parameter.reshape(-1)


class LayerNorm(_Norm):
    """Normalise the last axis, or the last axes together; then scale and shift.

    Attributes:
        weight, bias: normalized_shape, ones and zeros at first; None without affine parameters.
    """

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__(normalized_shape)
        shape, self.eps = self.normalized_shape, eps
        self.weight = Parameter(np.ones(shape, np.float32)) if elementwise_affine else None
        self.bias = Parameter(np.zeros(shape, np.float32)) if elementwise_affine and bias else None

    def forward(self, x: Any, residual: Any = None) -> Any:
        """Normalise x (..., C); with a residual, return (y, x + residual) of y over the sum."""
        return self._apply(x, residual, self._normalise)

    def _normalise(self, x: Any, residual: Any) -> Any:
        weight, bias = _flat(self.weight), _flat(self.bias)
        return tw.layernorm(x, weight, bias, eps=self.eps, residual=residual)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}"


class RMSNorm(_Norm):
    """Divide the last axis, or the last axes together, by its root mean square; then scale.

    Args:
        normalized_shape: extents of these axes.
        eps: added to the mean square; None for float32's 2**-23, also where x is bfloat16 (PyTorch
            takes that of x's dtype).
        elementwise_affine: whether there is a weight.

    Attributes:
        weight: normalized_shape, ones at first; or None.
    """

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...],
        eps: float | None = None,
        elementwise_affine: bool = True,
    ) -> None:
        super().__init__(normalized_shape)
        self.eps = float(np.finfo(np.float32).eps) if eps is None else eps
        ones = np.ones(self.normalized_shape, np.float32)
        self.weight = Parameter(ones) if elementwise_affine else None

    def forward(self, x: Any, residual: Any = None) -> Any:
        """Scale x (..., C); with a residual, return (y, x + residual) of y over the sum."""
        return self._apply(x, residual, self._normalise)

    def _normalise(self, x: Any, residual: Any) -> Any:
        return tw.rmsnorm(x, _flat(self.weight), eps=self.eps, residual=residual)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}"
