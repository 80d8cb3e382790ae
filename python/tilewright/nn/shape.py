"""Modules that compute nothing: Identity and Flatten."""

from __future__ import annotations

import math
from typing import Any

from tilewright.nn.module import Module


class Identity(Module):
    """X itself, whatever arguments the module was made with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, x: Any) -> Any:
        return x


class Flatten(Module):
    """One axis in place of the axes from ``start_dim`` to ``end_dim``, the latter included."""

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        super().__init__()
        self.start_dim, self.end_dim = start_dim, end_dim

    def forward(self, x: Any) -> Any:
        shape = tuple(x.shape)
        start, end = (d % max(1, len(shape)) for d in (self.start_dim, self.end_dim))
        return x.reshape(*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :])

    def extra_repr(self) -> str:
        return f"start_dim={self.start_dim}, end_dim={self.end_dim}"
