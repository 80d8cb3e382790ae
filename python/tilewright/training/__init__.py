"""Training of byte-level language models: text, batches, the loop, evaluation, checkpoints.

>>> corpus = hold_out(standard_library(), wanted=1 << 18)
>>> model = tw.models.GPT(tw.models.GPTConfig(), seed=0)
>>> trainer = Trainer(model, join(corpus.train), Settings(steps=100))
>>> for step in trainer.run():
...     print(step.number, step.loss)
>>> bits_per_byte(model, windows(corpus.held_out, model.config.context))
"""

from tilewright.training.baselines import Baseline, baselines, byte_statistics
from tilewright.training.batches import Batches
from tilewright.training.checkpoint import Checkpoint, save_checkpoint
from tilewright.training.corpus import (
    SEPARATOR,
    Corpus,
    Document,
    fingerprint,
    hold_out,
    hold_out_tail,
    join,
    size,
    standard_library,
)
from tilewright.training.evaluate import Windows, bits_per_byte, sample, windows
from tilewright.training.log import Log
from tilewright.training.trainer import Diverged, Settings, Step, Trainer

__all__ = [
    "SEPARATOR",
    "Baseline",
    "Batches",
    "Checkpoint",
    "Corpus",
    "Diverged",
    "Document",
    "Log",
    "Settings",
    "Step",
    "Trainer",
    "Windows",
    "baselines",
    "bits_per_byte",
    "byte_statistics",
    "fingerprint",
    "hold_out",
    "hold_out_tail",
    "join",
    "sample",
    "save_checkpoint",
    "size",
    "standard_library",
    "windows",
]
