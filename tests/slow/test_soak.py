"""Ten thousand calls with random shapes, and their gradients, leave no memory behind."""

from __future__ import annotations

import os
import pathlib
import re

import pytest

import harness
import slopes
import tilewright as tw
from tilewright.autograd import backward
from tilewright.registry import OPS

WARM_UP, CALLS = 5_000, 10_000
ROOM = 8 << 20  # bytes: the allocator's own unevenness; a leak of 1 KiB a call would be 10 MB


def resident():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def arguments_of(op, rng):
    """The arguments of a case with other sizes, or None where those do not go together."""
    sizes, *flags = op.cases[rng.integers(len(op.cases))].split(";")
    sizes = re.sub(r"\d+", lambda n: str(rng.integers(min(2 * int(n[0]) + 2, 300))), sizes)
    dtype = list(harness.DTYPES.values())[rng.integers(3)]
    try:
        args, kwargs = op.make(";".join([sizes, *flags]), rng, dtype)
    except (ValueError, IndexError, ZeroDivisionError):
        return None
    return harness.bind(op, args, kwargs)


def call(op, arguments, rng):
    """Whether the op took these arguments: forward, and backward if there is one."""
    needs = slopes.differentiable(op, arguments)
    tensors = {n: tw.Tensor(arguments[n], requires_grad=True) for n in needs}
    try:
        outputs = harness.as_tuple(harness.call(op, arguments | tensors))
    except (tw.ShapeError, tw.DtypeError, tw.UnsupportedError) as refused:
        assert str(refused).startswith(op.name), refused  # noqa: PT017
        return False
    if needs:
        out = outputs[rng.integers(len(outputs))]
        backward(out, rng.standard_normal(out.shape).astype(out.dtype))
    return True


@pytest.mark.slow
def test_random_shapes_leave_the_memory_flat(rng):
    ops = list(OPS.values())

    def soak(calls):
        taken = 0
        for _ in range(calls):
            op = ops[rng.integers(len(ops))]
            arguments = arguments_of(op, rng)
            taken += arguments is not None and call(op, arguments, rng)
        tw.trim()
        return taken

    soak(WARM_UP)
    before = resident()
    assert soak(CALLS) > 0.8 * CALLS
    assert resident() - before < ROOM
