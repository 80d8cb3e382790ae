"""``tilewright quantize``: a trained model with int8 or int4 weights; what that costs and gains."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tilewright.cli.errors import CliError
from tilewright.cli.generate import load_model, speed
from tilewright.cli.session import MODEL
from tilewright.cli.table import table
from tilewright.training import Document, bits_per_byte, windows

_SPEED_TOKENS = 64


def add_parser(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser("quantize", help="write a model with int8 or int4 weights")
    parser.add_argument("model", type=Path, help="a model file, or a folder that train wrote")
    parser.add_argument("--bits", type=int, choices=(8, 4), default=8, help="of a weight")
    parser.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="weights that share a scale (default: all of a channel; with 4 bits 32)",
    )
    parser.add_argument("--out", type=Path, help="where to write (default: beside it, -int8)")
    parser.add_argument("--text", type=Path, help="measure bits per byte before and after on this")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write the quantized model; print the comparison."""
    source = options.model / MODEL if options.model.is_dir() else options.model
    target = options.out or source.with_name(f"{source.stem}-int{options.bits}{source.suffix}")
    group_size = options.group_size
    if group_size is not None and group_size < 1:
        raise CliError(f"--group-size must be at least 1, got {group_size}")
    if group_size is None and options.bits == 4:
        group_size = 32
    measured = None
    if options.text:
        measured = [Document(str(options.text), options.text.read_bytes())]
        if not measured[0].text:
            raise CliError(f"--text {options.text}: empty")
    model = load_model(source)
    if model.quantized:
        raise CliError(f"{source}: quantized already, to int{model.quantized['bits']}")
    quantized = model.quantize(bits=options.bits, group_size=group_size)
    quantized.save(target)
    print(compare(model, quantized, source, target, measured))
    print(f"written: {target}")
    return 0


def compare(
    model: Any, quantized: Any, source: Path, target: Path, held_out: list[Document] | None
) -> str:
    """Return a table: float32 against the quantized model."""
    rows = [measure(model, source, held_out), measure(quantized, target, held_out)]
    return table(
        ["", "file", "bits per byte", "generation"],
        [
            [
                name,
                f"{row['bytes'] / 1e6:.2f} MB",
                f"{row['bits_per_byte']:.4f}" if held_out else "-",
                f"{row['tokens_per_second']:,.0f} tokens/s",
            ]
            for name, row in zip(
                ("float32", f"int{quantized.quantized['bits']}"), rows, strict=True
            )
        ],
    )


def measure(model: Any, path: Path, held_out: list[Document] | None) -> dict[str, float]:
    """Return size in bytes, bits per byte (with a text), and generation speed."""
    found = {
        "bytes": float(path.stat().st_size),
        "tokens_per_second": speed(model, _SPEED_TOKENS),
    }
    if held_out:
        found["bits_per_byte"] = bits_per_byte(model, windows(held_out, model.config.context))
    return found
