"""Ten thousand calls with random shapes leave no memory behind."""

from __future__ import annotations

import os
import pathlib
import re

import pytest

import harness
import tilewright as tw
from tilewright.registry import OPS

CALLS = 10_000
ROOM = 8 << 20  # bytes: the allocator's own unevenness; a leak of 1 KiB a call would be 8 MB


def resident():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_random_shapes_leave_the_memory_flat(rng):
    ops = list(OPS.values())
    dtypes = list(harness.DTYPES.values())

    def call():
        op = ops[rng.integers(len(ops))]
        sizes, *flags = op.cases[rng.integers(len(op.cases))].split(";")
        sizes = re.sub(r"\d+", lambda n: str(rng.integers(min(2 * int(n[0]) + 2, 300))), sizes)
        try:
            args, kwargs = op.make(";".join([sizes, *flags]), rng, dtypes[rng.integers(3)])
            op(*args, **kwargs)
        except (ValueError, IndexError, TypeError, ZeroDivisionError, tw.UnsupportedError):
            return 0
        return 1

    calls = sum(call() for _ in range(CALLS // 2))
    tw.trim()
    before = resident()
    calls += sum(call() for _ in range(CALLS // 2))
    tw.trim()
    assert calls > CALLS // 2
    assert resident() - before < ROOM
