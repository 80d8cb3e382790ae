"""``out=`` on every op: in place for a residual, refused where it shares memory with an input."""

from __future__ import annotations

import numpy as np
import pytest

import harness
import tilewright as tw
from tilewright import _core
from tilewright.registry import OPS

FLOAT32 = harness.DTYPES["float32"]
RESIDUAL = [
    pytest.param(name, case, id=f"{name}[{case}]")
    for name, case in (p.values for p in harness.all_cases())
    if "residual" in OPS[name].params and "residual" in harness.inputs(name, case, FLOAT32)
]


def test_every_op_has_it():
    assert not [name for name, op in OPS.items() if "out" not in op.params]


def first_cases():
    """The first case of each op with arrays that are neither empty nor a single number."""
    found = []
    for name, op in OPS.items():
        for case in op.cases:
            arguments = harness.inputs(name, case, FLOAT32)
            arrays = [v for v in arguments.values() if isinstance(v, np.ndarray)]
            outs = harness.as_tuple(harness.call(op, arguments))
            if all(1 < a.size < 5000 for a in [*arrays, *outs]):
                found.append(pytest.param(name, case, id=f"{name}[{case}]"))
                break
    return found


@pytest.mark.parametrize(("name", "case"), first_cases())
def test_memory_between_the_elements_of_an_input_is_free(name, case, isa):
    """x on the even places of a buffer, out on the odd ones: only their ranges overlap."""
    arguments = harness.inputs(name, case, FLOAT32)
    plain = harness.as_tuple(harness.call(OPS[name], arguments))
    for which, x in arguments.items():
        if not isinstance(x, np.ndarray) or any(x.itemsize != p.itemsize for p in plain):
            continue
        room = max(x.size, sum(p.size for p in plain))
        buffer = np.zeros(2 * room, x.dtype)
        view = buffer[: 2 * x.size : 2].reshape(x.shape)
        view[...] = x
        odd = buffer.view(plain[0].dtype)[1::2]
        ends = np.cumsum([p.size for p in plain])
        outs = tuple(
            odd[end - p.size : end].reshape(p.shape) for p, end in zip(plain, ends, strict=True)
        )
        assert np.shares_memory(buffer, outs[0])
        given = {**arguments, which: view, "out": outs if len(outs) > 1 else outs[0]}
        got = harness.as_tuple(harness.call(OPS[name], given))
        for g, o, p in zip(got, outs, plain, strict=True):
            assert g is o
            assert harness.same_bits(o, p), f"{name} {which}"
        assert (view == x).all()


@pytest.mark.parametrize(("name", "case"), first_cases())
def test_an_input_itself_is_refused(name, case):
    arguments = harness.inputs(name, case, FLOAT32)
    plain = harness.as_tuple(harness.call(OPS[name], arguments))
    for which, x in arguments.items():
        if which == "residual" or not isinstance(x, np.ndarray):
            continue
        for index, p in enumerate(plain):
            if x.shape != p.shape or x.dtype != p.dtype:
                continue
            place = x.copy()
            outs = tuple(place if i == index else np.zeros_like(p) for i, p in enumerate(plain))
            wrap = {
                n: tw.tensor(v) if v is not x and harness.is_float(v) else v
                for n, v in arguments.items()
            }
            for given in (arguments, wrap):
                changed = {**given, which: place, "out": outs if len(outs) > 1 else outs[0]}
                where = "out" if len(outs) == 1 else rf"out\[{index}\]"
                with pytest.raises(tw.ShapeError, match=f"{name}: {where} must not share memory"):
                    harness.call(OPS[name], changed)
            assert (place == x).all(), "wrote before it raised"


@pytest.mark.parametrize(("name", "case"), RESIDUAL)
def test_residual_in_place(name, case, isa):
    for dtype in harness.DTYPES.values():
        arguments = harness.inputs(name, case, dtype)
        plain = harness.as_tuple(harness.call(OPS[name], arguments))
        for index, p in enumerate(plain):
            place = arguments["residual"].copy()
            if place.dtype != p.dtype:
                continue
            outs = tuple(place if i == index else np.zeros_like(q) for i, q in enumerate(plain))
            changed = {**arguments, "residual": place, "out": outs if len(outs) > 1 else place}
            got = harness.as_tuple(harness.call(OPS[name], changed))
            assert got[index] is place
            for g, q in zip(got, plain, strict=True):
                assert harness.same_bits(g, q), f"{name} {dtype} output {index}"
        if plain[0].ndim and plain[0].shape[0] > 1:  # shifted by a row
            rows = np.zeros((len(plain[0]) + 1, *plain[0].shape[1:]), plain[0].dtype)
            outs = (rows[1:], *[np.zeros_like(q) for q in plain[1:]])
            changed = {
                **arguments,
                "residual": rows[:-1],
                "out": outs if len(outs) > 1 else rows[1:],
            }
            if rows.size:
                with pytest.raises(tw.ShapeError, match="unless it is exactly the same array"):
                    harness.call(OPS[name], changed)


def cases_of_several_results():
    """The first case of each op that returns several arrays."""
    found = {}
    for p in harness.all_cases():
        name, case = p.values
        if name not in found and len(harness.reference(name, case, FLOAT32)) > 1:
            found[name] = case
    del found["quantize"]  # several arrays, one result
    return [pytest.param(name, case, id=f"{name}[{case}]") for name, case in found.items()]


@pytest.mark.parametrize(("name", "case"), cases_of_several_results())
def test_each_of_several_results_has_its_place(name, case):
    arguments = harness.inputs(name, case, FLOAT32)
    plain = harness.call(OPS[name], arguments)
    given = [np.zeros_like(p) for p in plain]
    message = f"{name}: out must be a tuple of {len(plain)} arrays"
    for wrong in (given[0], given):
        with pytest.raises(tw.DtypeError, match=message):
            harness.call(OPS[name], {**arguments, "out": wrong})
    for wrong in ((), tuple(given[:1]), (*given, given[0].copy())):
        with pytest.raises(tw.ShapeError, match=message):
            harness.call(OPS[name], {**arguments, "out": wrong})
    assert not any(g.any() for g in given), "wrote before it raised"
    for index in range(len(plain)):  # None: a fresh array
        out = tuple(g if i == index else None for i, g in enumerate(given))
        got = harness.call(OPS[name], {**arguments, "out": out})
        assert got[index] is given[index]
        for g, p in zip(got, plain, strict=True):
            assert harness.same_bits(g, p)


def test_several_results_want_a_tuple():
    x = np.ones((3, 4), FLOAT32)
    y, s = np.zeros_like(x), np.zeros_like(x)
    with pytest.raises(
        tw.DtypeError, match=r"layernorm: out must be a tuple of 2 arrays, \(y, s\)"
    ):
        tw.layernorm(x, residual=x, out=y)
    with pytest.raises(tw.ShapeError, match=r"layernorm: out must be a tuple of 2 arrays.*got 3"):
        tw.layernorm(x, residual=x, out=(y, s, y.copy()))
    with pytest.raises(tw.ShapeError, match=r"layernorm: out\[1\] must not share memory with out"):
        tw.layernorm(x, residual=x, out=(y, y))
    with pytest.raises(tw.DtypeError, match=r"layernorm: out must be float32.* got tuple"):
        tw.layernorm(x, out=(y,))
    found = tw.layernorm(x, residual=x, out=(None, s))  # None: a fresh array
    assert found[1] is s
    assert (s == 2).all()


def test_a_tensor_to_write_to_is_the_result():
    x, y = tw.tensor(np.ones((2, 2), FLOAT32)), tw.tensor(np.zeros((2, 2), FLOAT32))
    assert tw.matmul(x, x, out=y) is y
    assert (y.data == 2).all()
    with pytest.raises(tw.ShapeError, match="matmul: out must not share memory with a"):
        tw.matmul(x, y.data, out=x)


# The test of overlap itself ----------------------------------------------------------------------


def some_view(rng, buffer):
    """A view of the buffer with random dtype, extents, strides and place."""
    items = buffer.view([np.int8, np.float16, np.float32][rng.integers(3)])
    view = items[rng.integers(len(items)) :]
    shape, strides = [], []
    for _ in range(rng.integers(1, 4)):
        shape.append(int(rng.integers(1, 5)))
        strides.append(int(rng.integers(0, 12)) * view.itemsize)
    reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if reach >= view.nbytes:
        return view
    made = np.lib.stride_tricks.as_strided(view, shape, strides)
    flip = tuple(slice(None, None, int(rng.choice([-1, 1]))) for _ in shape)
    return made[flip]


def test_overlap_is_found_exactly(rng):
    buffer = np.zeros(96, np.uint8)
    shared = 0
    for _ in range(4000):
        a, b = some_view(rng, buffer), some_view(rng, buffer)
        want = np.shares_memory(a, b)
        shared += want
        assert bool(_core.overlap(a, b)) == want, (a.__array_interface__, b.__array_interface__)
    assert 1000 < shared < 3900  # both answers were asked for


def test_overlap_of_large_arrays_is_found_quickly():
    big = np.zeros((3000, 3000), FLOAT32)
    assert _core.overlap(big[:, ::2], big[:, 1::2]) == 0
    assert _core.overlap(big[::3, ::3], big[1::3, 5:]) == 0
    assert _core.overlap(big[:, :1500], big[:, 1500:]) == 0
    assert _core.overlap(big[:, :1501], big[:, 1500:]) == 1
    assert _core.overlap(big[::-1], big) == 1
    assert _core.overlap(big, big) == 2
    assert _core.overlap(big.T, big) == 1
    # contrived strides: the search gives up, and says that they may overlap
    odd = [
        np.lib.stride_tricks.as_strided(
            big[0, i:], (50,) * 5, [4 * p for p in (1009, 2003, 3001, 4001, 5003)]
        )
        for i in (0, 1)
    ]
    assert _core.overlap(*odd) == 1


def test_strides_that_meet_are_no_place_for_a_result():
    buffer = np.zeros(20, FLOAT32)
    x = np.ones((3, 3), FLOAT32)
    meets = np.lib.stride_tricks.as_strided(buffer, (3, 3), (4, 8))
    with pytest.raises(tw.ShapeError, match="relu: out must have elements of its own"):
        tw.relu(x, out=meets)
    apart = np.lib.stride_tricks.as_strided(buffer, (3, 3), (4, 12))
    assert (tw.relu(x, out=apart) == 1).all()
    interleaved = np.lib.stride_tricks.as_strided(buffer, (3, 3), (8, 12))  # 0 2 4, 3 5 7, 6 8 10
    assert (tw.relu(x, out=interleaved) == 1).all()
