"""int8: integers bit-equal to NumPy's, quantization bit-equal to its formula, on every level."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import harness
import tilewright as tw
from tilewright import _core

BF16 = np.dtype(ml_dtypes.bfloat16)
# widths of a pair, a vector of words and a block of K (512 elements), and their neighbours
K_TAILS = [0, 1, 2, 3, 31, 63, 64, 65, 255, 257, 511, 512, 513, 1025]
EXTREMES = {np.int8: (-128, 127), np.uint8: (0, 255)}


def integers(rng, dtype, shape):
    low, high = EXTREMES[dtype]
    return rng.integers(low, high + 1, shape).astype(dtype)


def exact(a, b):
    return np.matmul(a.astype(np.int32), b.astype(np.int32))


def layouts(x):
    """The same values: as they are, transposed in memory, reversed, every second element."""
    spaced = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    spaced[..., ::2] = x
    flip = (slice(None, None, -1),) * x.ndim
    return [x, np.asfortranarray(x), np.ascontiguousarray(x[flip])[flip], spaced[..., ::2]]


# --- int8_matmul ----------------------------------------------------------------------------------


@pytest.mark.parametrize("a_type", [np.int8, np.uint8])
@pytest.mark.parametrize("K", K_TAILS)
def test_product_is_exact(K, a_type, isa, rng):
    for M, N in [(1, 1), (2, 33), (5, 7), (13, 31), (14, 32), (29, 97)]:
        a, b = integers(rng, a_type, (M, K)), integers(rng, np.int8, (K, N))
        want = exact(a, b)
        for left, right in zip(layouts(a), layouts(b), strict=True):
            for b_or_packed in (right, tw.pack(right)):
                got = tw.int8_matmul(left, b_or_packed)
                assert got.dtype == np.int32
                np.testing.assert_array_equal(got, want, err_msg=f"{M}x{N}x{K} {left.strides}")


@pytest.mark.parametrize("K", [2, 65, 1025])
def test_extremes_do_not_saturate(K, isa):
    for a_type, extremes in EXTREMES.items():
        for x in extremes:
            for y in EXTREMES[np.int8]:
                a, b = np.full((15, K), x, a_type), np.full((K, 33), y, np.int8)
                assert (tw.int8_matmul(a, b) == x * y * K).all(), (a_type, x, y)


def test_overflow_wraps_as_numpy_does(isa):
    K = 70_000  # 255 * 127 * K > 2^31
    a, b = np.full((2, K), 255, np.uint8), np.full((K, 3), 127, np.int8)
    want = (255 * 127 * K + 2**31) % 2**32 - 2**31
    assert want < 0
    assert (tw.int8_matmul(a, b) == want).all()


def test_batches_broadcast(isa, rng):
    for a_shape, b_shape in [
        ((3, 4, 7, 9), (9, 5)),
        ((3, 4, 7, 9), (4, 9, 5)),
        ((3, 1, 7, 9), (4, 9, 5)),
        ((7, 9), (2, 3, 9, 5)),
        ((0, 7, 9), (9, 5)),
        ((2, 0, 9), (9, 5)),
        ((2, 7, 9), (9, 0)),
    ]:
        a, b = integers(rng, np.int8, a_shape), integers(rng, np.int8, b_shape)
        np.testing.assert_array_equal(tw.int8_matmul(a, b), exact(a, b))
        np.testing.assert_array_equal(
            tw.int8_matmul(a.swapaxes(-1, -2).copy().swapaxes(-1, -2), b), exact(a, b)
        )


def test_out_of_any_strides(isa, rng):
    a, b = integers(rng, np.int8, (17, 33)), integers(rng, np.int8, (33, 35))
    frame = np.full((2 * 17, 35), 77, np.int32)
    assert tw.int8_matmul(a, b, out=frame[::2]) is not None
    np.testing.assert_array_equal(frame[::2], exact(a, b))
    assert (frame[1::2] == 77).all()
    columns = np.empty((35, 17), np.int32).T
    tw.int8_matmul(a, b, out=columns)
    np.testing.assert_array_equal(columns, exact(a, b))


def test_any_thread_count(isa, threads, rng):
    a, b = integers(rng, np.uint8, (201, 600)), integers(rng, np.int8, (600, 333))
    want = exact(a, b)
    for n in (1, 2, 3, 5):
        threads(n)
        np.testing.assert_array_equal(tw.int8_matmul(a, b), want)


# --- quantize, dequantize -------------------------------------------------------------------------


def formula(x, axis):
    """Scales and integers, in NumPy float32."""
    x = x.astype(np.float32)
    others = tuple(d for d in range(x.ndim) if axis is None or d != axis % x.ndim)
    amax = np.max(abs(x), axis=others, keepdims=True, initial=0)
    scale = amax / np.float32(127)
    scale[scale == 0] = 1
    assert scale.dtype == np.float32
    q = np.clip(np.rint(x / scale), -127, 127).astype(np.int8)
    return q, scale.reshape(()) if axis is None else scale.ravel()


def assert_formula(x, axis):
    q, (want, scale) = tw.quantize(x, axis=axis), formula(x, axis)
    assert q.shape == x.shape
    assert q.scale.shape == scale.shape
    np.testing.assert_array_equal(q.scale, scale)
    np.testing.assert_array_equal(q.data, want)


@pytest.mark.parametrize(
    "shape", [(1,), (0, 3), (257,), (5, 70), (130, 33), (3, 4, 37), (2, 70_001)]
)
def test_quantize_is_its_formula(shape, dtype, isa, rng):
    x = (rng.standard_normal(shape) * rng.uniform(0.01, 100, shape[-1])).astype(dtype)
    for view in layouts(x):
        for axis in [None, *range(-1, len(shape))]:
            assert_formula(view, axis)
    assert_formula(np.broadcast_to(x, (3, *shape)), 0)


def test_quantize_rounds_ties_to_even(isa):
    x = np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 125.5, -127], np.float32)
    q = tw.quantize(x)
    assert q.scale == 1
    assert q.data.tolist() == [127, 0, 2, 2, 0, -2, 126, 126, -127]


@pytest.mark.parametrize("amax", [127, 1, 3.1, 1e-30, 1e30, 1.2e-38, 3e38])
def test_quantize_beside_ties(amax, isa):
    """Quotients on and next to n + 1/2, in rows as long as several vectors."""
    scale = np.float32(amax) / np.float32(127)
    ties = (np.arange(-127, 127, dtype=np.float32) + np.float32(0.5)) * scale
    rows = [ties, *(np.nextafter(ties, np.float32(end)) for end in (-np.inf, np.inf))]
    x = np.stack([np.append(row, np.float32([amax, -amax])) for row in rows]).astype(np.float32)
    for axis in (None, 0):
        assert_formula(x, axis)


def test_quantize_of_tiny_and_zero(isa):
    tiny = np.float32(1e-45)
    for value in (np.float32(0), tiny, tiny * 50, tiny * 190, np.float32(1.2e-38)):
        assert_formula(np.array([value, -value / 2, 0], np.float32), None)
    huge = np.finfo(np.float32).max
    assert_formula(np.array([huge, -huge, 1], np.float32), None)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_marks_its_channel_and_no_other(value, dtype, isa, rng):
    x = rng.standard_normal((5, 37)).astype(dtype)
    clean = tw.quantize(x, axis=0)
    for at in (0, 15, 36):
        y = x.copy()
        y[2, at] = value
        q = tw.quantize(y, axis=0)
        assert not np.isfinite(q.scale[2])
        assert (q.data[2] == 0).all()
        others = [0, 1, 3, 4]
        np.testing.assert_array_equal(q.data[others], clean.data[others])
        np.testing.assert_array_equal(q.scale[others], clean.scale[others])
        assert np.isnan(tw.dequantize(q)[2]).all()
        assert not np.isfinite(tw.quantize(y).scale)


def test_dequantize_is_one_product(dtype, isa, rng):
    x = rng.standard_normal((6, 5, 39)).astype(np.float32)
    for axis in (None, 0, 1, 2):
        q = tw.quantize(x, axis=axis)
        shape = [1, 1, 1]
        if axis is not None:
            shape[axis] = -1
        want = q.data.astype(np.float32) * q.scale.reshape(shape)
        np.testing.assert_array_equal(tw.dequantize(q), want)
        np.testing.assert_array_equal(tw.dequantize(q.T), want.T)
        out = np.empty((6, 39, 5), dtype).swapaxes(1, 2)
        tw.dequantize(q, out=out)
        np.testing.assert_array_equal(out, want.astype(dtype))
        assert (abs(tw.dequantize(q) - x) <= 0.501 * q.scale.reshape(shape)).all()


def test_quantized_array_describes_itself():
    q = tw.quantize(np.ones((3, 5), np.float32), axis=0)
    assert (q.shape, q.axis, q.bits, q.group_size, q.offset) == ((3, 5), 0, 8, None, None)
    assert q.nbytes == 15 + 12
    assert (q.T.shape, q.T.axis) == ((5, 3), 1)
    assert q.T.data.base is q.data or q.T.data.base is q.data.base
    assert repr(q) == "<QuantizedArray (3, 5) int8, a scale per index of axis 0>"


# --- qmatmul --------------------------------------------------------------------------------------


def emulate(a, qb, bias=None, residual=None):
    """y = fma(float(acc), s_a * s_b, bias) + residual in float32; longdouble holds the fma."""
    if isinstance(a, tw.QuantizedArray):
        qa, scale_a, dtype = a.data, np.atleast_1d(a.scale)[:, None], np.float32
    else:
        rows = a.reshape(-1, a.shape[-1])
        qa, scale_a = formula(rows, 0)
        qa, scale_a, dtype = qa.reshape(a.shape), scale_a.reshape(*a.shape[:-1], 1), a.dtype
    acc = exact(qa, qb.data).astype(np.float32)
    scale = scale_a * np.atleast_1d(qb.scale)
    assert acc.dtype == scale.dtype == np.float32
    y = acc.astype(np.longdouble) * scale
    if bias is not None:
        y = y + bias.astype(np.longdouble)
    y = y.astype(np.float32)
    if residual is not None:
        y = y + residual.astype(np.float32)
    return y.astype(dtype)


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 17, 5), (15, 65, 33), (29, 513, 97), (100, 70, 64)]
)
def test_qmatmul_is_its_formula(shape, axis, dtype, isa, rng):
    M, K, N = shape
    a = rng.standard_normal((M, K)).astype(dtype)
    qb = tw.quantize(rng.standard_normal((N, K)).astype(np.float32), axis=axis).T
    bias = rng.standard_normal(N).astype(np.float32)
    residual = rng.standard_normal((M, N)).astype(dtype)
    for left in layouts(a):
        for right in (qb, tw.pack(qb)):
            for extras in ({}, {"bias": bias}, {"bias": bias, "residual": residual}):
                got = tw.qmatmul(left, right, **extras)
                assert got.dtype == dtype
                np.testing.assert_array_equal(got, emulate(a, qb, **extras))
    in_place = residual.copy()
    tw.qmatmul(a, qb, bias=bias, residual=in_place, out=in_place)
    np.testing.assert_array_equal(in_place, emulate(a, qb, bias, residual))


def test_qmatmul_of_quantized_a(isa, rng):
    x = rng.standard_normal((21, 70)).astype(np.float32)
    qb = tw.quantize(rng.standard_normal((33, 70)).astype(np.float32), axis=0).T
    bias = rng.standard_normal(33).astype(np.float32)
    rows = tw.quantize(x, axis=0)
    whole = tw.quantize(x)
    np.testing.assert_array_equal(tw.qmatmul(rows, qb, bias=bias), tw.qmatmul(x, qb, bias=bias))
    np.testing.assert_array_equal(tw.qmatmul(whole, qb, bias=bias), emulate(whole, qb, bias))


def test_qmatmul_row_depends_on_itself_alone(isa, threads, rng):
    a = rng.standard_normal((3, 40, 129)).astype(np.float32)
    qb = tw.quantize(rng.standard_normal((129, 65)).astype(np.float32), axis=1)
    whole = tw.qmatmul(a, qb, activation="gelu")
    for n in (1, 2, 3):
        threads(n)
        for i in (0, 13, 39):
            alone = tw.qmatmul(a[1, i : i + 1], qb, activation="gelu")
            assert harness.same_bits(alone, whole[1, i : i + 1])
    a[1, 13, 7] = np.nan
    a[2, 0, 0] = np.inf
    poisoned = tw.qmatmul(a, qb, activation="gelu")
    bad = np.isnan(poisoned).all(axis=-1)
    assert np.argwhere(bad).tolist() == [[1, 13], [2, 0]]
    np.testing.assert_array_equal(poisoned[~bad], whole[~bad])


def test_qmatmul_batch_that_does_not_merge(isa, rng):
    qb = tw.quantize(rng.standard_normal((20, 24)).astype(np.float32), axis=1)
    a = rng.standard_normal((4, 3, 5, 20)).astype(np.float32).transpose(1, 0, 2, 3)
    out = np.empty((4, 3, 5, 24), np.float32).transpose(1, 0, 2, 3)
    tw.qmatmul(a, qb, out=out)
    np.testing.assert_array_equal(out, emulate(a, qb))


def test_levels_agree_bitwise(rng):
    before = next(name for name, _, _, active in _core.isa_levels() if active)
    a = rng.standard_normal((31, 300)).astype(np.float32)
    w = rng.standard_normal((77, 300)).astype(np.float32)
    bias = rng.standard_normal(77).astype(np.float32)
    found = []
    try:
        for level in harness.SUPPORTED_ISAS:
            tw.set_isa(level)
            found.append(tw.qmatmul(a, tw.quantize(w, axis=0).T, bias=bias, activation="relu"))
    finally:
        tw.set_isa(before)
    assert all(harness.same_bits(y, found[0]) for y in found)


def test_weight_only_is_matmul_of_the_dequantized(dtype, isa, rng):
    a = rng.standard_normal((9, 40)).astype(dtype)
    qb = tw.quantize(rng.standard_normal((40, 17)).astype(np.float32), axis=1)
    want = tw.matmul(a, tw.dequantize(qb), activation="silu", out_dtype=dtype)
    got = tw.qmatmul(a, qb, activation="silu", compute="float")
    assert harness.same_bits(got, want)


# --- errors ---------------------------------------------------------------------------------------


def f32(*shape):
    return np.ones(shape, np.float32)


def s8(*shape):
    return np.ones(shape, np.int8)


Q = tw.quantize(f32(4, 6), axis=1)
ERRORS = [
    (lambda: tw.int8_matmul(f32(3, 4), s8(4, 5)), tw.DtypeError, "int8_matmul: a must be int8 or"),
    (lambda: tw.int8_matmul(s8(3, 4), s8(4, 5).view(np.uint8)), tw.DtypeError, "b must be int8"),
    (lambda: tw.int8_matmul(s8(3, 4), s8(3, 5)), tw.ShapeError, "b must have 4 rows"),
    (lambda: tw.int8_matmul(s8(4), s8(4, 5)), tw.ShapeError, "a must have at least 2 axes"),
    (lambda: tw.int8_matmul(s8(2, 3, 4), s8(3, 4, 5)), tw.ShapeError, "leading axes of b"),
    (lambda: tw.int8_matmul(s8(3, 4), tw.pack(f32(4, 5))), tw.DtypeError, "packed from float32"),
    (
        lambda: tw.matmul(f32(3, 4), tw.pack(Q)),
        tw.DtypeError,
        "matmul: b must be packed from float",
    ),
    (
        lambda: tw.qmatmul(f32(3, 4), tw.pack(f32(4, 5))),
        tw.DtypeError,
        "packed from a QuantizedArray, got one packed from float32",
    ),
    (lambda: tw.qmatmul(f32(3, 4), tw.pack(s8(4, 5))), tw.DtypeError, "from a QuantizedArray"),
    (lambda: tw.int8_matmul(s8(3, 4), s8(4, 5), out=f32(3, 5)), tw.DtypeError, "out must be int32"),
    (lambda: tw.qmatmul(f32(3, 4), f32(4, 6)), tw.DtypeError, "qb must be a QuantizedArray"),
    (lambda: tw.qmatmul(f32(3, 5), Q), tw.ShapeError, "qb must have 5 rows"),
    (lambda: tw.qmatmul(f32(3, 6), Q.T), tw.UnsupportedError, "pass q.T"),
    (lambda: tw.qmatmul(s8(3, 4), Q), tw.DtypeError, "a must be float32, bfloat16 or float16"),
    (lambda: tw.qmatmul(f32(3, 4), Q, bias=f32(5)), tw.ShapeError, "bias must have shape"),
    (lambda: tw.qmatmul(f32(3, 4), Q, residual=f32(3, 5)), tw.ShapeError, "residual must have"),
    (
        lambda: tw.qmatmul(f32(3, 4), Q, activation="tanh"),
        tw.UnsupportedError,
        "qmatmul: activation",
    ),
    (lambda: tw.qmatmul(f32(3, 4), Q, compute="int4"), tw.UnsupportedError, "compute must be"),
    (lambda: tw.qmatmul(tw.quantize(f32(3, 4), axis=1), Q), tw.UnsupportedError, "a must have one"),
    (lambda: tw.quantize(f32(3), axis=1), tw.ShapeError, "axis must name"),
    (lambda: tw.quantize(np.ones(3)), tw.DtypeError, "use x.astype"),
    (lambda: tw.quantize([1.0]), tw.DtypeError, "x must be an array"),
    (lambda: tw.dequantize(s8(3)), tw.DtypeError, "q must be a QuantizedArray"),
    (lambda: tw.dequantize(Q, out=f32(6, 4)), tw.ShapeError, "out must have shape"),
    (lambda: tw.QuantizedArray(f32(3), 1.0), tw.DtypeError, "data must be an int8 or"),
    (lambda: tw.QuantizedArray(s8(3, 2), f32(3), 1), tw.ShapeError, "scale must have shape"),
    (lambda: tw.pack(Q.T), tw.UnsupportedError, "pack: b must have one scale"),
    (lambda: tw.pack(f32(3, 4), prefer="speed"), tw.UnsupportedError, "prefer must be"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[e[2] for e in ERRORS])
def test_error_names_the_argument(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)


@pytest.mark.skipif(len(harness.SUPPORTED_ISAS) < 2, reason="one level: nothing to mix")
def test_packed_for_another_level_is_refused():
    before = next(name for name, _, _, active in _core.isa_levels() if active)
    try:
        tw.set_isa(harness.SUPPORTED_ISAS[0])
        packed = tw.pack(Q)
        tw.set_isa(harness.SUPPORTED_ISAS[1])
        with pytest.raises(tw.UnsupportedError, match="pack it again"):
            tw.qmatmul(f32(3, 4), packed)
    finally:
        tw.set_isa(before)
