"""Dropout from the counted random stream."""

from __future__ import annotations

from typing import Any

from tilewright import random
from tilewright.nn.module import Module, tw


class Dropout(Module):
    """In training, zero each element with probability p and scale the rest by 1 / (1 - p).

    Each call is one draw of ``tw.random``'s state, so a resumed run drops the same elements.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"Dropout: p must be in [0, 1], got {p}")
        self.p = p

    def forward(self, x: Any) -> Any:
        """Drop elements of x in training; x itself in eval mode or for p = 0."""
        if not self.training or self.p == 0.0:
            return x
        return tw.dropout(x, self.p, seed=random.fresh_seed())

    def extra_repr(self) -> str:
        return f"p={self.p}"
