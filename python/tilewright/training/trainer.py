"""The training loop: one Trainer is a model, its optimizer and a position in the text.

A step is a function of (settings, parameters, optimizer state, step number): data order and dropout
come from the seed and the step number, not from a generator that runs along. So a checkpoint holds
few numbers beside the tensors, and a run that was stopped and continued ends with the same bits as
one that was not (with ``steps``; a time budget depends on the clock).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

import tilewright as tw
from tilewright import random
from tilewright.device import device_of, moved
from tilewright.training.batches import Batches

_DROPOUT = 2  # see batches._ORDER
_LARGEST_BATCH = 1 << 16  # windows a step: a checkpoint may not ask for any amount of memory


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train. One of ``steps`` and ``seconds`` is the budget; the other stays 0.

    The learning rate rises linearly over the share ``warmup`` of the budget, then falls as a half
    cosine to ``final_rate`` times its top.
    """

    steps: int = 0
    seconds: float = 0.0
    batch: int = 16
    learning_rate: float = 3e-3
    warmup: float = 0.05
    final_rate: float = 0.05
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, plain = getattr(self, field.name), field.type != "float"
            if plain and (type(value) is not int or not 0 <= value < 2**63):
                raise ValueError(
                    f"{field.name} must be an integer of at least 0, got {str(value)[:40]}"
                )
            if not plain and (type(value) not in (int, float) or math.isnan(value)):
                raise ValueError(f"{field.name} must be a number, got {str(value)[:40]}")
        if (self.steps > 0) == (self.seconds > 0):
            raise ValueError("give a budget: either steps or seconds, above zero")
        for name in ("batch", "learning_rate", "clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above zero, got {getattr(self, name)}")
        if self.batch > _LARGEST_BATCH:
            raise ValueError(f"batch must be at most {_LARGEST_BATCH}, got {self.batch}")

    def rate(self, progress: float) -> float:
        """Return the learning rate at a share of the budget."""
        if progress < self.warmup:
            return self.learning_rate * max(progress / self.warmup, 1e-3)
        fallen = (progress - self.warmup) / (1 - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(fallen, 1.0)))
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * cosine)


class Step(NamedTuple):
    """One finished step: its number from 1, the loss before it in bits per byte, and the clock."""

    number: int
    loss: float
    gradient_norm: float
    learning_rate: float
    seconds: float
    progress: float


class Diverged(ArithmeticError):
    """The loss is no longer a finite number; the parameters are those of the step before."""


class Trainer:
    """Trains a byte-level GPT on a text.

    Attributes:
        device: where the model is, whose batches are brought there; None: the CPU.
        step: steps done.
        seconds: time spent in steps.
    """

    def __init__(self, model: Any, text: Any, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.batches = Batches(
            text, context=model.config.context, batch=settings.batch, seed=settings.seed
        )
        self.parameters = list(model.parameters())
        self.device = device_of(self.parameters[0].data)
        self.optimizer = tw.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=settings.weight_decay,
        )
        # Two programs: between them Python looks at the loss.
        self._differentiate = tw.compile(self._gradients)
        self._update = tw.compile(self.optimizer.step)
        self.step = 0
        self.seconds = 0.0

    @property
    def progress(self) -> float:
        """The share of the budget that is spent, 0 to 1."""
        if self.settings.steps:
            return min(1.0, self.step / self.settings.steps)
        return min(1.0, self.seconds / self.settings.seconds)

    @property
    def bytes_seen(self) -> int:
        """Bytes of text that the steps so far predicted."""
        return self.step * self.settings.batch * self.batches.context

    def run(self) -> Iterator[Step]:
        """Train until the budget is spent, a step an item; leaving the loop early loses nothing."""
        self.model.train()
        while self.progress < 1.0:
            yield self.advance()

    def _gradients(self, ids: Any, targets: Any) -> tuple[Any, Any]:
        """The loss, and the norm that the gradients had before they were clipped."""
        self.optimizer.zero_grad()
        loss = self.model.loss(ids, targets)
        loss.backward()
        return loss, tw.optim.clip_grad_norm_(self.parameters, self.settings.clip)

    def advance(self) -> Step:
        """Do one step."""
        started = time.perf_counter()
        rate = self.settings.rate(self.progress)
        ids, targets = (moved(x, self.device) for x in self.batches.at(self.step))
        with random.seeded(_seed(self.settings.seed, self.step)):  # dropout masks
            loss, size = self._differentiate(ids, targets)
        value, norm = loss.item(), float(size)
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise Diverged(
                f"step {self.step + 1}: the loss is {value}, the gradient's norm {norm}; "
                "use a lower learning rate"
            )
        self.optimizer.lr = rate
        self._update()
        self.step += 1
        self.seconds += time.perf_counter() - started
        bits = value / math.log(2)
        return Step(self.step, bits, norm, rate, self.seconds, self.progress)


def _seed(seed: int, step: int) -> int:
    """The seed of a step's dropout masks."""
    return int(np.random.SeedSequence((seed, _DROPOUT, step)).generate_state(1)[0])
