"""One training run in a folder: progress, log, validation, checkpoints, Ctrl-C."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from tilewright.cli.progress import Progress, progress
from tilewright.training import Log, Trainer, Windows, bits_per_byte, save_checkpoint

_STOPPING = b"\nstopping after this step (Ctrl-C again: at once, without saving)\n"
_VALIDATIONS = 20  # per run, evenly spread over the budget

CHECKPOINT, MODEL, LOG, PLOT = (
    "checkpoint.safetensors",
    "model.safetensors",
    "log.jsonl",
    "loss.png",
)


class Session:
    """Trains until the budget is spent or a signal asks to stop; saves in either case."""

    def __init__(
        self,
        trainer: Trainer,
        folder: Path,
        validation: Windows | None,
        *,
        checkpoint_every: int,
        corpus: dict[str, Any],
    ) -> None:
        self.trainer, self.folder, self.validation = trainer, folder, validation
        self.checkpoint_every, self.corpus = checkpoint_every, corpus
        for name in (CHECKPOINT, MODEL):
            for left in folder.glob(f".{name}.*.tmp"):  # by a run that was killed while saving
                left.unlink()
        self.log = Log(folder / LOG)
        self.log.rewind(trainer.step)

    def run(self) -> int:
        """Return 0 when the budget is spent, else the number of the signal that stopped the run."""
        trainer, began = self.trainer, self.trainer.bytes_seen
        with progress() as display, _signals() as asked:
            if trainer.step == 0:
                self._validate(display)
            reached = int(trainer.progress * _VALIDATIONS)
            for step in trainer.run():
                self.log.write(
                    "step",
                    step.number,
                    loss=round(step.loss, 5),
                    gradient_norm=round(step.gradient_norm, 5),
                    learning_rate=step.learning_rate,
                    seconds=round(step.seconds, 3),
                    bytes=trainer.bytes_seen,
                )
                display.update(step, trainer.bytes_seen - began)
                if int(step.progress * _VALIDATIONS) > reached:
                    reached = int(step.progress * _VALIDATIONS)
                    self._validate(display)
                if asked:
                    break
                if step.number % self.checkpoint_every == 0:
                    self.save()
            self.save()  # still shielded: a first Ctrl-C here loses nothing either
            trainer.model.save(self.folder / MODEL)
        return asked[0] if asked else 0

    def save(self) -> None:
        """Write the checkpoint; the one before is replaced only once the new one is complete."""
        save_checkpoint(self.folder / CHECKPOINT, self.trainer, self.corpus)

    def _validate(self, display: Progress) -> None:
        if self.validation is None:
            return
        trainer = self.trainer
        bits = bits_per_byte(trainer.model, self.validation)
        trainer.model.train()
        self.log.write(
            "validation", trainer.step, bits_per_byte=round(bits, 5), bytes=trainer.bytes_seen
        )
        display.note(f"step {trainer.step:>6}  validation {bits:.3f} bits/byte")


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying mid-step; a second SIGINT is a plain Ctrl-C."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, _STOPPING)  # print may be what was interrupted

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
