"""Every op against its reference on shapes, layouts and dtypes that nobody chose.

An example takes one of an op's cases and draws its sizes, the memory layout of each array and the
dtype of each differentiable one anew. The answer, or the gradients, are within the bounds of
test_forward.py and test_backward.py, or the op refuses the sizes by an error of its own: any other
exception, and any crash, is a failure.
"""

from __future__ import annotations

import re

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import drawn
import harness
import slopes
import tilewright as tw
import tolerance
from tilewright.registry import OPS

LARGEST = 60_000  # elements of an operand: the reference is NumPy in float64
DIRECTIONS = 2


@st.composite
def cases(draw, op):
    """One of the op's cases with other sizes."""
    case = draw(st.sampled_from(op.cases))
    sizes, *flags = case.split(";")
    sizes = re.sub(r"\d+", lambda n: str(draw(drawn.SIZES)) if draw(st.booleans()) else n[0], sizes)
    hypothesis.assume(np.prod([max(1, int(n)) for n in re.findall(r"\d+", sizes)]) <= LARGEST)
    return ";".join([sizes, *flags])


def mixed(data, op, arguments):
    """The arguments with a dtype for each differentiable input."""
    dtypes = {n: data.draw(drawn.DTYPES, label=n) for n in slopes.differentiable(op, arguments)}
    first, *rest = harness.TOGETHER.get(op.name, ("", ""))
    dtypes |= {n: dtypes[first] for n in rest if n in dtypes}
    return arguments | {n: arguments[n].astype(d) for n, d in dtypes.items()}


def arguments_of(data, op):
    """(case, arguments by name) of an example."""
    case = data.draw(cases(op), label="case")
    dtype = data.draw(drawn.DTYPES | st.none(), label="dtype, or a mixture")
    try:
        args, kwargs = op.make(case, harness.rng_for(op.name, case), dtype or np.float32)
    except (ValueError, IndexError, ZeroDivisionError):
        hypothesis.reject()  # sizes that do not go together
    arguments = harness.bind(op, args, kwargs)
    if dtype is None:
        arguments = mixed(data, op, arguments)
    return case, {
        n: drawn.relaid(data.draw, v) if isinstance(v, np.ndarray) else v
        for n, v in arguments.items()
    }


def outputs_of(op, arguments):
    """The op's outputs; the example ends where it refuses these sizes, by its own name."""
    try:
        return harness.as_tuple(harness.call(op, arguments))
    except (tw.ShapeError, tw.DtypeError, tw.UnsupportedError) as refused:
        assert str(refused).startswith(op.name), refused  # noqa: PT017
        hypothesis.reject()


@pytest.mark.parametrize("name", OPS)
def test_any_shape_layout_and_dtypes(name, isa):
    op = OPS[name]

    def check(data):
        case, arguments = arguments_of(data, op)
        got = outputs_of(op, arguments)
        where = f"isa={isa} case={case} (drawn)"
        if op.grads and "out_dtype" not in arguments:
            assert got[0].dtype == harness.promoted(op, arguments), where
        harness.check(name, got, harness.evaluate(name, arguments), where)

    drawn.run(check)


@pytest.mark.parametrize("name", [n for n, op in OPS.items() if op.backward and op.grads])
def test_gradients_of_any_shape_layout_and_dtypes(name, isa):
    op = OPS[name]

    def check(data):
        case, arguments = arguments_of(data, op)
        hypothesis.assume(not harness.is_straight_through(op, case))
        outputs = outputs_of(op, arguments)
        rng = harness.rng_for(name, case, "dy")
        used = data.draw(st.sampled_from([*range(len(outputs)), None]), label="the output used")
        dys = [
            drawn.relaid(data.draw, rng.standard_normal(out.shape).astype(out.dtype))
            if used in (i, None)
            else None
            for i, out in enumerate(outputs)
        ]
        needs = slopes.differentiable(op, arguments)
        found = slopes.gradients(op, arguments, needs, dys)
        # What was rounded on the way, was to the coarsest of them.
        dtypes = [arguments[n].dtype for n in needs] + [out.dtype for out in outputs]
        coarsest = max(dtypes, key=tolerance.UNIT_ROUNDOFF.get)
        refs = harness.evaluate(name, arguments)
        exact = [0.0 if dy is None else dy.astype(np.float64) for dy in dys]
        for which in needs:
            x = arguments[which]
            directions = rng.standard_normal((DIRECTIONS, *x.shape))
            s = slopes.differences(name, arguments, exact, refs, which, directions)
            if found[which] is None and None in dys:  # no output that is used depends on x
                assert not s.magnitude.any(), f"{case} d{which}"
                continue
            where = f"d{which} {x.dtype} isa={isa} case={case} (drawn)"
            slopes.check(name, found[which], x, s, coarsest, where)

    drawn.run(check)
