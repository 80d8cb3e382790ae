"""What the reference says about gradients: central differences of it, and how to compare with them.

Small inputs are differentiated element by element, larger ones along random directions.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

import harness
import tolerance
from tilewright.autograd import Context
from tilewright.registry import OPS

SMALL = 48  # inputs of at most so many elements are differentiated one by one
DIRECTIONS = 8
HEAVY = 2e7  # flops of a reference from which fewer directions must do
# A function bends by step / 2 * f'' / f' of its change, and float64 by 2^-52 of its value: more is
# a kink, as relu has one.
KINK, STRAIGHT = 1e-3, 1e-9


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


def finite(value):
    """The value, but 0 where it is infinite (the lse of a row without keys): nothing moves that."""
    return np.where(np.isinf(value), 0.0, value)


def differences(name, arguments, dys, refs, which, directions=None):
    """Central differences of sum(dy * reference) with respect to one input, as a Slope.

    Along these directions, (D, *shape), but for those along which the reference has a kink within
    the step: there it has no slope. None: with respect to every element.
    """
    x = arguments[which].astype(np.float64)
    step = tolerance.STEP * max(1.0, float(np.abs(x).max(initial=0.0)))
    here = [finite(ref.value) for ref in refs]
    scale = sum(float(np.abs(dy * y).sum()) for dy, y in zip(dys, here, strict=True))
    terms = max(ref.terms for ref in refs) + max(np.size(ref.value) for ref in refs)
    cancelling = getattr(OPS[name].definition, "tangent_size", None)
    cancelling = cancelling if which in ("x", "residual") else None

    def along(direction):
        """(derivative, magnitude, whether there is none) of the weighted sum along a direction."""
        above, below = (
            [finite(ref.value) for ref in harness.evaluate(name, {**arguments, which: x + move})]
            for move in (step * direction, -step * direction)
        )
        slope = magnitude = kinks = 0.0
        for dy, y, a, b in zip(dys, here, above, below, strict=True):
            part = dy * (a - b) / (2 * step)
            slope += float(part.sum())
            magnitude += float(np.abs(part).sum())
            kinks += np.sum(abs(a + b - 2 * y) > KINK * abs(a - b) + STRAIGHT * (1 + abs(y)))
        size = cancelling
        if name == "attention" and which in ("q", "k") and magnitude == 0:
            size = functools.partial(attention_tangent_size, which)
        if size and x.size:  # the first output's slope is less than its terms
            exact = {n: harness.to_float64(v) for n, v in arguments.items()}
            magnitude += float((abs(dys[0]) * size(direction, **exact)).sum())
        return slope, magnitude, kinks

    if directions is None:
        basis = np.eye(x.size).reshape(x.size, *x.shape)
        want, magnitude, _ = np.array([along(e) for e in basis]).reshape(-1, 3).T
        return Slope(None, want.reshape(x.shape), magnitude.reshape(x.shape), terms, scale)
    want, magnitude, kinks = np.array([along(d) for d in directions]).reshape(-1, 3).T
    smooth = kinks == 0
    return Slope(directions[smooth], want[smooth], magnitude[smooth], terms, scale)


def attention_tangent_size(which, d, *, q, k, v, scale=None, return_lse=False, **options):
    """Of the output along a change d of q or k: do = sum_j P_j ds_j (v_j - o), by its terms.

    What is left of them may be far less: nothing where a row sees one key. The backward pass makes
    the difference of dout v_j and dout o, each of which has its own rounding.
    """
    identity = np.broadcast_to(np.eye(k.shape[-2]), (*k.shape[:-1], k.shape[-2]))
    reference = functools.partial(OPS["attention"].reference, scale=scale, **options)
    P, o = abs(reference(q, k, identity).value), abs(reference(q, k, v).value)
    k, v, d = (
        np.repeat(x, q.shape[1] // x.shape[1], axis=1) if x.ndim == 4 else x for x in (k, v, d)
    )
    moved = (d, k) if which == "q" else (q, d)
    ds = abs(moved[0] @ moved[1].swapaxes(-1, -2))
    ds *= q.shape[-1] ** -0.5 if scale is None else abs(scale)
    weights = P * np.nan_to_num(ds)
    return weights @ np.nan_to_num(abs(v)) + weights.sum(-1, keepdims=True) * o


@functools.lru_cache(maxsize=512)
def slope(name, case, dtype, which):
    """The slopes of a case with respect to one input."""
    arguments, op = harness.inputs(name, case, dtype), OPS[name]
    x, directions = arguments[which], None
    if x.size > SMALL:
        heavy = op.cost is not None and op.cost(**arguments).flops > HEAVY
        shape = (1 if heavy else DIRECTIONS, *x.shape)
        directions = harness.rng_for(name, case, which, "direction").standard_normal(shape)
    dys, refs = output_gradients(name, case, dtype), harness.reference(name, case, dtype)
    return differences(name, arguments, dys, refs, which, directions)


def gradients(op, arguments, needs, dys):
    """The op's own backward, called as the tape calls it: None for an output that is not used."""
    ctx = Context(frozenset(needs))
    outs = harness.as_tuple(op.forward(ctx, **arguments))
    given = zip(dys, outs, strict=True)
    dys = [None if dy is None else dy.astype(out.dtype, copy=False) for dy, out in given]
    found = op.backward(ctx, *dys)
    if len(op.grads) == 1 and not isinstance(found, tuple):
        found = (found,)
    return dict(zip(op.grads, found, strict=True))


def check(name, found, x, s, dtype, where):
    """The gradient ``found`` of the input x has its shape and dtype, and the slopes s."""
    assert found is not None, f"{name} {where}: no gradient"
    assert found.shape == x.shape, f"{name} {where}: shape {found.shape}, not {x.shape}"
    assert found.dtype == x.dtype, f"{name} {where}: dtype {found.dtype}, not {x.dtype}"
    if x.size:
        compare(f"{name} gradient {dtype}", found.astype(np.float64), s, dtype, where)


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
