"""Every registered op against its float64 reference: cases, dtypes, ISA levels, layouts."""

from __future__ import annotations

import numpy as np
import pytest

import harness
from tilewright.registry import OPS


@pytest.mark.parametrize(("name", "case", "dtype"), harness.typed_cases())
def test_matches_reference(name, case, dtype, isa):
    arguments = harness.inputs(name, case, dtype)
    got = harness.call(OPS[name], arguments)
    where = f"isa={isa} dtype={dtype} case={case}"
    harness.check(name, got, harness.reference(name, case, dtype), where)
    expected = {dtype, np.dtype(np.float32), arguments.get("out_dtype")}
    for out in harness.as_tuple(got):
        assert not harness.is_float(out) or out.dtype in expected, f"{where}: dtype {out.dtype}"


LAYOUTS = {  # a layout, and the dtype that is tested in it
    "reversed": harness.DTYPES["bfloat16"],
    "columns first": harness.DTYPES["float32"],
    "every second": harness.DTYPES["float16"],
}


def strided(x, how):
    """The same values in another layout."""
    if x.ndim == 0:
        return x
    if how == "reversed":
        flip = (slice(None, None, -1),) * x.ndim
        return np.ascontiguousarray(x[flip])[flip]
    if how == "columns first":
        return np.asfortranarray(x)
    if how == "every second":
        spaced = np.zeros((*x.shape[:-1], 2 * x.shape[-1] + 1), x.dtype)
        spaced[..., 1::2] = x
        return spaced[..., 1::2]
    raise ValueError(how)


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize(("name", "case"), harness.all_cases())
def test_layout_does_not_matter(name, case, how, isa):
    dtype = LAYOUTS[how]
    arguments = {
        n: strided(v, how) if isinstance(v, np.ndarray) else v
        for n, v in harness.inputs(name, case, dtype).items()
    }
    got = harness.call(OPS[name], arguments)
    harness.check(
        name, got, harness.reference(name, case, dtype), f"isa={isa} layout={how} case={case}"
    )


@pytest.mark.parametrize(("name", "case", "dtype"), harness.typed_cases(float16=3))
def test_out_is_written_and_nothing_else(name, case, dtype, isa):
    op = OPS[name]
    if "out" not in op.params:
        pytest.skip(f"{name} has no out=")
    arguments = harness.inputs(name, case, dtype)
    found = harness.call(op, arguments)
    plain = harness.as_tuple(found)
    frames = [np.full([n + 2 for n in np.shape(p)] or [3], 77, np.asarray(p).dtype) for p in plain]
    views = tuple(
        frame[tuple(slice(1, -1) for _ in frame.shape)] if np.ndim(p) else frame[1:2].reshape(())
        for frame, p in zip(frames, plain, strict=True)
    )
    got = harness.call(op, {**arguments, "out": harness.as_out(views, found)})
    for result, view, frame, want in zip(harness.as_tuple(got), views, frames, plain, strict=True):
        assert result is view, f"{name}: the result is not out"
        assert harness.same_bits(view, want), (
            f"{name} isa={isa} case={case}: out differs from the plain result"
        )
        view[...] = 77
        assert (frame == 77).all(), f"{name} isa={isa} case={case}: wrote outside of out"
