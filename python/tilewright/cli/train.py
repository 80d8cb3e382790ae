"""``tilewright train``: a byte-level GPT on the text of files."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path
from typing import Any

from tilewright.cli.device import add_device
from tilewright.cli.errors import CliError, from_options
from tilewright.cli.plot import MISSING, loss_plot
from tilewright.cli.session import CHECKPOINT, LOG, MODEL, PLOT, Session
from tilewright.errors import FormatError
from tilewright.training import (
    Checkpoint,
    Corpus,
    Diverged,
    Document,
    Log,
    Settings,
    Trainer,
    Windows,
    fingerprint,
    hold_out_tail,
    join,
    sample,
    size,
    windows,
)

_HELD_OUT = 0.05  # of every file: its end
_VALIDATION_WINDOWS = 128

# Defaults of the options that --resume takes from the checkpoint instead.
_FIXED: dict[str, Any] = {
    "layers": 4,
    "heads": 4,
    "width": 128,
    "context": 128,
    "batch": 16,
    "lr": 3e-3,
    "dropout": 0.0,
    "seed": 0,
}
_MEANING = {
    "layers": "blocks of the model",
    "heads": "attention heads of a block",
    "width": "of the residual stream",
    "context": "bytes that the model looks back on",
    "batch": "windows of a context each step learns from",
    "lr": "the highest learning rate",
    "dropout": "probability",
    "seed": "of weights, dropout and the order of the text",
}
_STEPS = 2000


def add_parser(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "train",
        help="train a byte-level GPT on text files",
        description="Train a byte-level GPT. The last 5 % of every file are held out to validate.",
    )
    parser.add_argument("files", metavar="FILE", nargs="*", type=Path, help="text to learn from")
    parser.add_argument(
        "--out", type=Path, default=Path("tilewright-run"), help="folder (default tilewright-run)"
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=int, help=f"how many steps (default {_STEPS})")
    budget.add_argument("--minutes", type=float, help="train by the clock instead")
    for name, value in _FIXED.items():
        meaning = f"{_MEANING[name]} (default {value})"
        parser.add_argument(f"--{name}", type=type(value), metavar="N", help=meaning)
    add_device(parser)
    parser.add_argument(
        "--checkpoint-every", type=int, default=250, metavar="STEPS", help="(default 250)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out; model and data options come from its checkpoint",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Train; return 0, or 128 + the signal that stopped the run."""
    if options.checkpoint_every < 1:
        raise CliError(f"--checkpoint-every must be at least 1, got {options.checkpoint_every}")
    trainer, corpus = _resume(options) if options.resume else _start(options)
    session = Session(
        trainer,
        options.out,
        _validation(corpus, trainer.model.config.context),
        checkpoint_every=options.checkpoint_every,
        corpus={
            "files": [str(Path(document.name).resolve()) for document in corpus.train],
            "fingerprint": fingerprint(corpus.train),
        },
    )
    print(describe(trainer, corpus))
    try:
        stopped = session.run()
    except Diverged as error:
        raise CliError(f"{error}; {options.out} holds the last checkpoint") from None
    drawn = loss_plot(
        options.out / PLOT,
        Log(options.out / LOG).entries(),
        title=f"byte-level GPT on {', '.join(Path(d.name).name for d in corpus.train[:3])}",
    )
    if not drawn:
        print(MISSING)
    if stopped:
        print(
            f"stopped at step {trainer.step} and saved; "
            f"continue with: tilewright train --resume --out {shlex.quote(str(options.out))}"
            if trainer.progress < 1
            else f"stopped after the last step, {trainer.step}, and saved"
        )
        return 128 + stopped
    print(f"done; write text with: tilewright generate {options.out / MODEL}")
    return 0


def describe(trainer: Trainer, corpus: Corpus) -> str:
    """Return two lines: the model and the text."""
    config = trainer.model.config
    count = sum(parameter.data.size for parameter in trainer.parameters)
    return (
        f"model: {config.layers} layers, {config.heads} heads, width {config.width}, "
        f"context {config.context}, {count:,} parameters\n"
        f"text:  {size(corpus.train):,} bytes to train on, {size(corpus.held_out):,} held out; "
        f"{trainer.settings.batch} x {config.context} a step"
    )


def _start(options: argparse.Namespace) -> tuple[Trainer, Corpus]:
    if not options.files:
        raise CliError("train needs at least one FILE (or --resume)")
    if (options.out / CHECKPOINT).exists():
        raise CliError(
            f"{options.out} already holds a run: --resume continues it, --out names another folder"
        )
    corpus = _read(options.files)
    with from_options():
        trainer = _trainer(options, corpus)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / LOG).unlink(missing_ok=True)  # of a run that ended before its first checkpoint
    return trainer, corpus


def _trainer(options: argparse.Namespace, corpus: Corpus) -> Trainer:
    import tilewright as tw

    values = {
        name: default if (given := getattr(options, name)) is None else given
        for name, default in _FIXED.items()
    }
    settings = Settings(
        **_budget(options, steps=_STEPS),
        batch=values["batch"],
        learning_rate=values["lr"],
        seed=values["seed"],
    )
    config = tw.models.GPTConfig(
        context=values["context"],
        layers=values["layers"],
        heads=values["heads"],
        width=values["width"],
        dropout=values["dropout"],
    )
    model = tw.models.GPT(config, seed=values["seed"]).to(options.device)
    return Trainer(model, join(corpus.train), settings)


def _resume(options: argparse.Namespace) -> tuple[Trainer, Corpus]:
    given = [f"--{name}" for name in _FIXED if getattr(options, name) is not None]
    if given:
        raise CliError(f"--resume takes {', '.join(given)} from the checkpoint; leave them out")
    path = options.out / CHECKPOINT
    if not path.exists():
        raise CliError(f"nothing to resume: there is no {path}")
    checkpoint = Checkpoint(path)
    files, expected = _recorded(checkpoint)
    corpus = _read(options.files or files)
    if not corpus.train:
        raise CliError(f"{path} names no files (the demo's does not): no run of train")
    if fingerprint(corpus.train) != expected:
        raise CliError("the text is not the one this run was trained on; start a new run instead")
    settings = checkpoint.settings
    if budget := _budget(options, steps=0):
        settings = dataclasses.replace(settings, **{"steps": 0, "seconds": 0.0, **budget})
    trainer = checkpoint.trainer(join(corpus.train), settings, options.device)
    if trainer.progress >= 1:
        raise CliError(
            f"this run is finished after {trainer.step} steps; more --steps or --minutes extend it"
        )
    return trainer, corpus


def _recorded(checkpoint: Checkpoint) -> tuple[list[Path], str]:
    """The files that a run of ``train`` read, and their fingerprint."""
    corpus = checkpoint.corpus if isinstance(checkpoint.corpus, dict) else {}
    files, expected = corpus.get("files"), corpus.get("fingerprint")
    if (
        not isinstance(files, list)
        or not all(isinstance(name, str) for name in files)
        or not isinstance(expected, str)
    ):
        raise FormatError(
            f"{checkpoint.path}: the checkpoint's corpus must have files and fingerprint"
        )
    return [Path(name) for name in files], expected


def _budget(options: argparse.Namespace, steps: int) -> dict[str, Any]:
    """The budget that was asked for, else ``steps``; empty when that is 0."""
    for name, value in (("--steps", options.steps), ("--minutes", options.minutes)):
        if value is not None and value <= 0:
            raise CliError(f"{name} must be above zero, got {value}")
    if options.minutes is not None:
        return {"seconds": 60.0 * options.minutes}
    wanted = options.steps or steps
    return {"steps": wanted} if wanted else {}


def _read(files: list[Path]) -> Corpus:
    documents = [Document(str(path), path.read_bytes()) for path in files]
    for name, text in documents:
        if not text:
            raise CliError(f"{name}: empty")
    return hold_out_tail(documents, _HELD_OUT)


def _validation(corpus: Corpus, context: int) -> Windows | None:
    if not corpus.held_out:
        return None
    return sample(windows(corpus.held_out, context), _VALIDATION_WINDOWS)
