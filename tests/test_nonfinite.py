"""NaN and infinities come out where the float64 reference has them, and only there."""

from __future__ import annotations

import numpy as np
import pytest

import harness
import tilewright as tw
from tilewright.registry import OPS

VALUES = (np.nan, np.inf, -np.inf)


@pytest.mark.parametrize(("name", "case", "dtype"), harness.typed_cases(float16=3))
def test_propagates_as_in_the_reference(name, case, dtype, isa):
    arguments = harness.inputs(name, case, dtype)
    floats = {n: v for n, v in arguments.items() if harness.is_float(v) and 0 < v.size <= 4096}
    if not floats:
        pytest.skip("no small float input")
    rng = harness.rng_for(name, case, "nonfinite")
    for which, x in floats.items():
        at = np.unravel_index(rng.integers(x.size), x.shape)
        for value in VALUES:
            spoiled = x.copy()
            spoiled[at] = value
            changed = {**arguments, which: spoiled}
            got = harness.as_tuple(harness.call(OPS[name], changed))
            with np.errstate(all="ignore"):
                wanted = harness.evaluate(name, changed)
            where = f"isa={isa} dtype={dtype} case={case} {which}{[int(i) for i in at]}={value}"
            for out, ref in zip(got, wanted, strict=True):
                compare(name, out, ref, where)


def compare(name, got, ref, where):
    """NaN where the reference is NaN, the same infinity, and within the bound elsewhere."""
    want = np.asarray(ref.value)
    with np.errstate(all="ignore"):
        finite = np.isfinite(want)
        magnitude = np.broadcast_to(np.asarray(ref.magnitude, np.float64), want.shape)
        safe = ref._replace(
            value=np.where(finite, want, 0.0), magnitude=np.where(finite, magnitude, 0.0)
        )
        got64 = np.asarray(got).astype(np.float64)
    wrong = (np.isnan(got64) != np.isnan(want)) | (np.isinf(want) & (got64 != want))
    assert not wrong.any(), (
        f"{name} {where}: {int(wrong.sum())} elements differ in kind; first at "
        f"{np.argwhere(wrong)[0].tolist()}: got {got64[wrong][0]}, want {want[wrong][0]}"
    )
    harness.check_output(name, np.where(finite, got64, 0.0).astype(got.dtype), safe, where)


@pytest.mark.parametrize("place", [5, 1030, 2499])
@pytest.mark.parametrize("finite_from", [1024, 2048, 2500])  # before it: nothing, or NaN
def test_nan_among_minus_infinity_reaches_the_row(place, finite_from, isa):
    x = np.full((2, 2500), -np.inf, np.float32)
    x[:, finite_from:] = 1
    x[0, place] = np.nan
    x[1, 2499] = 0  # a row without
    for y in (tw.log_softmax(x), tw.softmax(x)):
        assert np.isnan(y[0]).all()
        assert not np.isnan(y[1]).any()
    target = np.array([2499, 2499])
    assert np.isnan(tw.cross_entropy(x, target))
    assert np.isfinite(tw.cross_entropy(x[1:], target[1:]))


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("width", [1, 5, 16, 33, 64, 200, 768])
def test_rows_of_other_levels_are_no_matter(name, width, isa):
    """A row's maximum, sum and logarithm are its own, however its neighbours lie."""
    op = getattr(tw, name)
    x = np.random.default_rng(width).standard_normal((7, width)).astype(np.float32)
    x += np.float32([0, 1e4, -1e4, 300, -300, 88, 0])[:, None]
    alone = np.concatenate([op(row[None]) for row in x])
    assert np.isfinite(alone).all()
    np.testing.assert_array_equal(op(x), alone)
