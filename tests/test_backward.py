"""Gradients of every registered op against central differences of its float64 reference.

tolerance.py says how far the two may differ. The differences depend on the case alone, so that all
ISA levels share them.
"""

from __future__ import annotations

import pytest

import harness
import slopes
from slopes import differentiable, gradients, output_gradients
from tilewright.autograd import Tensor, backward
from tilewright.registry import OPS


@pytest.mark.parametrize(
    ("name", "case", "dtype"), harness.typed_cases(differentiable=True, float16=3)
)
def test_matches_differences(name, case, dtype, isa):
    op = OPS[name]
    arguments = harness.inputs(name, case, dtype)
    needs = differentiable(op, arguments)
    found = gradients(op, arguments, needs, output_gradients(name, case, dtype))
    for which in needs:
        where = f"d{which} isa={isa} dtype={dtype} case={case}"
        s = slopes.slope(name, case, dtype, which)
        slopes.check(name, found[which], arguments[which], s, dtype, where)


@pytest.mark.parametrize(("name", "case"), harness.all_cases(differentiable=True))
def test_gradients_are_independent_of_each_other(name, case):
    """One gradient asked for alone has the bits it has among all, and the others are None."""
    op = OPS[name]
    dtype = harness.DTYPES["float32"]
    arguments = harness.inputs(name, case, dtype)
    needs = differentiable(op, arguments)
    dys = output_gradients(name, case, dtype)
    together = gradients(op, arguments, needs, dys)
    for which in needs:
        alone = gradients(op, arguments, [which], dys)
        assert harness.same_bits(alone[which], together[which]), f"{name} d{which} case={case}"
        others = [n for n in needs if n != which and alone[n] is not None]
        assert not others, f"{name}: gradients {others} were computed though nobody asked"


@pytest.mark.parametrize(
    ("name", "case", "dtype"), harness.typed_cases(differentiable=True, float16=3)
)
def test_the_tape_changes_nothing(name, case, dtype, isa):
    """On Tensors the op gives the bits it gives on arrays, and the tape those of ``backward``."""
    op = OPS[name]
    arguments = harness.inputs(name, case, dtype)
    needs = differentiable(op, arguments)
    dys = output_gradients(name, case, dtype)
    direct = gradients(op, arguments, needs, dys)
    tensors = {n: Tensor(arguments[n], requires_grad=True) for n in needs}
    recorded = harness.as_tuple(harness.call(op, {**arguments, **tensors}))
    plain = harness.as_tuple(harness.call(op, arguments))
    for out, want in zip(recorded, plain, strict=True):
        assert harness.same_bits(out.data, want), f"{name} isa={isa} dtype={dtype} case={case}"
    if len(recorded) > 1 or not needs:
        return  # with several outputs the tape is walked from each, and their gradients are added
    backward(recorded[0], dys[0].astype(recorded[0].data.dtype))
    for which in needs:
        assert harness.same_bits(tensors[which].grad, direct[which]), f"{name} d{which} case={case}"
