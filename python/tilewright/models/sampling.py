"""Choosing the next token."""

from __future__ import annotations

from typing import Any

import numpy as np


def check(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Refuse what makes no distribution."""
    if not 0.0 <= temperature < np.inf:
        raise ValueError(f"generate: temperature must be at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"generate: top_p must be in (0, 1], got {top_p}")


def probabilities(logits: Any, temperature: float, top_k: int | None, top_p: float | None) -> Any:
    """The distribution of the next token: logits (V,) -> (V,) float64.

    The ``top_k`` likeliest are kept (with those that equal the last of them), then of these the
    fewest whose probabilities reach ``top_p``, the likeliest first.
    """
    scaled = np.asarray(logits, np.float64)
    scaled = (scaled - scaled.max()) / temperature
    if top_k is not None and top_k < scaled.size:
        scaled = np.where(scaled >= np.partition(scaled, -top_k)[-top_k], scaled, -np.inf)
    p = np.exp(scaled)
    p /= p.sum()
    if top_p is not None and top_p < 1.0:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= top_p]] = 0.0
        p /= p.sum()
    return p


def choose(
    logits: Any, rng: Any, temperature: float, top_k: int | None, top_p: float | None
) -> int:
    """One token; temperature 0 takes the likeliest.

    Raises:
        ValueError: the largest logit is no number, as where one is NaN: nothing is likeliest then.
    """
    largest = np.max(np.asarray(logits, np.float64))
    if not np.isfinite(largest):
        raise ValueError(
            f"generate: the model's logits must have a finite maximum, got {largest}; look for NaN "
            "or infinities in its weights"
        )
    if temperature == 0.0:
        return int(np.argmax(logits))
    p = probabilities(logits, temperature, top_k, top_p)
    drawn = int(np.searchsorted(np.cumsum(p), rng.random(), side="right"))
    return min(drawn, int(np.flatnonzero(p)[-1]))  # the sum may end a rounding below 1
