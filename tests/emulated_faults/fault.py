"""What a planted fault is."""

from __future__ import annotations

from typing import NamedTuple

WRONG = "elements are out of bounds; worst at"  # what tests/harness.py says of numbers
BOUNDS = "global memory out of bounds"


class Fault(NamedTuple):
    """``text`` in ``file`` replaced by ``wrong``, ``source`` compiled again; all in csrc/cuda.

    ``test`` chooses among the tests of ``tests``, as pytest's -k does: few, and quick ones.
    ``shows`` is the finding that the checked emulator must report, or where every access is legal
    and only the numbers can tell, ``WRONG`` or the name of a test.
    """

    name: str
    file: str
    text: str
    wrong: str
    shows: str
    source: str
    test: str
    tests: tuple[str, ...] = ("forward", "backward")  # of test_*.py
