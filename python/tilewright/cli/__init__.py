"""The command ``tilewright``: a report, train, generate, quantize, demo, bench; one module each."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from tilewright.cli.errors import CliError
from tilewright.errors import DeviceError, DtypeError, UnsupportedError

_EPILOG = "without a command: what tilewright found on this machine"
_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
_MISTAKES = (  # in the arguments or in a file; ShapeError and FormatError are ValueErrors
    *(CliError, OSError, ValueError, DtypeError, DeviceError, UnsupportedError, MemoryError),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 2 (asked for wrongly), 130 (Ctrl-C)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:  # the benches parse their own options
        from tilewright.bench import main as bench

        return bench(arguments[1:])
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except BrokenPipeError:  # `tilewright generate … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except _MISTAKES as error:
        print(f"tilewright: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    from tilewright.cli import demo, generate, quantize, report, train

    parser = argparse.ArgumentParser(
        prog="tilewright",
        description="Train, run and compress small Transformers with hand-written kernels.",
        epilog=_EPILOG,
    )
    parser.set_defaults(run=report.run)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for module in (demo, train, generate, quantize):
        module.add_parser(commands)
    commands.add_parser(
        "bench", help="measure the kernels against NumPy, torch and the machine's own limits"
    )
    return parser


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


__all__ = ["main"]
