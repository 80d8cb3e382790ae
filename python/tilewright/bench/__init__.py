"""The bench: ``tilewright bench``. bench/README.md has the method and the results."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench with command-line arguments; returns the exit status."""
    from tilewright.bench.run import main as run_main

    return run_main(argv)


__all__ = ["main"]
