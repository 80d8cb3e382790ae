"""Checkpoints: everything a run needs to go on as if it had never stopped, in one safetensors file.

Tensors are named ``model/…`` and ``optimizer/…``; the metadata entry ``run`` is JSON: the model's
configuration, the settings, the step (which also gives the data position and the random state, see
trainer.py), the time spent, and what the text was. ``save`` writes aside and renames, so a crash
while saving leaves the checkpoint before.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import tilewright as tw
from tilewright.errors import FormatError
from tilewright.io import load, load_metadata, save
from tilewright.training.trainer import Settings, Trainer

_FORMAT = 3
_MODEL, _OPTIMIZER = "model/", "optimizer/"


def save_checkpoint(path: Path, trainer: Trainer, corpus: dict[str, Any]) -> None:
    """Write a trainer's whole state; ``corpus`` is any JSON that tells the text again."""
    tensors = {_MODEL + name: value for name, value in trainer.model.state_dict().items()}
    optimizer = trainer.optimizer.state_dict()
    tensors.update({_OPTIMIZER + name: value for name, value in optimizer.items()})
    run = {
        "format": _FORMAT,
        "config": dataclasses.asdict(trainer.model.config),
        "settings": dataclasses.asdict(trainer.settings),
        "step": trainer.step,
        "seconds": trainer.seconds,
        "corpus": corpus,
    }
    save(tensors, path, metadata={"run": json.dumps(run)})


class Checkpoint:
    """A checkpoint that was read and found whole.

    Attributes:
        settings: how the run was trained.
        corpus: what ``save_checkpoint`` was told of the text.
        step: steps done.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = load(path)
        try:
            run = json.loads(load_metadata(path)["run"])
            if run["format"] != _FORMAT:
                raise FormatError(
                    f"{path}: checkpoint format {run['format']}, this version reads {_FORMAT}"
                )
            self._config = tw.models.GPTConfig(**run["config"])
            self.settings = Settings(**run["settings"])
            self.step, self._seconds = int(run["step"]), float(run["seconds"])
            self.corpus: dict[str, Any] = run["corpus"]
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{path}: not a checkpoint of a training run ({error})") from None

    def trainer(self, text: Any, settings: Settings | None = None) -> Trainer:
        """Return a Trainer that continues on ``text``, by other settings if given."""
        trainer = Trainer(tw.models.GPT(self._config), text, settings or self.settings)
        trainer.model.load_state_dict(self._under(_MODEL))
        trainer.optimizer.load_state_dict(self._under(_OPTIMIZER))
        for group in trainer.optimizer.param_groups:  # the settings may be others than the saved
            group["weight_decay"] = trainer.settings.weight_decay
        trainer.step, trainer.seconds = self.step, self._seconds
        return trainer

    def _under(self, prefix: str) -> dict[str, Any]:
        return {
            name.removeprefix(prefix): value
            for name, value in self._tensors.items()
            if name.startswith(prefix)
        }
