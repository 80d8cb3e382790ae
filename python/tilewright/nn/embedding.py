"""Embedding: rows of a table."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright.autograd import unwrap
from tilewright.device import as_array
from tilewright.errors import ShapeError
from tilewright.nn import init
from tilewright.nn.module import Module, Parameter, tw


class Embedding(Module):
    """Look up rows: ids (...) -> (..., embedding_dim).

    Args:
        num_embeddings: rows.
        embedding_dim: columns.
        padding_idx: a row that is zeros at first and gets no gradient; from the end if negative.

    Attributes:
        weight: (num_embeddings, embedding_dim), standard normal at first.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        empty = np.empty((num_embeddings, embedding_dim), np.float32)
        self.weight = init.normal_(Parameter(empty))
        self.padding_idx = padding_idx
        if padding_idx is not None:
            if not -num_embeddings <= padding_idx < num_embeddings:
                raise ShapeError(
                    f"Embedding: padding_idx must be a row of {num_embeddings}, got {padding_idx}"
                )
            self.padding_idx = padding_idx % num_embeddings
            self.weight.data[padding_idx] = 0.0

    def forward(self, ids: Any) -> Any:
        """Rows of the weight; ids int32 or int64, checked against the table."""
        y = tw.embedding(ids, self.weight)
        if self.padding_idx is None or not y.requires_grad:
            return y
        pads = as_array(unwrap(ids)) == self.padding_idx
        return tw.where(pads[..., None], y.detach(), y)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}"
