"""qmatmul with 4 bits, groups and offsets: bit-equal to its two formulas, on every level."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

import harness
import tilewright as tw
from tilewright import _core

F32 = np.float32
CHOICES = list(itertools.product([8, 4], [True, False]))
# M, K, N: one row, few, a tile and its neighbours; K around a pair, a group, a block and a panel
SHAPES = [
    (1, 1, 1),
    (2, 3, 5),
    (4, 65, 33),
    (7, 256, 31),
    (9, 257, 64),
    (15, 513, 97),
    (30, 80, 70),
]
GROUPS = [None, 2, 32, 48, 1000]


def weights(rng, K, N, bits, symmetric, group):
    """(K, N) as a transposed (N, K)."""
    w = (rng.standard_normal((N, K)) + 0.2).astype(F32)
    return tw.quantize(w, bits=bits, axis=0, group_size=group, symmetric=symmetric).T


def fma(a, b, c):
    """One rounding, as good as: 64 bits hold any product of floats and nearly any sum."""
    return (a.astype(np.longdouble) * b + c).astype(F32)


def by_groups(qa, scale_a, offset_a, qb, bias=None):
    """The formulas of compute="int8", in NumPy float32."""
    q, K = qb.integers().astype(np.int64), qb.shape[0]
    group = qb.group_size or K or 1
    scale = np.atleast_2d(qb.scale)
    if group >= K and offset_a is None and qb.offset is None:  # one scale a column
        y = (qa.astype(np.int64) @ q).astype(F32)
        return fma(y, F32(scale_a * scale[0]), np.zeros(q.shape[1], F32) if bias is None else bias)
    offset = None if qb.offset is None else np.atleast_2d(qb.offset)
    total = np.zeros((len(qa), qb.shape[1]), F32)
    columns = np.zeros(qb.shape[1], F32)
    for g in range(-(-K // group)):
        k = slice(g * group, (g + 1) * group)
        a = qa[:, k].astype(np.int64)
        total = fma((a @ q[k]).astype(F32), scale[g], total)
        columns = fma(q[k].sum(axis=0).astype(F32), scale[g], columns)
        if offset is not None:
            total = fma(a.sum(axis=1, keepdims=True).astype(F32), offset[g], total)
            columns = fma(np.full_like(columns, len(q[k])), offset[g], columns)
    constant = np.zeros_like(columns) if bias is None else bias
    if offset_a is not None:
        constant = fma(np.broadcast_to(offset_a, (len(qa), 1)), columns, constant)
    return fma(np.broadcast_to(scale_a, (len(qa), 1)), total, constant)


# --- by integers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "symmetric"), CHOICES)
@pytest.mark.parametrize("group", GROUPS)
def test_integers_are_their_formula(group, bits, symmetric, isa, rng):
    if (bits, symmetric, group) == (8, True, None):
        pytest.skip("one scale a column: test_qgemm_exact.py")
    for M, K, N in SHAPES:
        qb = weights(rng, K, N, bits, symmetric, group)
        a, bias = rng.standard_normal((M, K)).astype(F32), rng.standard_normal(N).astype(F32)
        rows = tw.quantize(a, axis=0)
        want = by_groups(rows.data, rows.scale[:, None], None, qb, bias)
        for right in (qb, tw.pack(qb)):
            got = tw.qmatmul(a, right, bias=bias, compute="int8")
            assert harness.same_bits(got, want), (M, K, N)
            assert harness.same_bits(tw.qmatmul(rows, right, bias=bias), want)
        residual = rng.standard_normal((M, N)).astype(F32)
        whole = tw.qmatmul(a, qb, bias=bias, residual=residual, compute="int8", out=residual.copy())
        np.testing.assert_array_equal(whole, want + residual)


@pytest.mark.parametrize(("bits", "symmetric"), CHOICES)
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("axis", [None, 0])
def test_quantized_a_with_offsets(axis, group, bits, symmetric, isa, rng):
    for M, K, N in SHAPES:
        qb = weights(rng, K, N, bits, symmetric, group)
        bias = rng.standard_normal(N).astype(F32)
        for a_bits in (8, 4):
            a = (rng.standard_normal((M, K)) + 1).astype(F32)
            qa = tw.quantize(a, bits=a_bits, axis=axis, symmetric=False)
            scale, offset = (np.atleast_1d(v)[:, None] for v in (qa.scale, qa.offset))
            want = by_groups(qa.integers(), scale, offset, qb, bias)
            assert harness.same_bits(tw.qmatmul(qa, qb, bias=bias), want), (M, K, N)
            assert harness.same_bits(tw.qmatmul(qa, tw.pack(qb), bias=bias), want)
            floats = tw.matmul(tw.dequantize(qa), tw.dequantize(qb), bias=bias)
            assert harness.same_bits(tw.qmatmul(qa, qb, bias=bias, compute="float"), floats)


def test_extremes_do_not_overflow(isa):
    """Every sign of the largest integers, over pairs, groups and a long K."""
    for K, group in ((2, None), (66, 32), (1030, None), (1030, 514)):
        for a_type, x in ((np.int8, -128), (np.int8, 127), (np.uint8, 255)):
            for b_type, bits, y in (
                (np.int8, 8, -128), (np.int8, 8, 127), (np.uint8, 8, 255), (np.uint8, 8, 0),
                (np.int8, 4, -8), (np.int8, 4, 7), (np.uint8, 4, 15),
            ):  # fmt: skip
                lines, count = -(-K // (8 // bits)), 1 if group is None else -(-K // group)
                byte = y if bits == 8 else (y & 15) * 17
                data = np.full((lines, 35), byte % 256, np.uint8).view(b_type)
                scale = np.ones(35 if group is None else (count, 35), F32)
                qb = tw.QuantizedArray(
                    data, scale, 1, bits=bits, group_size=group, shape=(K, 35), offset=0 * scale
                )
                qa = tw.QuantizedArray(np.full((3, K), x, a_type), F32(1), offset=F32(0))
                assert (tw.qmatmul(qa, qb) == x * y * K).all(), (K, group, x, y, bits)


def test_levels_agree_bitwise(rng):
    before = next(name for name, _, _, active in _core.isa_levels() if active)
    a, bias = rng.standard_normal((31, 300)).astype(F32), rng.standard_normal(77).astype(F32)
    for (bits, symmetric), group in itertools.product(CHOICES, [None, 32]):
        qb, found = weights(rng, 300, 77, bits, symmetric, group), []
        try:
            for level in harness.SUPPORTED_ISAS:
                tw.set_isa(level)
                found.append(tw.qmatmul(a, qb, bias=bias, activation="relu", compute="int8"))
        finally:
            tw.set_isa(before)
        assert all(harness.same_bits(y, found[0]) for y in found)


# --- by floats ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "symmetric"), CHOICES)
@pytest.mark.parametrize("group", [None, 1, 7, 32, 300])
def test_floats_are_matmul_of_the_dequantized(group, bits, symmetric, dtype, isa, rng):
    for M, K, N in SHAPES:
        qb = weights(rng, K, N, bits, symmetric, group)
        a = rng.standard_normal((M, K)).astype(dtype)
        options = {"bias": rng.standard_normal(N).astype(F32), "activation": "silu"}
        options["residual"] = rng.standard_normal((M, N)).astype(dtype)
        want = tw.matmul(a, tw.dequantize(qb), out_dtype=dtype, **options)
        for right in (qb, tw.pack(qb)):
            got = tw.qmatmul(a, right, compute="float", **options)
            assert harness.same_bits(got, want), (M, K, N)
        if bits == 4:
            assert harness.same_bits(tw.qmatmul(a, qb, **options), want)


@pytest.mark.parametrize(("bits", "symmetric"), CHOICES)
@pytest.mark.parametrize("group", [None, 7, 64])
def test_few_rows_wherever_they_are(group, bits, symmetric, isa, rng):
    """Up to the panel's way and beyond: in place, misaligned, apart, across, of 16 bits; several
    panels side by side and what is left, several blocks of K and an odd end.
    """
    K, N = 515, 301
    packed = tw.pack(weights(rng, K, N, bits, symmetric, group))
    floats = tw.pack(tw.dequantize(packed), prefer="latency")
    wide = rng.standard_normal((18, 2 * K + 1)).astype(F32)
    across = wide.T.copy().T
    for M in range(1, 18):
        half = wide[:M, :K].astype(ml_dtypes.bfloat16)
        spaced = wide[:M, : 2 * K : 2]
        for a in (spaced.copy(), wide[:M, :K], wide[:M, 1 : K + 1], spaced, across[:M, :K], half):
            rows = np.ascontiguousarray(a, F32)
            want = tw.matmul(rows, floats, out_dtype=a.dtype)
            got = tw.qmatmul(a, packed, compute="float")
            assert harness.same_bits(got, want), (M, a.strides)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_16_bits_are_multiplied_as_the_floats_they_are(kind, isa, threads, rng):
    """Few rows, wherever they are, and more of them; K of several blocks and an odd end."""
    dtype = harness.DTYPES[kind]
    for K, N in ((515, 301), (1, 33), (256, 64)):
        b = rng.standard_normal((N, K)).astype(dtype)
        floats = tw.pack(b.astype(F32).T, prefer="latency")
        wide = rng.standard_normal((40, 2 * K + 1)).astype(F32)
        for right in (b.T, np.ascontiguousarray(b.T), np.repeat(b, 2, 0)[::2].T):
            packed = tw.pack(right, prefer="latency")
            for M in (*range(1, 18), 29, 40):
                threads(1 + M % 2)
                spaced = wide[:M, : 2 * K : 2]
                for a in (spaced.copy(), wide[:M, 1 : K + 1], spaced, spaced.astype(np.float16)):
                    want = tw.matmul(np.ascontiguousarray(a, F32), floats)
                    got = tw.matmul(a, packed, out_dtype=F32)
                    assert harness.same_bits(got, want), (M, K, a.strides)
                half, either = spaced.astype(dtype), tw.pack(right)
                assert harness.same_bits(tw.matmul(half, either), tw.matmul(half, right)), (M, K)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_every_number_of_16_bits_is_widened_exactly(rows, kind, isa):
    numbers = np.arange(2**16, dtype=np.uint16).view(harness.DTYPES[kind]).reshape(2, -1)
    for right in (numbers, np.ascontiguousarray(numbers.T).T):
        packed = tw.pack(right)
        for k in (0, 1):
            a = np.zeros((rows, 2), F32)
            a[:, k] = 1
            with np.errstate(invalid="ignore"):  # there are signalling NaNs
                other = right[1 - k].astype(F32)
                want = right[k].astype(F32) + np.where(np.isfinite(other), 0, np.nan)
            got = tw.matmul(a, packed, out_dtype=F32)
            np.testing.assert_array_equal(got, np.broadcast_to(want, got.shape).astype(F32))


def test_large_ones_have_the_bits_of_the_float32_kernel(isa, rng):
    """Also where a level multiplies float32 of this size by terms."""
    qb = weights(rng, 300, 301, 8, True, None)
    floats = tw.pack(tw.dequantize(qb), prefer="latency")
    for rows in (1, 40):
        a = rng.standard_normal((rows, 300)).astype(F32)
        got = tw.qmatmul(a, qb, compute="float")
        assert harness.same_bits(got, tw.matmul(a, floats))


@pytest.mark.parametrize("compute", ["int8", "float"])
@pytest.mark.parametrize(("bits", "symmetric"), CHOICES)
def test_a_row_depends_on_itself_alone(bits, symmetric, compute, isa, threads, rng):
    a = rng.standard_normal((3, 40, 300)).astype(F32)
    packed = tw.pack(weights(rng, 300, 97, bits, symmetric, 32))
    whole = tw.qmatmul(a, packed, activation="gelu", compute=compute)
    for n in (1, 2, 3):
        threads(n)
        for count, at in ((1, 0), (2, 13), (3, 37), (5, 20), (8, 1), (9, 31), (15, 25), (40, 0)):
            rows = tw.qmatmul(a[1, at : at + count], packed, activation="gelu", compute=compute)
            assert harness.same_bits(rows, whole[1, at : at + count]), (n, count)
        batch = tw.qmatmul(a.transpose(1, 0, 2), packed, activation="gelu", compute=compute)
        assert harness.same_bits(batch, whole.transpose(1, 0, 2))


@pytest.mark.parametrize(("bits", "symmetric"), CHOICES)
def test_layouts_of_the_weights(bits, symmetric, isa, rng):
    """Packed along rows or columns in memory, one scale, views with gaps: the same numbers."""
    w = rng.standard_normal((66, 40)).astype(F32)
    a = rng.standard_normal((5, 66)).astype(F32)
    options = {"bits": bits, "symmetric": symmetric, "group_size": 8}
    rows, columns = tw.quantize(w, axis=1, **options), tw.quantize(w.T.copy(), axis=0, **options).T
    spaced = tw.QuantizedArray(
        np.repeat(rows.data, 2, 1)[:, ::2], np.repeat(rows.scale, 3, 0)[::3], 1, bits=bits,
        group_size=8, shape=(66, 40), offset=None if symmetric else rows.offset,
    )  # fmt: skip
    for compute in ("int8", "float"):
        want = tw.qmatmul(a, rows, compute=compute)
        for other in (columns, spaced, tw.pack(columns), tw.pack(spaced)):
            assert harness.same_bits(tw.qmatmul(a, other, compute=compute), want)
    np.testing.assert_array_equal(tw.dequantize(tw.pack(rows)), tw.dequantize(columns))
    one = tw.quantize(w.T.copy(), bits=bits, symmetric=symmetric).T
    want = tw.matmul(a, tw.dequantize(one))
    assert harness.same_bits(tw.qmatmul(a, tw.pack(one), compute="float"), want)


def test_unsigned_weights_without_offsets(isa, rng):
    """As ONNX files may have them, with or without zero points folded into offsets."""
    a = rng.standard_normal((9, 70)).astype(F32)
    rows = tw.quantize(a, axis=0)
    for bits, group in itertools.product((8, 4), (None, 32)):
        made = weights(rng, 70, 33, bits, False, group)
        options = {"bits": bits, "group_size": group, "shape": (70, 33), "along": 0}
        qb = tw.QuantizedArray(made.data, made.scale, 1, **options)
        zero = tw.QuantizedArray(made.data, made.scale, 1, offset=0 * made.scale, **options)
        want = by_groups(rows.data, rows.scale[:, None], None, zero)
        for right in (qb, zero, tw.pack(qb)):
            assert harness.same_bits(tw.qmatmul(rows, right), want)
            floats = tw.qmatmul(a, right, compute="float")
            np.testing.assert_array_equal(floats, tw.matmul(a, tw.dequantize(qb)))


def test_defaults(rng):
    a = rng.standard_normal((3, 64)).astype(F32)
    for bits, compute in ((8, "int8"), (4, "float")):
        for qb in (weights(rng, 64, 33, bits, True, 32), weights(rng, 64, 33, bits, True, None)):
            want = tw.qmatmul(a, qb, compute=compute)
            assert harness.same_bits(tw.qmatmul(a, qb), want)
            assert harness.same_bits(tw.qmatmul(a, tw.pack(qb, prefer="latency")), want)
    rows = tw.quantize(a, axis=0)
    assert harness.same_bits(tw.qmatmul(rows, qb), tw.qmatmul(a, qb, compute="int8"))


def test_packed_sizes(isa, rng):
    """Two bytes, a byte or half a byte a weight, beside the scales."""
    for dtype in (ml_dtypes.bfloat16, np.float16):
        for K in (256, 257):
            packed = tw.pack(rng.standard_normal((K, 128)).astype(dtype))
            assert (packed.bits, packed.shape) == (0, (K, 128))
            assert packed.nbytes <= 258 * 128 * 2 + 256
    for bits in (8, 4):
        packed = tw.pack(weights(rng, 256, 128, bits, True, 64))
        assert (packed.bits, packed.shape) == (bits, (256, 128))
        assert packed.nbytes <= 256 * 128 * bits // 8 + 4 * 128 * (4 + 1) + 64


def test_nonfinite(isa, rng):
    """A bad row stays a row, a bad group of weights its column."""
    a = rng.standard_normal((6, 64)).astype(F32)
    w = rng.standard_normal((33, 64)).astype(F32)
    for bits, compute in itertools.product((8, 4), ("int8", "float")):
        clean = tw.qmatmul(a, tw.quantize(w, bits=bits, axis=0, group_size=32).T, compute=compute)
        bad_a, bad_w = a.copy(), w.copy()
        bad_a[2, 5], bad_w[7, 40] = np.nan, np.inf
        qb = tw.quantize(bad_w, bits=bits, axis=0, group_size=32).T
        got = tw.qmatmul(bad_a, qb, compute=compute)
        hit = np.zeros(got.shape, bool)
        hit[2], hit[:, 7] = True, True
        assert np.isnan(got[hit]).all()
        np.testing.assert_array_equal(got[~hit], clean[~hit])


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["int8", "float"])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradients_pass_straight_through(compute, activation, dtype, isa, rng):
    qb = weights(rng, 24, 18, 4, False, 8)
    a, residual = (rng.standard_normal(s).astype(dtype) for s in ((2, 5, 24), (2, 5, 18)))
    bias, dy = rng.standard_normal(18).astype(F32), rng.standard_normal((2, 5, 18)).astype(dtype)
    options = {"activation": activation, "compute": compute}
    for right in (qb, tw.pack(qb)):
        x, b, r = (tw.tensor(v, requires_grad=True) for v in (a, bias, residual))
        y = tw.qmatmul(x, right, bias=b, residual=r, **options)
        y.backward(dy)
        plain = tw.qmatmul(a, right, bias=bias, residual=residual, **options)
        assert harness.same_bits(y.data, plain)
        # what goes into the activation's slope
        z = tw.tensor(tw.qmatmul(a, right, bias=bias, compute=compute), requires_grad=True)
        (z if activation is None else tw.gelu(z)).backward(dy)
        if dtype == F32:
            want = tw.matmul(z.grad, tw.dequantize(qb).T)
            assert harness.same_bits(x.grad, want)
            np.testing.assert_allclose(b.grad, z.grad.sum(axis=(0, 1)), rtol=1e-5)
        assert harness.same_bits(r.grad, dy)
        assert x.grad.dtype == dtype


# --- errors ---------------------------------------------------------------------------------------


def f32(*shape):
    return np.ones(shape, F32)


Q4 = tw.quantize(f32(6, 8), bits=4, axis=1, group_size=2)
ODD = tw.quantize(f32(6, 8), axis=1, group_size=3)
ERRORS = [
    (lambda: tw.qmatmul(f32(3, 6), ODD), tw.UnsupportedError, "groups of even size"),
    (lambda: tw.qmatmul(f32(3, 8), Q4.T), tw.UnsupportedError, "pass q.T"),
    (lambda: tw.pack(Q4.T), tw.UnsupportedError, "pack: b must have one scale"),
    (
        lambda: tw.qmatmul(f32(3, 6), tw.quantize(f32(6, 8), bits=4)),
        tw.UnsupportedError,
        "packed along K",
    ),
    (
        lambda: tw.qmatmul(tw.quantize(f32(3, 6), axis=0, group_size=2), Q4),
        tw.UnsupportedError,
        "a must have one scale",
    ),
    (lambda: tw.qmatmul(tw.quantize(f32(3, 6), axis=1), Q4), tw.UnsupportedError, "a must have"),
    (lambda: tw.qmatmul(f32(3, 5), Q4), tw.ShapeError, "qb must have 5 rows"),
    (lambda: tw.qmatmul(f32(3, 7), tw.pack(Q4)), tw.ShapeError, "qb must have 7 rows"),
    (lambda: tw.int8_matmul(f32(3, 6).astype(np.int8), tw.pack(Q4)), tw.DtypeError, "4 bits"),
    (
        lambda: tw.int8_matmul(
            f32(3, 6).astype(np.int8), tw.pack(tw.quantize(f32(6, 8), axis=1, symmetric=False))
        ),
        tw.DtypeError,
        "packed from uint8",
    ),
    (lambda: tw.matmul(f32(3, 6), tw.pack(Q4)), tw.DtypeError, "must be packed from float"),
    (lambda: tw.qmatmul(f32(3, 6), tw.pack(f32(6, 8)), compute="float"), tw.DtypeError, "float32"),
    (lambda: tw.qmatmul(f32(3, 6), Q4, compute="int4"), tw.UnsupportedError, "compute must be"),
    (lambda: tw.dequantize(tw.pack(f32(6, 8))), tw.DtypeError, "packed from a QuantizedArray"),
    (lambda: tw.dequantize(tw.pack(Q4), out=f32(8, 6)), tw.ShapeError, "out must have shape"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=range(len(ERRORS)))
def test_error_names_the_argument(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)


def test_out_may_not_be_the_weights():
    buffer = np.zeros(4 * 3 * 8 + 24, np.uint8)
    data = buffer[-24:].view(np.int8).reshape(3, 8)
    qb = tw.QuantizedArray(data, f32(8), 1, bits=4)
    for first in (4, 24):
        out = buffer[first : first + 96].view(F32).reshape(3, 8)
        with pytest.raises(tw.ShapeError, match="out must not share memory with qb"):
            tw.qmatmul(f32(3, 6), qb, out=out)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("compute", ["int8", "float"])
@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (4, True), (8, False), (4, False)])
def test_products_of_no_terms(bits, symmetric, compute, packed, isa):
    """(M, 0) @ (0, N) is zeros, plus the bias; there is no group and no scale to read."""
    a, bias = np.ones((3, 0), np.float32), np.arange(9, dtype=np.float32)
    for group in (None, 32):
        q = tw.quantize(
            np.ones((9, 0), np.float32), axis=0, group_size=group, bits=bits, symmetric=symmetric
        )
        if group:  # NaN where a scale is read that doesn't exist
            q.scale = np.full(99, np.nan, np.float32)[:0].reshape(9, 0)
            q.offset = None if symmetric else q.scale
        b = tw.pack(q.T) if packed else q.T
        np.testing.assert_array_equal(tw.qmatmul(a, b, compute=compute), np.zeros((3, 9)))
        y = tw.qmatmul(a, b, bias=bias, compute=compute)
        np.testing.assert_array_equal(y, np.broadcast_to(bias, (3, 9)))
