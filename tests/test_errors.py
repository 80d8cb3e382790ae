"""Bad arguments: the right error class, naming the op and the argument; derived from every op's own
cases.

A perturbed call must either raise ShapeError, or be right: the reference decides what broadcasts.
Nothing else may come out of it, and nothing may be written outside of ``out`` (test_forward.py
frames it).
"""

from __future__ import annotations

import re

import numpy as np
import pytest

import harness
import on_device
import tilewright as tw
from tilewright.autograd import Tensor
from tilewright.registry import OPS

FLOAT32 = harness.DTYPES["float32"]


def few_cases():
    """Of each op, small cases that differ in which arguments they pass."""
    found = []
    for op in OPS.values():
        seen = set()
        for case in op.cases:
            arguments = harness.inputs(op.name, case, FLOAT32)
            arrays = {n: v for n, v in arguments.items() if isinstance(v, np.ndarray)}
            if not all(0 < v.size <= 5000 for v in arrays.values()):
                continue
            kind = tuple((n, v.ndim) for n, v in arrays.items())
            if kind not in seen:
                seen.add(kind)
                found += [(op.name, case, n) for n in arrays]
    return [pytest.param(*f, id=f"{f[0]}[{f[1]}]-{f[2]}") for f in found]


arrays_of_cases = pytest.mark.parametrize(("name", "case", "which"), few_cases())


def call_with(name, case, which, value, **more):
    return call_both(name, {**harness.inputs(name, case, FLOAT32), which: value, **more})


def call_both(name, arguments, *, exactly=True):
    """The op's answer; the tape's must be the same, also if it is an error."""
    op = OPS[name]
    if "out" in arguments:  # not for the tape
        return harness.call(op, arguments)
    taped = {
        n: Tensor(v, n in op.grads) if isinstance(v, np.ndarray) else v
        for n, v in arguments.items()
    }
    try:
        plain = harness.call(op, arguments)
    except Exception as error:
        text = f"^{re.escape(str(error))}$" if exactly else None
        with pytest.raises(type(error), match=text):
            harness.call(op, taped)
        raise
    for got, want in zip(
        harness.as_tuple(harness.call(op, taped)), harness.as_tuple(plain), strict=True
    ):
        assert harness.same_bits(got.data, want)
    return plain


def raises(error, name, which):
    """The message starts with the op and speaks of the argument."""
    return pytest.raises(error, match=rf"(?s)^{re.escape(name)}: .*\b{re.escape(which)}\b")


def other_axes(x, axes):
    """The same numbers with more axes in front."""
    return x.reshape((1,) * (axes - x.ndim) + x.shape)


def misaligned(x):
    """The same numbers one byte off their natural alignment."""
    buffer = np.zeros(x.nbytes + 1, np.uint8)
    shifted = buffer[1:].view(x.dtype).reshape(x.shape)
    shifted[...] = x
    return shifted


@arrays_of_cases
def test_wrong_dtype(name, case, which):
    x = harness.inputs(name, case, FLOAT32)[which]
    if harness.is_float(x):
        with raises(tw.DtypeError, name, which) as caught:
            call_with(name, case, which, x.astype(np.float64))
        assert "use x.astype(np.float32)" in str(caught.value)
    with raises(tw.DtypeError, name, which):
        call_with(name, case, which, x.astype(np.complex64))
    with raises(tw.DtypeError, name, which):
        call_with(
            name,
            case,
            which,
            x.astype(x.dtype.newbyteorder(">")) if x.itemsize > 1 else x.astype("M8[s]"),
        )
    with raises(tw.DtypeError, name, which):
        call_with(name, case, which, x.astype(object))


@arrays_of_cases
def test_no_array_at_all(name, case, which):
    x = harness.inputs(name, case, FLOAT32)[which]
    for wrong in (x.tolist(), "text", 3.5, object(), {"a": 1}):
        with raises(tw.DtypeError, name, which):
            call_with(name, case, which, wrong)


@arrays_of_cases
def test_too_many_axes(name, case, which):
    x = harness.inputs(name, case, FLOAT32)[which]
    with raises((tw.DtypeError, tw.ShapeError), name, which):
        call_with(name, case, which, other_axes(x, 9))
    with raises((tw.DtypeError, tw.ShapeError), name, which):
        call_with(name, case, which, other_axes(x, 32))


@arrays_of_cases
def test_misaligned(name, case, which):
    x = harness.inputs(name, case, FLOAT32)[which]
    if x.itemsize == 1:
        pytest.skip("bytes are always aligned")
    with raises((tw.DtypeError, tw.ShapeError), name, which):
        call_with(name, case, which, misaligned(x))
    fields = np.zeros(x.shape, [("pad", "u1"), ("x", x.dtype)])  # strides of 5 bytes
    if x.size > 1:
        with raises((tw.DtypeError, tw.ShapeError), name, which):
            call_with(name, case, which, fields["x"])


def perturbed(x):
    """Arrays that differ from x in one axis, or in their number of axes."""
    for axis in range(x.ndim):
        yield np.concatenate([x, x.take([0], axis)], axis)
        if x.shape[axis] > 1:
            yield x.take(range(x.shape[axis] - 1), axis)
        yield x.take([], axis)
    yield x[None]
    if x.ndim:
        yield np.asarray(x[0])
    yield x.ravel()[:1].reshape(())


@arrays_of_cases
def test_wrong_shape(name, case, which):
    if on_device.device() and (name, which) in on_device.TOLD_BY_DEVICE:
        pytest.skip("nothing reads the device's memory")
    arguments = harness.inputs(name, case, FLOAT32)
    for x in perturbed(arguments[which]):
        changed = {**arguments, which: x}
        try:
            wanted = harness.evaluate(name, changed)
        except IndexError:  # an id without a row: ids of a device are not read by the host,
            if on_device.device():
                continue  # and leave NaN instead (test_emulated.py)
            wanted = None
        except Exception:
            wanted = None  # the reference can't: neither may the op
        try:
            got = call_both(name, changed, exactly=False)  # several may be wrong now
        except tw.ShapeError as error:
            text = str(error)
            assert text.startswith(f"{name}: "), text
            assert any(re.search(rf"\b{n}\b", text) for n in OPS[name].params), text
            continue
        assert wanted is not None, f"{name} {which} of shape {x.shape} was accepted"
        harness.check(name, got, wanted, f"case={case} {which} of shape {x.shape}")


def ops_with_out():
    """(name, case) of ops with out= and one output, on small cases."""
    pairs = {(p.values[0], p.values[1]) for p in few_cases() if "out" in OPS[p.values[0]].params}
    return [
        pytest.param(*p, id=f"{p[0]}[{p[1]}]")
        for p in sorted(pairs)
        if len(harness.reference(*p, FLOAT32)) == 1
    ]


@pytest.mark.parametrize(("name", "case"), ops_with_out())
def test_bad_out(name, case):
    plain = harness.call(OPS[name], harness.inputs(name, case, FLOAT32))
    read_only = np.zeros_like(plain)
    read_only.flags.writeable = False
    with raises(tw.ShapeError, name, "out"):
        call_with(name, case, "out", read_only)
    for wrong in (
        np.zeros((*plain.shape, 2), plain.dtype),
        np.zeros((3, *plain.shape), plain.dtype),
    ):
        with raises(tw.ShapeError, name, "out"):
            call_with(name, case, "out", wrong)
    with raises(tw.DtypeError, name, "out"):
        call_with(name, case, "out", plain.astype(np.float64))
    with raises(tw.DtypeError, name, "out"):
        call_with(name, case, "out", plain.astype(plain.dtype.newbyteorder(">")))
    with raises(tw.DtypeError, name, "out"):
        call_with(name, case, "out", plain.tolist() or [0])
    if plain.size > 1:
        with raises(tw.ShapeError, name, "out"):
            call_with(name, case, "out", np.broadcast_to(np.zeros((), plain.dtype), plain.shape))
        one = np.lib.stride_tricks.as_strided(
            np.zeros(1, plain.dtype), plain.shape, [0] * plain.ndim
        )
        with raises(tw.ShapeError, name, "out"):
            call_with(name, case, "out", one)


@pytest.mark.parametrize(("name", "case"), ops_with_out())
def test_out_overlaps_an_input(name, case):
    arguments = harness.inputs(name, case, FLOAT32)
    plain = harness.call(OPS[name], arguments)
    for which, x in arguments.items():
        if not isinstance(x, np.ndarray) or not x.size:
            continue
        buffer = np.zeros(x.nbytes + plain.nbytes + 64, np.uint8)
        view = buffer[: x.nbytes].view(x.dtype).reshape(x.shape)
        view[...] = x
        last = (
            (x.nbytes - x.itemsize) // plain.itemsize * plain.itemsize
        )  # the last element is shared
        out = buffer[last : last + plain.nbytes].view(plain.dtype).reshape(plain.shape)
        if last == 0 and view.shape == out.shape and which == "residual":
            continue  # exactly the same array: in place
        before = buffer.copy()
        with raises(tw.ShapeError, name, "out"):
            call_with(name, case, which, view, out=out)
        assert (buffer == before).all(), f"{name}: wrote before it raised"


def test_message_reads_like_a_sentence():
    a, b = np.zeros((2, 3), np.float32), np.zeros((4, 5), np.float32)
    with pytest.raises(tw.ShapeError) as caught:
        tw.matmul(a, b)
    assert str(caught.value) == (
        "matmul: b must have 3 rows to match the last axis of a (2, 3), got (4, 5)"
    )
    with pytest.raises(tw.DtypeError) as caught:
        tw.matmul(a.astype(np.float64), b)
    assert str(caught.value) == (
        "matmul: a must be float32, bfloat16 or float16, got float64; use x.astype(np.float32)"
    )


def test_error_classes_are_the_built_in_ones_too():
    assert issubclass(tw.ShapeError, ValueError)
    assert issubclass(tw.DtypeError, TypeError)
    assert issubclass(tw.DeviceError, RuntimeError)
    assert issubclass(tw.UnsupportedError, NotImplementedError)
    assert issubclass(tw.FormatError, ValueError)


@pytest.mark.parametrize("wrong", ["tanh", "", 3, b"relu", ["relu"], True])
def test_unknown_activation(wrong):
    a = np.zeros((2, 2), np.float32)
    with raises(tw.UnsupportedError, "matmul", "activation"):
        tw.matmul(a, a, activation=wrong)


def options_of_ops():
    """(op, argument) of every argument that is no array: numbers, flags, names."""
    found = []
    for op in OPS.values():
        for name, annotation in op.annotations.items():
            if (
                annotation.removesuffix(" | None") != "Any" and name != "return_lse"
            ):  # true or false
                found.append(pytest.param(op.name, name, id=f"{op.name}-{name}"))
    return found


@pytest.mark.parametrize(("name", "which"), options_of_ops())
def test_an_option_of_another_type(name, which):
    cases = OPS[name].cases
    case = next((c for c in cases if which in harness.inputs(name, c, FLOAT32)), cases[0])
    for wrong in (object(), [1.5]):
        with raises((tw.DtypeError, tw.ShapeError, tw.UnsupportedError), name, which):
            call_with(name, case, which, wrong)


@pytest.mark.parametrize("name", [n for n in OPS if "eps" in OPS[n].params])
def test_negative_eps(name):
    for wrong in (-1.0, -1e-30, np.nan):
        with raises(tw.ShapeError, name, "eps"):
            call_with(name, OPS[name].cases[0], "eps", wrong)


@pytest.mark.parametrize("wrong", [0, -1, 1025, 2**31 - 1])
def test_impossible_thread_count(wrong, threads):
    with pytest.raises(tw.ShapeError, match="set_num_threads: n must be"):
        threads(wrong)
