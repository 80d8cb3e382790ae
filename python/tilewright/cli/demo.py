"""``tilewright demo``: train, judge, generate, quantize, on text that every Python carries."""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

from tilewright.cli.errors import CliError
from tilewright.cli.generate import text
from tilewright.cli.plot import MISSING, loss_plot
from tilewright.cli.quantize import measure
from tilewright.cli.report import cpu_model
from tilewright.cli.session import CHECKPOINT, LOG, MODEL, PLOT, Session
from tilewright.cli.table import table
from tilewright.cli.train import describe
from tilewright.training import (
    Baseline,
    Corpus,
    Log,
    Settings,
    Trainer,
    baselines,
    fingerprint,
    hold_out,
    join,
    sample,
    size,
    standard_library,
    windows,
)

_HELD_OUT = 1 << 18  # bytes, in whole files
_VALIDATION_WINDOWS = 192
_SAMPLE_PROMPT, _SAMPLE_TOKENS = "class Parser:\n    def __init__(self, ", 600
_INT8, _REPORT, _TEXT = "model-int8.safetensors", "report.json", "sample.txt"
_FILES = (CHECKPOINT, MODEL, LOG, PLOT, _INT8, _REPORT, _TEXT)
_MARK = "demo"  # the kind of the log's first entry: whose folder it is

# Chosen for 90 s on two cores: with the arithmetic of 1.6 million bytes at this width, widths of
# 64, 96 and 128 came to 2.15, 2.16 and 2.35 bits per byte; with 2.4 million this one came to 1.96.
_MODEL = {"layers": 4, "heads": 3, "width": 96, "context": 128}
_BATCH, _RATE = 8, 5e-3


def add_parser(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "demo",
        help="train, generate and quantize on Python's own standard library, in two minutes",
        description="Train a byte-level GPT on the standard library's source and documentation; "
        "judge it on held-out files beside byte statistics and compressors; generate; quantize.",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--seconds", type=float, default=90.0, help="of training (default 90)")
    budget.add_argument("--steps", type=int, help="train so many steps instead: reproducible")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("tilewright-demo"),
        help="folder, new or a demo's (default tilewright-demo)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the demo; return 0, or 128 + the signal that stopped it."""
    out: Path = options.out
    settings = _settings(options)
    _refuse_what_is_not_ours(out)
    corpus = hold_out(standard_library(), _HELD_OUT)
    if not corpus.held_out:
        raise CliError("this Python carries no source of its standard library to train on")
    out.mkdir(parents=True, exist_ok=True)
    for name in (CHECKPOINT, LOG):  # of the demo before
        (out / name).unlink(missing_ok=True)
    Log(out / LOG).write(_MARK, 0)
    trainer = _trainer(corpus, settings)
    print(f"Python {platform.python_version()}: its standard library's source and documentation")
    print(describe(trainer, corpus))
    print(f"       {len(corpus.held_out)} whole files are held out\n")

    stopped = _train(trainer, corpus, out)
    if stopped:
        print(f"stopped at step {trainer.step}; the model so far is in {out / MODEL}")
        return 128 + stopped

    print("\nmeasuring …", flush=True)
    found = _judge(trainer, corpus, out)
    sample_text = _sample(trainer.model, options.seed, out / _TEXT)
    drawn = loss_plot(
        out / PLOT,
        Log(out / LOG).entries(),
        title=f"byte-level GPT on Python's standard library, {trainer.seconds:.0f} s of training",
        references=[(b.name, b.bits_per_byte) for b in found["baselines"] if b.name != "order 0"],
        final=found["float32"]["bits_per_byte"],
    )
    _report(out / _REPORT, trainer, corpus, found)

    print(f"\nsample (prompt {_SAMPLE_PROMPT!r}, temperature 0.7):\n")
    print("    " + sample_text.replace("\n", "\n    ") + "\n")
    print(_summary(found, trainer))
    print(f"\nfiles in {out}/: {', '.join(sorted(p.name for p in out.iterdir()))}")
    if not drawn:
        print(MISSING)
    return 0


def _refuse_what_is_not_ours(out: Path) -> None:
    """The demo overwrites what a demo wrote, and nothing else."""
    found = [name for name in _FILES if (out / name).exists()]
    if found and not Log(out / LOG).entries(_MARK):
        raise CliError(f"{out} holds {found[0]}, which is of no demo: --out names another folder")


def _settings(options: argparse.Namespace) -> Settings:
    if options.steps is not None:
        budget: dict[str, Any] = {"steps": options.steps}
    else:
        budget = {"seconds": options.seconds}
    if min(budget.values()) <= 0:
        raise CliError("--seconds and --steps must be above zero")
    return Settings(**budget, batch=_BATCH, learning_rate=_RATE, seed=options.seed)


def _trainer(corpus: Corpus, settings: Settings) -> Trainer:
    import tilewright as tw

    model = tw.models.GPT(tw.models.GPTConfig(**_MODEL), seed=settings.seed)
    return Trainer(model, join(corpus.train), settings)


def _train(trainer: Trainer, corpus: Corpus, out: Path) -> int:
    held_out = windows(corpus.held_out, trainer.model.config.context)
    session = Session(
        trainer,
        out,
        sample(held_out, _VALIDATION_WINDOWS),
        checkpoint_every=500,
        corpus={"files": [], "fingerprint": fingerprint(corpus.train)},
    )
    return session.run()


def _judge(trainer: Trainer, corpus: Corpus, out: Path) -> dict[str, Any]:
    """Everything the summary shows: both models, and what they stand beside."""
    import tilewright as tw

    started = time.perf_counter()
    float32 = tw.models.load(out / MODEL)
    float32.quantize().save(out / _INT8)
    return {
        "float32": measure(float32, out / MODEL, corpus.held_out),
        "int8": measure(tw.models.load(out / _INT8), out / _INT8, corpus.held_out),
        "baselines": baselines(corpus),
        "measuring_seconds": time.perf_counter() - started,
    }


def _sample(model: Any, seed: int, path: Path) -> str:
    pieces = text(model, _SAMPLE_PROMPT, _SAMPLE_TOKENS, temperature=0.7, seed=seed)
    found = _SAMPLE_PROMPT + "".join(pieces)
    path.write_text(found + "\n")
    return found


def _summary(found: dict[str, Any], trainer: Trainer) -> str:
    """The closing tables, and a sentence that says where the model stands."""
    ours = found["float32"]["bits_per_byte"]
    how = f"this model after {trainer.seconds:.0f} s of training"
    rows: list[Baseline] = sorted(
        [*found["baselines"], Baseline("GPT", ours, how)], key=lambda row: -row.bits_per_byte
    )
    judged = table(
        ["held-out files", "bits per byte", "how"],
        [
            [f"{'>' if row.name == 'GPT' else ' '} {row.name}", f"{row.bits_per_byte:.3f}", row.how]
            for row in rows
        ],
        left=(0, 2),
    )
    int8 = table(
        ["", "bits per byte", "file", "generation"],
        [
            [
                name,
                f"{found[name]['bits_per_byte']:.4f}",
                f"{found[name]['bytes'] / 1e6:.2f} MB",
                f"{found[name]['tokens_per_second']:,.0f} tokens/s",
            ]
            for name in ("float32", "int8")
        ],
    )
    return f"{judged}\n\n{_standing(ours, found['baselines'])}\n\n{int8}"


def _standing(ours: float, others: list[Baseline]) -> str:
    """One honest sentence."""
    beaten = ", ".join(b.name for b in others if ours < b.bits_per_byte)
    ahead = ", ".join(b.name for b in others if ours >= b.bits_per_byte)
    if not ahead:
        words = "The model beats all of them"
    elif not beaten:
        words = "The model beats none of them"
    else:
        words = f"The model beats {beaten}; it does not beat {ahead}"
    return (
        f"{words}.\nThe statistics learned from the same training files; "
        "the compressors start from nothing on each file."
    )


def _report(path: Path, trainer: Trainer, corpus: Corpus, found: dict[str, Any]) -> None:
    """Everything as JSON, for tools."""
    import tilewright as tw

    settings = trainer.settings
    report = {
        "model": {**_MODEL, "batch": _BATCH, "learning_rate": _RATE, "seed": settings.seed},
        "training": {
            "steps": trainer.step,
            "seconds": round(trainer.seconds, 2),
            "tokens_per_second": round(trainer.bytes_seen / trainer.seconds),
        },
        "corpus": {
            "train_bytes": size(corpus.train),
            "held_out_bytes": size(corpus.held_out),
            "held_out_files": [document.name for document in corpus.held_out],
            "fingerprint": fingerprint(corpus.train),
        },
        **{name: found[name] for name in ("float32", "int8")},
        "baselines": {b.name: b.bits_per_byte for b in found["baselines"]},
        "measuring_seconds": round(found["measuring_seconds"], 2),
        "machine": {
            "cpu": cpu_model(),
            "threads": tw.get_num_threads(),
            "python": platform.python_version(),
        },
    }
    path.write_text(json.dumps(report, indent=2) + "\n")
