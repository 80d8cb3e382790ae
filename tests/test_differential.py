"""Every op against its reference on shapes, layouts and dtypes that nobody chose.

An example takes one of an op's cases and draws its sizes and the memory layout of each array anew.
The answer is within the bound of test_forward.py, or the op refuses the sizes by an error of its
own: any other exception, and any crash, is a failure. Hypothesis shrinks what fails and prints how
to repeat it.

TILEWRIGHT_TEST_EXAMPLES: examples an op (few here, thousands in .ci/nightly).
"""

from __future__ import annotations

import os
import re

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import harness
import tilewright as tw
from tilewright import _core
from tilewright.registry import OPS

EXAMPLES = int(os.environ.get("TILEWRIGHT_TEST_EXAMPLES", "12"))
LARGEST = 60_000  # elements of an operand: the reference is NumPy in float64

# Around the widths and heights of tiles, vectors and blocks.
SIZES = st.one_of(
    st.integers(0, 9),
    st.sampled_from([13, 14, 15, 16, 17, 28, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257]),
    st.integers(10, 600),
)


@st.composite
def cases(draw, op):
    """One of the op's cases with other sizes."""
    case = draw(st.sampled_from(op.cases))
    sizes, *flags = case.split(";")
    sizes = re.sub(r"\d+", lambda n: str(draw(SIZES)) if draw(st.booleans()) else n[0], sizes)
    hypothesis.assume(np.prod([max(1, int(n)) for n in re.findall(r"\d+", sizes)]) <= LARGEST)
    return ";".join([sizes, *flags])


def relaid(draw, x):
    """The same values, axes in any order in memory, with steps of either sign."""
    if x.ndim == 0:
        return x
    order = draw(st.permutations(range(x.ndim)))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3, -1, -2])) for _ in order]
    start = draw(st.integers(0, 3))
    room = [n * abs(s) for n, s in zip((x.shape[i] for i in order), steps, strict=True)]
    memory = np.zeros(int(np.prod(room)) + start, x.dtype)[start:].reshape(room)
    view = memory[tuple(slice(None, None, s) for s in steps)]
    view = view[tuple(slice(0, x.shape[i]) for i in order)].transpose(np.argsort(order))
    view[...] = x
    return view


@pytest.mark.parametrize("name", OPS)
def test_any_shape_and_layout(name, isa):
    op = OPS[name]

    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.seed(harness.seed)
    @hypothesis.given(st.data())
    def check(data):
        _core.set_isa(isa)
        case = data.draw(cases(op), label="case")
        dtype = data.draw(st.sampled_from(list(harness.DTYPES.values())), label="dtype")
        try:
            args, kwargs = op.make(case, harness.rng_for(name, case), dtype)
        except (ValueError, IndexError, ZeroDivisionError):
            hypothesis.reject()  # sizes that do not go together
        arguments = {
            n: relaid(data.draw, v) if isinstance(v, np.ndarray) else v
            for n, v in harness.bind(op, args, kwargs).items()
        }
        try:
            got = harness.call(op, arguments)
        except (tw.ShapeError, tw.DtypeError, tw.UnsupportedError) as refused:
            assert str(refused).startswith(name), refused  # noqa: PT017
            return
        where = f"isa={isa} dtype={dtype} case={case} (drawn)"
        harness.check(name, got, harness.evaluate(name, arguments), where)

    check()
