"""What a model is measured against: byte statistics of order 0, 1 and 2, and two compressors.

The statistics interpolate the orders as Witten and Bell do (1991; also Chen & Goodman 1998,
section 2.4): with n(h, c) the times byte c followed the context h in training, N(h) their sum and
T(h) the number of different bytes that followed,

    p_k(c | h) = (n(h, c) + T(h) p_{k-1}(c | h')) / (N(h) + T(h))

where h' is h without its oldest byte, and p_{-1} = 1/256;
so a context seen rarely trusts the shorter one, and every byte has a probability above zero.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tilewright.training.corpus import SEPARATOR, Corpus, Document, join, size


class Baseline(NamedTuple):
    """One figure to stand beside: its name, bits per byte, and how it was got."""

    name: str
    bits_per_byte: float
    how: str


def baselines(corpus: Corpus) -> list[Baseline]:
    """Measure every baseline on the held-out documents."""
    order0, order1, order2 = byte_statistics(join(corpus.train), corpus.held_out)
    how = "counts from the training files"
    return [
        Baseline("order 0", order0, f"{how}: how often each byte occurs"),
        Baseline("order 1", order1, f"{how}: after each byte, interpolated with order 0"),
        Baseline("order 2", order2, f"{how}: after each two bytes, interpolated with order 1"),
        Baseline("zlib", compressed(corpus.held_out, _zlib), "level 9, each file alone"),
        Baseline("lzma", compressed(corpus.held_out, _lzma), ".xz, preset 9e, each file alone"),
    ]


def byte_statistics(train: Any, held_out: Sequence[Document]) -> tuple[float, float, float]:
    """Return the bits per held-out byte under order 0, 1 and 2.

    Args:
        train: uint8 (bytes,), as ``join`` returns it.
        held_out: documents; a separator is what comes before each.
    """
    key = train.astype(np.int32)
    counts0 = np.bincount(key, minlength=1 << 8)
    counts1 = np.bincount(key[:-1] << 8 | key[1:], minlength=1 << 16).reshape(-1, 256)
    counts2 = np.bincount(key[:-2] << 16 | key[1:-1] << 8 | key[2:], minlength=1 << 24).reshape(
        -1, 256
    )

    c, h1, h2 = _contexts(held_out)
    p0 = _interpolate(counts0[c], counts0.sum(), np.count_nonzero(counts0), 1 / 256)
    p1 = _interpolate(counts1[h1, c], counts1.sum(1)[h1], _distinct(counts1)[h1], p0)
    pair = h2 << 8 | h1
    p2 = _interpolate(counts2[pair, c], counts2.sum(1)[pair], _distinct(counts2)[pair], p1)
    return _bits(p0), _bits(p1), _bits(p2)


def _contexts(held_out: Sequence[Document]) -> tuple[Any, Any, Any]:
    """Every held-out byte, the byte before it, and the one before that."""
    parts: list[list[Any]] = [[], [], []]
    for _, text in held_out:
        padded = np.frombuffer(bytes([SEPARATOR] * 2) + text, np.uint8).astype(np.int32)
        for part, shifted in zip(parts, (padded[2:], padded[1:-1], padded[:-2]), strict=True):
            part.append(shifted)
    c, h1, h2 = (np.concatenate(part) for part in parts)
    return c, h1, h2


def _interpolate(n: Any, total: Any, distinct: Any, shorter: Any) -> Any:
    """p_k from the counts and p_{k-1}; a context never seen leaves p_{k-1}."""
    seen = np.maximum(total + distinct, 1)
    return np.where(total > 0, (n + distinct * shorter) / seen, shorter)


def _distinct(counts: Any) -> Any:
    return np.count_nonzero(counts, axis=1)


def _bits(p: Any) -> float:
    return float(-np.log2(p).mean())


def compressed(documents: Sequence[Document], compress: Any) -> float:
    """Return the bits per byte of documents compressed one by one, containers included."""
    return 8.0 * sum(len(compress(d.text)) for d in documents) / max(1, size(documents))


def _zlib(text: bytes) -> bytes:
    return zlib.compress(text, 9)


def _lzma(text: bytes) -> bytes:
    return lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
