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

import numpy as np

import tilewright as tw
from tilewright.errors import DtypeError, FormatError, ShapeError
from tilewright.io import load, load_metadata, save
from tilewright.models.gpt import checked_config
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
        packed = [name for name, v in self._tensors.items() if not isinstance(v, np.ndarray)]
        if packed:
            raise FormatError(f"{path}: not a checkpoint of a training run: {packed[0]!r} is int8")
        try:
            run = json.loads(load_metadata(path)["run"])
            if run["format"] != _FORMAT:
                raise FormatError(
                    f"{path}: checkpoint format {run['format']}, this version reads {_FORMAT}"
                )
            config, self.settings = run["config"], Settings(**run["settings"])
            self.step, self._seconds = _step(run["step"]), _seconds(run["seconds"])
            self.corpus: Any = run["corpus"]
        except FormatError:
            raise
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise FormatError(f"{path}: not a checkpoint of a training run ({error})") from None
        self._config = checked_config(str(path), config, self._under(_MODEL))

    def trainer(self, text: Any, settings: Settings | None = None, device: str = "cpu") -> Trainer:
        """Return a Trainer that continues on ``text``, by other settings if given.

        Its bits are those of a run that never stopped if the device is the same.
        """
        model = tw.models.GPT(self._config).to(device)
        trainer = Trainer(model, text, settings or self.settings)
        try:
            trainer.model.load_state_dict(self._under(_MODEL))
            trainer.optimizer.load_state_dict(self._under(_OPTIMIZER))
        except (DtypeError, FormatError, ShapeError) as error:  # of another model
            raise type(error)(f"{self.path}: {error}") from None
        except (OverflowError, TypeError, ValueError) as error:
            raise FormatError(
                f"{self.path}: the optimizer's steps or options are damaged: {error}"
            ) from None
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


def _step(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**48:
        raise ValueError(f"step must be a number of steps, got {str(value)[:40]}")
    return value


def _seconds(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < 2.0**48:
        raise ValueError(f"seconds must be a time spent, got {str(value)[:40]}")
    return float(value)
