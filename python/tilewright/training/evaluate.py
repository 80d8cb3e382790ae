"""Bits per byte of a model on held-out documents.

Each document is read in windows of ``context`` bytes that advance by half of it. A window counts
only the bytes that no earlier window counted, so every byte of every document counts once, with at
least half a context before it (or all there is).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

import tilewright as tw
from tilewright.device import device_of, moved
from tilewright.training.corpus import SEPARATOR, Document

_IGNORED = -100  # cross_entropy's ignore_index


class Windows(NamedTuple):
    """What an evaluation reads: ids and targets (windows, context) int64; -100: not counted."""

    ids: Any
    targets: Any


def windows(documents: Sequence[Document], context: int) -> Windows:
    """Cut documents into overlapping windows; see the top of this file."""
    stride = max(1, context // 2)
    rows = [row for document in documents for row in _rows(document.text, context, stride)]
    if not rows:
        raise ValueError("evaluation needs at least one byte of text")
    ids, targets = zip(*rows, strict=True)
    return Windows(np.stack(ids), np.stack(targets))


def _rows(text: bytes, context: int, stride: int) -> list[tuple[Any, Any]]:
    data = np.frombuffer(bytes([SEPARATOR]) + text, np.uint8).astype(np.int64)
    rows = []
    start = counted = 0
    while counted < len(text):
        ids = np.full(context, SEPARATOR, np.int64)
        targets = np.full(context, _IGNORED, np.int64)
        end = min(start + context, len(text))
        ids[: end - start] = data[start:end]
        targets[counted - start : end - start] = data[counted + 1 : end + 1]
        rows.append((ids, targets))
        counted, start = end, start + stride
    return rows


def sample(found: Windows, wanted: int) -> Windows:
    """Return at most ``wanted`` windows, evenly spread: a quick estimate of the whole."""
    every = max(1, math.ceil(len(found.ids) / wanted))
    return Windows(found.ids[::every], found.targets[::every])


def bits_per_byte(model: Any, found: Windows, *, batch: int = 16) -> float:
    """Return the mean of -log2 p(byte) over the counted bytes, with the model in eval mode."""
    cross_entropy: Any = tw.cross_entropy  # type checkers see the class under @op
    training = model.training
    device = device_of(next(iter(model.parameters())).data)
    model.eval()
    total = 0.0
    with tw.no_grad():
        for first in range(0, len(found.ids), batch):
            rows = slice(first, first + batch)
            ids, targets = (moved(x[rows], device) for x in found)
            loss = cross_entropy(model(ids), targets, reduction="sum")
            total += float(loss.data)
    model.train(training)
    return total / math.log(2) / int(np.count_nonzero(found.targets != _IGNORED))
