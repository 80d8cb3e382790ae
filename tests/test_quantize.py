"""Groups, offsets and 4 bits: quantization bit-equal to its formula, files, hostile arguments."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import tilewright as tw

CHOICES = list(itertools.product([8, 4], [True, False]))
F32 = np.float32


def formula(x, bits, symmetric):
    """(integers, scale, offset) of numbers that share a scale, in NumPy float32."""
    x = x.astype(F32)
    if x.size == 0:
        return np.zeros(x.shape), F32(1), F32(0)
    with np.errstate(all="ignore"):
        if symmetric:
            top, low, offset = 2 ** (bits - 1) - 1, -(2 ** (bits - 1)) + 1, F32(0)
            scale = F32(np.max(abs(x))) / F32(top)
        else:
            top, low, offset = 2**bits - 1, 0, F32(np.min(x))
            scale = F32(F32(np.max(x)) - offset) / F32(top)
        assert scale.dtype == F32
        if scale == 0:
            scale = F32(1)
        if not np.isfinite(scale):
            return np.zeros(x.shape), scale, offset
        return np.clip(np.rint(F32(x - offset) / scale), low, top), scale, offset


def parts_of(shape, axis, group_size):
    """(index of the scale, slices) of everything that shares a scale."""
    if group_size is None and axis is None:
        return [((), ...)]
    kept = [()] if axis is None else [(i,) for i in range(shape[axis])]
    if group_size is None:
        return [(i, (slice(None),) * axis + i) for i in kept]
    along = 0 if axis is None else 1 - axis
    found = []
    for i in kept:
        for g in range(-(-shape[along] // group_size)):
            at = list(i)
            where = list(i)
            at.insert(along, g)
            where.insert(along, slice(g * group_size, (g + 1) * group_size))
            found.append((tuple(at), tuple(where)))
    return found


def rounded_once(scale, integers, offset):
    """scale * integers + offset in float32, also where 64 bits hide the side of a tie."""
    with np.errstate(all="ignore"):
        product = scale * integers  # exact
        total = product + offset
        lost = np.where(
            abs(product) > abs(offset), product - total + offset, offset - total + product
        )
        below, above = (np.nextafter(total, np.longdouble(end)) for end in (-np.inf, np.inf))
        tie = (below.astype(F32) != above.astype(F32)) & (lost != 0)
        return np.where(tie, np.where(lost < 0, below, above), total).astype(F32)


def assert_formula(x, bits, symmetric, axis, group_size=None):
    q = tw.quantize(x, bits=bits, axis=axis, group_size=group_size, symmetric=symmetric)
    assert (q.shape, q.bits, q.axis, q.group_size) == (x.shape, bits, axis, group_size)
    assert (q.offset is None) == symmetric
    assert q.data.dtype == (np.int8 if symmetric else np.uint8)
    integers, floats = q.integers(), tw.dequantize(q)
    assert integers.shape == floats.shape == x.shape
    scales, offsets = np.ones_like(q.scale), np.zeros_like(q.scale)
    wanted, spread, added = np.zeros(x.shape), np.ones(x.shape, F32), np.zeros(x.shape, F32)
    for at, where in parts_of(x.shape, axis, group_size):
        wanted[where], scales[at], offsets[at] = formula(x[where], bits, symmetric)
        spread[where], added[where] = scales[at], offsets[at]
    np.testing.assert_array_equal(q.scale, scales)
    np.testing.assert_array_equal(integers, wanted)
    if not symmetric:
        np.testing.assert_array_equal(q.offset, offsets)
    back = rounded_once(np.longdouble(spread), wanted, np.longdouble(added))
    np.testing.assert_array_equal(floats, back)
    return q


@pytest.mark.parametrize(("bits", "symmetric"), CHOICES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 0), (0, 3), (5, 70), (33, 17), (2, 131), (4, 96)])
def test_quantize_is_its_formula(shape, bits, symmetric, dtype, isa, rng):
    x = (rng.standard_normal(shape) * rng.uniform(0.01, 100, shape[-1]) + 0.3).astype(dtype)
    wide = np.zeros((shape[0], 2 * shape[1] + 1), x.dtype)
    wide[:, 1::2] = x
    for view in (x, np.asfortranarray(x), wide[:, 1::2], x[::-1, ::-1]):
        for axis, group in itertools.product([None, 0, 1], [None, 8, 31, 32]):
            if axis is not None or group is None:
                assert_formula(view, bits, symmetric, axis, group)


@pytest.mark.parametrize(("bits", "symmetric"), CHOICES)
def test_other_numbers_of_axes(bits, symmetric, isa, rng):
    assert_formula(rng.standard_normal(37).astype(F32), bits, symmetric, None, 8)
    assert_formula(rng.standard_normal(37).astype(F32), bits, symmetric, None)
    x = rng.standard_normal((3, 5, 7)).astype(F32)
    for axis in (None, 0, 1, 2):
        assert_formula(x, bits, symmetric, axis)
    if bits == 8:
        assert_formula(np.array(3.5, F32), bits, symmetric, None)
        assert_formula(x[0, 0], bits, symmetric, 0)


@pytest.mark.parametrize(("bits", "symmetric"), CHOICES)
def test_quotients_at_a_tie(bits, symmetric, isa):
    # where x times the reciprocal of the scale rounds to the other side
    top = 2 ** (bits - symmetric) - 1
    halves = np.arange(-top if symmetric else 0, top, dtype=F32) + F32(0.5)
    for scale in (0.1, 1 / 3, 0.7, 3, 1e-3):
        ties = halves * F32(scale)
        around = [np.nextafter(ties, F32(end)) for end in (-9, 9)]
        ends = np.array([top * F32(scale), 0], F32)
        assert_formula(np.tile(np.concatenate([ties, *around, ends]), 5), bits, symmetric, None)


def test_nibbles_lie_along_the_reduced_axis_low_first():
    x = np.array([[-7, 1, 5], [7, 0, -1]], F32)
    q = tw.quantize(x, bits=4, axis=0)
    assert q.data.shape == (2, 2)
    assert q.data.view(np.uint8).tolist() == [[0x19, 0x05], [0x07, 0x0F]]
    assert q.integers().tolist() == x.tolist()
    columns = tw.quantize(x.T, bits=4, axis=1)
    np.testing.assert_array_equal(columns.data, q.data.T)
    unsigned = tw.quantize(np.array([[0, 15, 3, 8]], F32), bits=4, axis=0, symmetric=False)
    assert unsigned.data.tolist() == [[0xF0, 0x83]]


@pytest.mark.parametrize("symmetric", [True, False])
def test_long_odd_groups_share_bytes(symmetric, isa, rng):
    # tasks end within a group, which itself begins in the middle of a byte
    x = rng.standard_normal(100_003).astype(F32)
    assert_formula(x, 4, symmetric, None, 33_001)
    rows = x[:99_999].reshape(3, -1)
    for view, axis in ((rows, 0), (np.asfortranarray(rows).T, 1)):
        assert_formula(view, 4, symmetric, axis, 16_383)


@pytest.mark.parametrize("group_size", [None, 5])
def test_nibbles_go_into_any_memory(group_size, isa, rng):
    x = rng.standard_normal((9, 37)).astype(F32)
    want = tw.quantize(x, bits=4, axis=0, group_size=group_size)
    for base, cut in (
        (np.full((18, 60), 77, np.int8), np.s_[1::2, 3:60:3]),
        (np.full((19, 9), 77, np.int8).T, np.s_[::-1, ::-1]),
        (np.full((40, 11), 77, np.int8).T, np.s_[1:10, 1:20]),
    ):
        memory = base.copy(order="K")
        out = tw.QuantizedArray(
            memory[cut], 0 * want.scale, 0, bits=4, group_size=group_size, shape=x.shape
        )
        tw.quantize(x, bits=4, axis=0, group_size=group_size, out=out)
        np.testing.assert_array_equal(memory[cut], want.data)
        np.testing.assert_array_equal(out.scale, want.scale)
        np.testing.assert_array_equal(tw.dequantize(out), tw.dequantize(want))
        memory[cut] = 77
        np.testing.assert_array_equal(memory, base)


@pytest.mark.parametrize(("bits", "symmetric"), CHOICES)
def test_transposing_is_free(bits, symmetric, rng):
    x = rng.standard_normal((6, 35)).astype(F32)
    for axis, group in ((None, None), (0, None), (1, None), (0, 8), (1, 4)):
        q = tw.quantize(x, bits=bits, axis=axis, group_size=group, symmetric=symmetric)
        t = q.T
        assert t.shape == (35, 6)
        assert t.axis == (None if axis is None else 1 - axis)
        assert np.shares_memory(t.data, q.data)
        assert np.shares_memory(t.scale, q.scale)
        np.testing.assert_array_equal(tw.dequantize(t), tw.dequantize(q).T)
        assert (t.T.along, t.T.axis, t.T.shape) == (q.along, q.axis, q.shape)
    for flat in (tw.quantize(x[0], bits=bits, symmetric=symmetric), tw.quantize(x[0], axis=0)):
        assert flat.T.shape == (35,)  # there may be no reduced axis
        np.testing.assert_array_equal(tw.dequantize(flat.T), tw.dequantize(flat))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("bits", "symmetric"), CHOICES)
def test_nonfinite_marks_its_group_and_no_other(value, bits, symmetric, isa, rng):
    x = rng.standard_normal((5, 37)).astype(F32)
    options = {"bits": bits, "axis": 0, "group_size": 8, "symmetric": symmetric}
    clean = tw.dequantize(tw.quantize(x, **options))
    for at in (0, 15, 36):
        y = x.copy()
        y[2, at] = value
        q = tw.quantize(y, **options)
        assert not np.isfinite(q.scale[2, at // 8])
        assert np.isfinite(np.delete(q.scale.ravel(), 2 * 5 + at // 8)).all()
        hit = np.zeros(x.shape, bool)
        hit[2, at // 8 * 8 : at // 8 * 8 + 8] = True
        assert (q.integers()[hit] == 0).all()
        floats = tw.dequantize(q)
        assert np.isnan(floats[hit]).all()
        np.testing.assert_array_equal(floats[~hit], clean[~hit])


def test_ranges_that_overflow_count_as_infinite(isa):
    huge = np.finfo(F32).max
    q = tw.quantize(np.array([huge, -huge], F32), symmetric=False)
    assert q.scale == np.inf
    assert q.integers().tolist() == [0, 0]
    assert_formula(np.array([huge, 0], F32), 8, False, None)


def test_constant_channels_are_exact(isa):
    x = np.array([[5.3] * 40, [0] * 40, [-1e-45] * 40], F32)
    q = assert_formula(x, 8, False, 0)
    np.testing.assert_array_equal(tw.dequantize(q), x)


def test_error_is_half_a_step(isa, rng):
    x = rng.standard_normal((8, 200)).astype(F32)
    for (bits, symmetric), group in itertools.product(CHOICES, [None, 32]):
        q = tw.quantize(x, bits=bits, axis=0, group_size=group, symmetric=symmetric)
        step = np.repeat(q.scale, 32, 1)[:, :200] if group else q.scale[:, None]
        assert (abs(tw.dequantize(q) - x) <= 0.501 * step).all()


@pytest.mark.parametrize(("bits", "symmetric"), CHOICES)
@pytest.mark.parametrize(("axis", "group_size"), [(0, 8), (1, None), (None, None)])
def test_out(bits, symmetric, axis, group_size, isa, rng):
    x = rng.standard_normal((5, 21)).astype(F32)
    options = {"bits": bits, "axis": axis, "group_size": group_size, "symmetric": symmetric}
    out, want = tw.quantize(0 * x + 1, **options), tw.quantize(x, **options)
    data = out.data
    assert tw.quantize(x, out=out, **options) is out
    assert out.data is data
    np.testing.assert_array_equal(data, want.data)
    np.testing.assert_array_equal(out.scale, want.scale)
    np.testing.assert_array_equal(out.offset, want.offset)


def test_out_of_four_bits_is_checked_before_it_is_written(rng):
    x = rng.standard_normal((4, 8)).astype(F32)
    out = tw.quantize(x, bits=4, axis=0)
    kept = out.data.copy(), out.scale.copy()
    for wrong in (x[:, :7], x[:3], x.T):
        with pytest.raises(tw.ShapeError, match=r"^quantize: out must be a QuantizedArray"):
            tw.quantize(wrong, bits=4, axis=0, out=out)
    square = tw.quantize(x[:, :4], bits=4)  # along axis 1; its transpose along 0
    with pytest.raises(tw.ShapeError, match=r"packed along axis 1, got .* packed along axis 0"):
        tw.quantize(x[:, :4], bits=4, out=square.T)
    unsigned = tw.QuantizedArray(out.data.view(np.uint8), out.scale, 0, bits=4)
    with pytest.raises(tw.ShapeError, match=r"\(4, 8\) int4 packed"):
        tw.quantize(x, bits=4, axis=0, out=unsigned)
    memory = x.copy()
    inside = tw.QuantizedArray(memory.view(np.int8)[:, :4], out.scale, 0, bits=4)
    with pytest.raises(tw.ShapeError, match="out must not share memory with x"):
        tw.quantize(memory, bits=4, axis=0, out=inside)
    out.data.flags.writeable = False
    with pytest.raises(tw.ShapeError, match="data must be writable"):
        tw.quantize(2 * x, bits=4, axis=0, out=out)
    assert np.array_equal(memory, x)
    assert np.array_equal(out.data, kept[0])
    assert np.array_equal(out.scale, kept[1])


def test_describes_itself(rng):
    x = rng.standard_normal((3, 70)).astype(F32)
    q = tw.quantize(x, bits=4, axis=0, group_size=32, symmetric=False)
    assert q.nbytes == 3 * 35 + 2 * 3 * 3 * 4
    assert repr(q) == "<QuantizedArray (3, 70) uint4, a scale per 32 along axis 1, with offsets>"
    assert q.ndim == 2


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "symmetric"), CHOICES)
def test_files_keep_the_bits(bits, symmetric, tmp_path, rng):
    x = rng.standard_normal((6, 35)).astype(F32)
    options = {"bits": bits, "axis": 0, "group_size": 8, "symmetric": symmetric}
    arrays = {"w": tw.quantize(x, **options), "t": tw.quantize(x, **options).T, "x": x}
    arrays["one"] = tw.quantize(x, bits=bits, symmetric=symmetric)
    tw.save(arrays, tmp_path / "a", {"note": "yes"})
    back = tw.load(tmp_path / "a")
    assert list(back) == list(arrays)
    np.testing.assert_array_equal(back.pop("x"), x)
    for name, got in back.items():
        want = arrays[name]
        for field in ("shape", "axis", "along", "bits", "group_size"):
            assert getattr(got, field) == getattr(want, field), (name, field)
        assert got.data.dtype == want.data.dtype
        np.testing.assert_array_equal(got.data, want.data)
        np.testing.assert_array_equal(tw.dequantize(got), tw.dequantize(want))
    assert tw.load_metadata(tmp_path / "a") == {"note": "yes"}
    assert (tmp_path / "a").stat().st_size < sum(a.nbytes for a in arrays.values()) + 2500


DESCRIPTIONS = [
    ("[]", "must be a JSON object"),
    ("{", "is no JSON"),
    ('{"missing": {}}', "'missing'"),
    ('{"w": 3}', "'w'"),
    ('{"w": {"bits": 4, "axis": 0, "along": 1, "group_size": 8}}', "'w'"),
    ('{"w": {"bits": 3, "axis": 0, "along": 1, "group_size": 8, "shape": [6, 35]}}', "bits"),
    ('{"w": {"bits": 4, "axis": 7, "along": 1, "group_size": 8, "shape": [6, 35]}}', "axis"),
    ('{"w": {"bits": 4, "axis": 0, "along": 1, "group_size": 0, "shape": [6, 35]}}', "group_size"),
    ('{"w": {"bits": 4, "axis": 0, "along": 1, "group_size": 8, "shape": [6, 99]}}', "shape"),
    ('{"w": {"bits": 4, "axis": 0, "along": 1, "group_size": 8, "shape": "6"}}', "shape"),
    ('{"w": {"bits": 4, "axis": 0, "along": 1, "group_size": 9, "shape": [6, 35]}}', "scale"),
]


@pytest.mark.parametrize(("text", "message"), DESCRIPTIONS)
def test_hostile_descriptions(text, message, tmp_path, rng):
    q = tw.quantize(rng.standard_normal((6, 35)).astype(F32), bits=4, axis=0, group_size=8)
    arrays = {"w": q.data, "w.scale": q.scale}
    tw.save(arrays, tmp_path / "a", {"tilewright.quantized": text})
    with pytest.raises(tw.FormatError, match=message) as caught:
        tw.load(tmp_path / "a")
    assert str(tmp_path / "a") in str(caught.value)


def test_names_that_collide(tmp_path):
    q = tw.quantize(np.ones(3, F32))
    with pytest.raises(tw.FormatError, match=r"w\.scale"):
        tw.save({"w": q, "w.scale": q.scale}, tmp_path / "a")


# --- errors ---------------------------------------------------------------------------------------


def ones(*shape):
    return np.ones(shape, F32)


def s8(*shape):
    return np.ones(shape, np.int8)


Array = tw.QuantizedArray
ERRORS = [
    (lambda: tw.quantize(ones(4), bits=3), tw.UnsupportedError, "quantize: bits must be 8 or 4"),
    (lambda: tw.quantize(ones(4), bits=4.0), tw.UnsupportedError, "bits must be 8 or 4"),
    (lambda: tw.quantize(ones(4), bits=True), tw.UnsupportedError, "bits must be 8 or 4"),
    (lambda: tw.quantize(ones(4), symmetric="no"), tw.DtypeError, "symmetric must be a bool"),
    (lambda: tw.quantize(ones(4), group_size=0), tw.ShapeError, "group_size must be a positive"),
    (lambda: tw.quantize(ones(4), group_size=-8), tw.ShapeError, "group_size must be a positive"),
    (lambda: tw.quantize(ones(4), group_size=2.0), tw.ShapeError, "group_size must be a positive"),
    (lambda: tw.quantize(ones(4, 4), group_size=2), tw.UnsupportedError, "group_size needs x of"),
    (lambda: tw.quantize(ones(2, 4, 4), axis=0, group_size=2), tw.UnsupportedError, "group_size"),
    (lambda: tw.quantize(ones(4, 4), axis=2), tw.ShapeError, "axis must name one of the axes"),
    (lambda: tw.quantize(ones(4, 4), axis=-3), tw.ShapeError, "axis must name one of the axes"),
    (lambda: tw.quantize(ones(4, 4), axis="0"), tw.ShapeError, "axis must name one of the axes"),
    (lambda: tw.quantize(ones(), axis=0), tw.ShapeError, "axis must name one of the axes"),
    (lambda: tw.quantize(ones(4), bits=4, axis=0), tw.ShapeError, "must have an axis beside"),
    (lambda: tw.quantize(ones(), bits=4), tw.ShapeError, "must have an axis beside"),
    (lambda: tw.quantize(np.ones(4), bits=4), tw.DtypeError, "use x.astype"),
    (lambda: tw.quantize(ones(4), out=tw.quantize(ones(5))), tw.ShapeError, "data must have shape"),
    (
        lambda: tw.quantize(ones(4), symmetric=False, out=tw.quantize(ones(4))),
        tw.ShapeError,
        "out must be a QuantizedArray with",
    ),
    (
        lambda: tw.quantize(ones(4), bits=4, out=tw.quantize(ones(4))),
        tw.ShapeError,
        "out must be a QuantizedArray of 4 bits, got <QuantizedArray",
    ),
    (lambda: tw.quantize(ones(4), out=s8(4)), tw.DtypeError, "out must be a QuantizedArray of 8"),
    (lambda: Array(ones(3), F32(1)), tw.DtypeError, "data must be an int8 or uint8"),
    (lambda: Array(s8(3), np.float64(1)), tw.DtypeError, "scale must be float32"),
    (lambda: Array(s8(3), F32(1), bits=2), tw.UnsupportedError, "bits must be"),
    (lambda: Array(s8(3), F32(1), axis=1), tw.ShapeError, "axis must name"),
    (lambda: Array(s8(3, 2), ones(3), 1), tw.ShapeError, "scale must have shape"),
    (lambda: Array(s8(3, 2), ones(3), 0, along=0), tw.ShapeError, "another axis"),
    (lambda: Array(s8(3, 2), ones(3), 0, offset=ones(2)), tw.ShapeError, "offset must have shape"),
    (lambda: Array(s8(3, 2), ones(3), 0, shape=(3, 4)), tw.ShapeError, "shape must be"),
    (lambda: Array(s8(3, 2), ones(3), 0, bits=4, shape=(3, 5)), tw.ShapeError, "shape must be"),
    (lambda: Array(s8(3, 2), ones(3), 0, group_size=1), tw.ShapeError, "scale must have shape"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=range(len(ERRORS)))
def test_error_names_the_argument(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
