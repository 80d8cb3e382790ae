"""Which bytes a training step sees: a function of seed and step; the data position is one number.

The text is cut into windows of ``context`` bytes from an offset that changes every epoch; the
windows come in a shuffled order, each once an epoch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_ORDER = (
    1  # the stream of random numbers that shuffles; others belong to other uses of the same seed
)


class Batches:
    """Batches (ids, targets), each (batch, context) int64; targets are the ids one byte later."""

    def __init__(self, text: Any, *, context: int, batch: int, seed: int) -> None:
        self.text, self.context, self.batch, self.seed = text, context, batch, seed
        self.windows = (len(text) - context) // context
        if self.windows < 1:
            raise ValueError(
                f"the training text must have at least {2 * context} bytes, twice the context, "
                f"got {len(text)}"
            )
        self._epoch = -1
        self._starts: Any = None

    def at(self, step: int) -> tuple[Any, Any]:
        """Return the batch of a step."""
        first = step * self.batch
        starts = [self._start(position) for position in range(first, first + self.batch)]
        index = np.array(starts)[:, None] + np.arange(self.context + 1)
        window = self.text[index].astype(np.int64)
        return window[:, :-1], window[:, 1:]

    def _start(self, position: int) -> int:
        epoch, window = divmod(position, self.windows)
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, _ORDER, epoch))
            offset = rng.integers(self.context)
            self._starts = offset + self.context * rng.permutation(self.windows)
            self._epoch = epoch
        return int(self._starts[window])
