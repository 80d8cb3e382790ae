"""Gradients of every registered op against central differences of its float64 reference.

Small inputs are differentiated element by element, larger ones along random directions
(tolerance.py says how far the two may differ). The differences depend on the case alone, so that
all ISA levels share them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import pytest

import harness
import tolerance
from tilewright.autograd import Context, Tensor, backward
from tilewright.registry import OPS

SMALL = 48  # inputs of at most so many elements are differentiated one by one
DIRECTIONS = 8
HEAVY = 2e7  # flops of a reference from which fewer directions must do


class Slope(NamedTuple):
    """What the reference says about the gradient of one input."""

    directions: np.ndarray | None  # (D, *shape), or None: every element
    want: np.ndarray  # gradient, or (D,) derivatives
    magnitude: np.ndarray  # sums of |dy J|, like want
    terms: int
    scale: float


def differentiable(op, arguments):
    """The inputs of this call that have a gradient."""
    return tuple(n for n in op.grads if harness.is_float(arguments.get(n)))


@functools.lru_cache(maxsize=512)
def output_gradients(name, case, dtype):
    """A random dy for each output of the case, exact in the output's dtype."""
    rng = harness.rng_for(name, case, "dy")
    outs = harness.as_tuple(harness.call(OPS[name], harness.inputs(name, case, dtype)))
    return tuple(
        rng.standard_normal(out.shape).astype(out.dtype).astype(np.float64) for out in outs
    )


@functools.lru_cache(maxsize=512)
def slope(name, case, dtype, which):
    """Central differences of sum(dy * reference) with respect to one input."""
    arguments = harness.inputs(name, case, dtype)
    x = arguments[which].astype(np.float64)
    dys = output_gradients(name, case, dtype)
    refs = harness.reference(name, case, dtype)
    scale = sum(float(np.abs(dy * ref.value).sum()) for dy, ref in zip(dys, refs, strict=True))
    terms = max(ref.terms for ref in refs) + max(np.size(ref.value) for ref in refs)

    def along(direction):
        """(derivative, magnitude) of the weighted sum along a direction."""
        step = tolerance.STEP * max(1.0, float(np.abs(x).max()))
        above, below = (
            harness.evaluate(name, {**arguments, which: x + sign * step * direction})
            for sign in (1, -1)
        )
        parts = [
            dy * (np.asarray(a.value) - np.asarray(b.value)) / (2 * step)
            for dy, a, b in zip(dys, above, below, strict=True)
        ]
        return sum(float(p.sum()) for p in parts), sum(float(np.abs(p).sum()) for p in parts)

    if x.size <= SMALL:
        basis = np.eye(x.size).reshape(x.size, *x.shape)
        pairs = np.array([along(e) for e in basis]).reshape(x.size, 2)
        return Slope(None, pairs[:, 0].reshape(x.shape), pairs[:, 1].reshape(x.shape), terms, scale)
    op = OPS[name]
    heavy = op.cost is not None and op.cost(**arguments).flops > HEAVY
    count = 1 if heavy else DIRECTIONS
    directions = harness.rng_for(name, case, which, "direction").standard_normal((count, *x.shape))
    pairs = np.array([along(d) for d in directions])
    return Slope(directions, pairs[:, 0], pairs[:, 1], terms, scale)


def gradients(op, arguments, needs, dys):
    """The op's own backward, called as the tape calls it."""
    ctx = Context(frozenset(needs))
    outs = harness.as_tuple(op.forward(ctx, **arguments))
    found = op.backward(ctx, *[dy.astype(out.dtype) for dy, out in zip(dys, outs, strict=True)])
    if len(op.grads) == 1 and not isinstance(found, tuple):
        found = (found,)
    return dict(zip(op.grads, found, strict=True))


@pytest.mark.parametrize(
    ("name", "case", "dtype"), harness.typed_cases(differentiable=True, float16=3)
)
def test_matches_differences(name, case, dtype, isa):
    op = OPS[name]
    arguments = harness.inputs(name, case, dtype)
    needs = differentiable(op, arguments)
    found = gradients(op, arguments, needs, output_gradients(name, case, dtype))
    for which in needs:
        got, x = found[which], arguments[which]
        where = f"d{which} isa={isa} dtype={dtype} case={case}"
        assert got is not None, f"{name} {where}: no gradient"
        assert got.shape == x.shape, f"{name} {where}: shape {got.shape}, not {x.shape}"
        assert got.dtype == x.dtype, f"{name} {where}: dtype {got.dtype}, not {x.dtype}"
        if x.size:
            compare(
                f"{name} gradient {dtype}",
                got.astype(np.float64),
                slope(name, case, dtype, which),
                dtype,
                where,
            )


def compare(name, got, s, dtype, where):
    if s.directions is None:
        allowed = tolerance.gradient_bound(s.want, s.magnitude, s.terms, dtype, s.scale)
        harness.assert_within(name, got, s.want, allowed, where)
        return
    products = got * s.directions
    axes = tuple(range(1, products.ndim))
    magnitude = np.abs(products).sum(axis=axes) + s.magnitude
    allowed = tolerance.directional_bound(magnitude, s.terms, dtype, s.scale)
    harness.assert_within(name, products.sum(axis=axes), s.want, allowed, where + " (directions)")


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
