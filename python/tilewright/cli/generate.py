"""``tilewright generate``: text from a trained model, as it comes."""

from __future__ import annotations

import argparse
import codecs
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tilewright.cli.device import add_device
from tilewright.cli.errors import CliError, from_options
from tilewright.cli.session import MODEL
from tilewright.training import SEPARATOR


def add_parser(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser("generate", help="write text with a trained model")
    parser.add_argument("model", type=Path, help="a model file, or a folder that train wrote")
    parser.add_argument("--prompt", default="", help="what the text begins with (default: nothing)")
    parser.add_argument("--tokens", type=int, default=400, help="bytes at most (default 400)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 always takes the likeliest (default 0.8)"
    )
    parser.add_argument("--top-k", type=int, help="choose among the k likeliest")
    parser.add_argument("--top-p", type=float, help="choose among the likeliest that sum to p")
    parser.add_argument("--seed", type=int, default=0, help="of the choices (default 0)")
    add_device(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Stream the text to standard output."""
    if options.tokens < 1:
        raise CliError(f"--tokens must be at least 1, got {options.tokens}")
    model = load_model(options.model).to(options.device)
    sampling = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "seed")}
    sys.stdout.write(options.prompt)
    with from_options():
        for piece in text(model, options.prompt, options.tokens, **sampling):
            sys.stdout.write(piece)
            sys.stdout.flush()
    print()
    return 0


def load_model(path: Path) -> Any:
    """Load a byte-level GPT from a file, or from the folder of a run."""
    import tilewright as tw

    if path.is_dir():
        path = path / MODEL
    model = tw.models.load(path)
    if model.config.vocab_size != 256:
        raise CliError(
            f"{path}: a byte-level model has 256 ids, this one {model.config.vocab_size}"
        )
    return model


def text(model: Any, prompt: str, tokens: int, **sampling: Any) -> Iterator[str]:
    """Yield pieces of what follows the prompt; stops where the model ends the document."""
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    for token in model.generate(prompt_ids(prompt), tokens, **sampling):
        if token == SEPARATOR:
            break
        if piece := decode(bytes([token])):
            yield piece
    yield decode(b"", final=True)


def speed(model: Any, tokens: int) -> float:
    """Return the tokens a second of greedy generation of one sequence, after the prompt."""
    ids = iter(model.generate(prompt_ids("import "), tokens + 1, temperature=0.0))
    next(ids)
    started = time.perf_counter()
    count = sum(1 for _ in ids)
    return count / (time.perf_counter() - started)


def prompt_ids(prompt: str) -> list[int]:
    """Return the ids of a text that begins a document."""
    return [SEPARATOR, *prompt.encode()]
