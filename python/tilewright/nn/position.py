"""Positions: sines added to the embedding, or rotations of queries and keys."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright.autograd import unwrap
from tilewright.device import device_of, moved
from tilewright.errors import ShapeError
from tilewright.nn.dropout import Dropout
from tilewright.nn.module import Module, tw


def _angles(count: int, size: int, base: float) -> Any:
    """(count, size // 2) float64: position / base ** (2 i / size)."""
    return np.arange(count)[:, None] / base ** (np.arange(0, size, 2) / size)


class _Table:
    """Rows that are computed when they are first asked for, and kept."""

    def __init__(self) -> None:
        self.rows: Any = None

    def first(self, count: int, make: Any) -> Any:
        """The first rows of make(n), any n >= count."""
        if self.rows is None or len(self.rows) < count:
            self.rows = make(max(count, 2 * (0 if self.rows is None else len(self.rows))))
        return self.rows[:count]


class SinusoidalPositionalEncoding(Module):
    """Add sines and cosines of the position, of wavelengths from 2 pi to 2 pi * base; then drop.

        pe[t, 2 i] = sin(t / base**(2 i / C))        pe[t, 2 i + 1] = cos(t / base**(2 i / C))

    Args:
        d_model: C, even.
        dropout: probability.
        base: of the wavelengths.
        batch_first: inputs are (B, T, C), else (T, B, C).

    Source: Vaswani et al. 2017, section 3.5.
    """

    def __init__(
        self, d_model: int, dropout: float = 0.0, base: float = 1e4, batch_first: bool = False
    ) -> None:
        super().__init__()
        if d_model % 2:
            raise ShapeError(f"SinusoidalPositionalEncoding: d_model must be even, got {d_model}")
        self.d_model, self.base, self.batch_first = d_model, base, batch_first
        self.dropout = Dropout(dropout)
        self._table = _Table()

    def table(self, count: int) -> Any:
        """The encodings (count, C) of the first positions, float32."""
        return self._table.first(count, self._make)

    def _make(self, count: int) -> Any:
        angles = _angles(count, self.d_model, self.base)
        both = np.stack([np.sin(angles), np.cos(angles)], axis=-1)
        return both.reshape(count, self.d_model).astype(np.float32)

    def forward(self, x: Any, offset: int = 0) -> Any:
        """Add to x the encodings of the positions offset, offset + 1, ..."""
        batched = x.ndim == 3
        if x.ndim not in (2, 3) or x.shape[-1] != self.d_model:
            raise ShapeError(
                f"SinusoidalPositionalEncoding: x must have 2 or 3 axes, the last of "
                f"{self.d_model}, got {tuple(x.shape)}"
            )
        T = x.shape[1 if batched and self.batch_first else 0]
        rows = self.table(offset + T)[offset:]
        if batched and not self.batch_first:
            rows = rows[:, None]
        return self.dropout(x + moved(rows.astype(x.dtype), device_of(unwrap(x))))

    def extra_repr(self) -> str:
        return f"{self.d_model}, batch_first={self.batch_first}"


class RotaryEmbedding(Module):
    """Rotate pairs of elements of queries or keys by angles that grow with the position.

        angle[t, i] = t / base**(2 i / dim)            for the first ``dim`` elements of each head

    Args:
        dim: elements that are rotated, even; the others pass.
        base: of the wavelengths.
        interleaved: pairs are (0, 1), (2, 3), ..., else (0, dim / 2), (1, dim / 2 + 1), ....

    Source: Su et al. 2021.
    """

    def __init__(self, dim: int, base: float = 1e4, interleaved: bool = False) -> None:
        super().__init__()
        if dim % 2:
            raise ShapeError(f"RotaryEmbedding: dim must be even, got {dim}")
        self.dim, self.base, self.interleaved = dim, base, interleaved
        self._table = _Table()

    def table(self, count: int) -> tuple[Any, Any]:
        """Cosines and sines (count, dim / 2) of the first positions, float32."""
        rows = self._table.first(count, self._make)
        return rows[:, 0], rows[:, 1]

    def _make(self, count: int) -> Any:
        angles = _angles(count, self.dim, self.base)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    def forward(self, x: Any, offset: Any = 0) -> Any:
        """Rotate x (..., T, D) at the positions offset, offset + 1, ....

        Args:
            x: queries or keys, dim <= D; (B, H, T, D) where the offsets differ.
            offset: an int, or ints (B,), one for each sequence: the tokens before x.
        """
        T = x.shape[-2]
        offsets = np.asarray(offset)
        cos, sin = self.table(int(offsets.max(initial=0)) + T)
        at = offsets[..., None] + np.arange(T) if offsets.ndim else slice(offset, offset + T)
        cos, sin = (moved(rows[at], device_of(unwrap(x))) for rows in (cos, sin))
        return tw.rope(x, cos, sin, interleaved=self.interleaved)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base}, interleaved={self.interleaved}"
