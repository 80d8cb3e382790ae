"""What attention promises beyond being right: rows stand alone, masks hide, memory is linear."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import tilewright as tw
from tilewright.autograd import backward

LEVELS = [level.name for level in tw.isas() if level.supported]
bfloat16 = ml_dtypes.bfloat16


@pytest.fixture(autouse=True, params=LEVELS)
def level(request):
    tw.set_isa(request.param)
    yield request.param
    tw.set_isa("")


def arrays(B, H, Hkv, Tq, Tk, D, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32).astype(dtype)

    return normal(B, H, Tq, D), normal(B, Hkv, Tk, D), normal(B, Hkv, Tk, D)


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, bfloat16])
@pytest.mark.parametrize(("H", "Hkv", "T", "D"), [(2, 1, 70, 17), (1, 1, 515, 64), (4, 2, 33, 8)])
def test_a_row_of_the_prefill_is_the_row_of_the_decode(H, Hkv, T, D, dtype):
    q, k, v = arrays(1, H, Hkv, T, T, D, dtype)
    whole, lse = tw.attention(q, k, v, causal=True, return_lse=True)
    for i in [*range(0, T, 13), T - 1]:
        n = i + 1
        row, row_lse = tw.attention(
            q[:, :, i:n], k[:, :, :n], v[:, :, :n], causal=True, return_lse=True
        )
        assert same_bits(row, whole[:, :, i:n])
        assert same_bits(row_lse, lse[:, :, i:n])


FEW = {  # H, Hkv, Tq, Tk, D: what reads K and V in place on some level, and its neighbours
    "one head": (1, 1, 1, 129, 64),
    "dims short of a vector": (2, 2, 1, 130, 3),
    "dims off the vector": (2, 1, 1, 127, 37),
    "dims of many vectors": (1, 1, 2, 140, 250),
    "two rows": (2, 2, 2, 513, 24),
    "four rows": (3, 3, 4, 300, 65),
    "a group": (6, 2, 1, 512, 40),
    "a group of rows": (4, 2, 3, 511, 17),
    "more than one call": (8, 1, 1, 260, 33),
    "four calls": (16, 2, 2, 200, 12),
    "one key": (2, 2, 1, 1, 20),
    "a block less one": (2, 1, 2, 127, 16),
    "a block": (2, 1, 2, 128, 16),
    "a chunk and a key": (2, 1, 1, 513, 16),
    "two chunks and a key": (2, 1, 2, 1025, 19),
}


def few(name, dtype, B=2):
    """q, k, v and Tq: q has 40 rows, too many for the path of few; its last Tq are the case's."""
    H, Hkv, Tq, Tk, D = FEW[name]
    q, k, v = arrays(B, H, Hkv, 40, Tk, D, dtype)
    return q, k, v, Tq


def last_rows(whole, Tq):
    return [np.ascontiguousarray(x[:, :, -Tq:]) for x in whole]


@pytest.mark.parametrize("dtype", [np.float32, bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", FEW)
def test_few_rows_are_the_rows_of_a_prefill(case, causal, dtype):
    q, k, v, Tq = few(case, dtype)
    whole = tw.attention(q, k, v, causal=causal, return_lse=True)
    got = tw.attention(q[:, :, -Tq:], k, v, causal=causal, return_lse=True)
    for a, b in zip(got, last_rows(whole, Tq), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("case", FEW)
def test_few_rows_with_lengths_see_nothing_beyond_them(case):
    q, k, v, Tq = few(case, np.float32, B=4)
    Tk = k.shape[2]
    lengths = np.array([Tk, Tk // 2, 0, 1])
    whole = tw.attention(q, k, v, causal=True, kv_lengths=lengths, return_lse=True)
    for b, n in enumerate(lengths):
        k[b, :, n:] = np.nan
        v[b, :, n:] = np.inf
    got = tw.attention(q[:, :, -Tq:], k, v, causal=True, kv_lengths=lengths, return_lse=True)
    for a, b in zip(got, last_rows(whole, Tq), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("case", FEW)
def test_few_rows_with_a_mask_or_in_any_layout(case):
    q, k, v, Tq = few(case, np.float32)
    row = q[:, :, -Tq:]
    want = tw.attention(row, k, v)
    visible = np.ones((1, 1, 1, k.shape[2]), bool)
    assert same_bits(tw.attention(row, k, v, mask=visible), want)
    apart = [np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2) for x in (row, k, v)]
    assert same_bits(tw.attention(*apart), want)
    backwards = [np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1] for x in (k, v)]
    assert same_bits(tw.attention(row, *backwards), want)
    visible[..., 0] = False
    whole = tw.attention(q, k, v, mask=visible)
    assert same_bits(tw.attention(row, k, v, mask=visible), last_rows([whole], Tq)[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_few_rows_meet_nan_and_inf_as_a_prefill_does(where, bad):
    q, k, v = arrays(1, 2, 2, 40, 700, 20)
    k[:, :, 5] = 50 * np.sign(q[:, :, -1])  # so large that most of the last row's weights vanish
    {"q": q, "k": k, "v": v}[where][:, 1, -1, 3] = bad
    whole = tw.attention(q, k, v, causal=True, return_lse=True)
    got = tw.attention(q[:, :, -2:], k, v, causal=True, return_lse=True)
    for a, b in zip(got, last_rows(whole, 2), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("Tk", [40, 511, 513, 1100])
def test_right_padding_and_neighbours_do_not_change_a_row(Tk):
    q, k, v = arrays(3, 4, 2, 5, Tk + 64, 24)
    lengths = np.array([Tk, Tk - 3, Tk + 64])
    batch = tw.attention(q, k, v, causal=True, kv_lengths=lengths)
    for b, n in enumerate(lengths):
        alone = tw.attention(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], causal=True)
        assert same_bits(alone, batch[b : b + 1])


def test_rows_by_themselves_or_together():
    q, k, v = arrays(2, 2, 2, 50, 1100, 16)
    together = tw.attention(q, k, v)
    apart = [tw.attention(q[:, :, i : i + 1], k, v) for i in range(50)]
    assert same_bits(np.concatenate(apart, axis=2), together)


def test_any_number_of_threads_gives_the_same_bits():
    q, k, v = arrays(2, 3, 1, 200, 700, 32)
    before = tw.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 7):
            tw.set_num_threads(n)
            results.append(tw.attention(q, k, v, causal=True))
            results.append(tw.attention(q[:1, :, -1:], k[:1], v[:1]))
    finally:
        tw.set_num_threads(before)
    assert all(same_bits(results[0], r) for r in results[::2])
    assert all(same_bits(results[1], r) for r in results[1::2])


def test_a_masked_tile_leaves_no_trace():
    q, k, v = arrays(1, 2, 2, 9, 900, 16)
    mask = np.ones(900, bool)
    mask[128:640] = False
    kept = np.concatenate([np.arange(128), np.arange(640, 900)])
    # what the mask hides may as well be anything
    other_k, other_v = k.copy(), v.copy()
    other_k[:, :, 128:640] = 1e30
    other_v[:, :, 128:640] = -1e30
    assert same_bits(tw.attention(q, k, v, mask=mask), tw.attention(q, other_k, other_v, mask=mask))
    want = tw.attention(q, k[:, :, kept], v[:, :, kept])
    np.testing.assert_allclose(tw.attention(q, k, v, mask=mask), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["causal", "bool", "add", "lengths"])
def test_nan_and_inf_in_masked_positions_do_not_leak(kind, bad):
    B, H, T, D = 2, 2, 40, 16
    q, k, v = arrays(B, H, H, T, T, D)
    hidden = np.zeros((T, T), bool)
    kwargs = {}
    if kind == "causal":
        kwargs["causal"] = True
        hidden = ~np.tril(np.ones((T, T), bool))
        at = 21
    elif kind == "lengths":
        kwargs["kv_lengths"] = np.array([30, 30])
        hidden[:, 30:] = True
        at = 33
    else:
        hidden[:, 7] = True
        hidden[5:9, 11] = True
        kwargs["mask"] = (
            ~hidden if kind == "bool" else np.where(hidden, -np.inf, 0).astype(np.float32)
        )
        at = 7 if kind == "bool" else 11
    clean = tw.attention(q, k, v, **kwargs)
    for name in ("k", "v"):
        x = {"k": k.copy(), "v": v.copy()}
        x[name][:, :, at] = bad
        got = tw.attention(q, x["k"], x["v"], **kwargs)
        rows = hidden[:, at]
        assert same_bits(got[:, :, rows], clean[:, :, rows])
        if not rows.all():
            seen = got[:, :, ~rows]
            assert not np.isfinite(seen).all() or (name == "k" and bad != np.nan)


def test_a_fully_masked_row_is_zero():
    q, k, v = arrays(2, 2, 1, 6, 20, 8)
    mask = np.ones((2, 1, 6, 20), bool)
    mask[0, 0, 3] = False
    out, lse = tw.attention(q, k, v, mask=mask, return_lse=True)
    assert not out[0, :, 3].any()
    assert (lse[0, :, 3] == -np.inf).all()
    assert np.isfinite(out).all()
    assert np.isfinite(np.delete(lse[0], 3, axis=1)).all()
    out, lse = tw.attention(q, k, v, kv_lengths=np.array([0, 2]), causal=True, return_lse=True)
    assert not out[0].any()
    assert not out[1, :, :4].any()
    assert (lse[0] == -np.inf).all()
    assert np.isfinite(lse[1, :, 4:]).all()


def test_lse_is_the_logarithm_of_the_sum():
    q, k, v = arrays(1, 2, 2, 7, 600, 16)
    _, lse = tw.attention(q, k, v, return_lse=True)
    scores = q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2) / 4
    np.testing.assert_allclose(lse, np.log(np.exp(scores).sum(-1)), rtol=1e-6)


def test_any_strides():
    q, k, v = arrays(2, 6, 2, 9, 37, 12)
    want = tw.attention(q, k, v, causal=True)

    def relaid(x):  # (B, T, H, D) in memory, as a projection leaves it; and backwards along D
        return np.ascontiguousarray(x.transpose(0, 2, 1, 3)[..., ::-1])[..., ::-1].transpose(
            0, 2, 1, 3
        )

    out = np.empty((2, 9, 6, 12), np.float32).transpose(0, 2, 1, 3)
    got = tw.attention(relaid(q), relaid(k), relaid(v), causal=True, out=out)
    assert got is out
    assert same_bits(np.ascontiguousarray(got), want)
    short = tw.attention(relaid(q)[:, :, -2:], relaid(k), relaid(v), causal=True)
    assert same_bits(np.ascontiguousarray(short), np.ascontiguousarray(want[:, :, -2:]))


OPTIONS = {  # what shapes the scores, as functions of the number of heads
    "window": lambda H: {"window": (37, 5)},
    "window of one": lambda H: {"window": (0, 0)},
    "window before": lambda H: {"window": (130, None), "causal": True},
    "window behind": lambda H: {"window": (-1, 3)},
    "softcap": lambda H: {"softcap": 1.5, "causal": True},
    "alibi": lambda H: {"alibi_slopes": slopes(H)},
    "all": lambda H: {"window": (260, 2), "softcap": 2.0, "alibi_slopes": slopes(H)},
}


def slopes(H):
    """Powers of two, as ALiBi has them: times a distance they are exact."""
    return np.exp2(-np.arange(1, H + 1)).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", FEW)
def test_few_rows_are_the_rows_of_a_prefill_with_options(case, options, dtype):
    q, k, v, Tq = few(case, dtype)
    kwargs = OPTIONS[options](q.shape[1])
    whole = tw.attention(q, k, v, **kwargs, return_lse=True)
    got = tw.attention(q[:, :, -Tq:], k, v, **kwargs, return_lse=True)
    for a, b in zip(got, last_rows(whole, Tq), strict=True):
        assert same_bits(a, b)
    n = np.array([k.shape[2], (k.shape[2] + 1) // 2])
    whole = tw.attention(q, k, v, **kwargs, kv_lengths=n)
    got = tw.attention(q[:, :, -Tq:], k, v, **kwargs, kv_lengths=n)
    assert same_bits(got, last_rows([whole], Tq)[0])
    alone = tw.attention(q[1:, :, -Tq:], k[1:, :, : n[1]], v[1:, :, : n[1]], **kwargs)
    assert same_bits(alone, got[1:])


@pytest.mark.parametrize(("Tq", "Tk"), [(70, 70), (3, 700), (1, 900), (90, 40), (600, 600)])
@pytest.mark.parametrize("window", [(0, 0), (5, 2), (None, 4), (9, -1), (140, 0), (300, 700)])
def test_a_window_is_a_mask_of_which_nothing_is_computed(Tq, Tk, window):
    """The same bits, gradients included: a masked tile leaves no trace, so it can be left out."""
    q, k, v = arrays(1, 2, 1, Tq, Tk, 16)
    dout = arrays(1, 2, 1, Tq, 1, 16, seed=1)[0]
    behind = np.arange(Tq)[:, None] + Tk - Tq - np.arange(Tk)
    left, right = (np.inf if n in (None, -1) else n for n in window)
    mask = (behind <= left) & (behind >= -right)
    for got, want in zip(
        (
            *tw.attention(q, k, v, window=window, return_lse=True),
            *gradients(q, k, v, dout, window=window),
        ),
        (*tw.attention(q, k, v, mask=mask, return_lse=True), *gradients(q, k, v, dout, mask=mask)),
        strict=True,
    ):
        assert same_bits(got, want)
    causal = tw.attention(q, k, v, mask=mask & (behind >= 0))
    assert same_bits(tw.attention(q, k, v, window=window, causal=True), causal)


@pytest.mark.parametrize(("Tq", "Tk"), [(70, 70), (2, 700), (150, 300)])
def test_alibi_is_an_additive_mask(Tq, Tk):
    q, k, v = arrays(2, 4, 2, Tq, Tk, 16)
    dout = arrays(2, 4, 1, Tq, 1, 16, seed=1)[0]
    each = np.stack([slopes(4), slopes(4)[::-1]])
    lengths = np.array([Tk, Tk - 7])
    behind = (lengths[:, None] - Tq + np.arange(Tq))[..., None] - np.arange(Tk)
    bias = -each[..., None, None] * abs(behind[:, None]).astype(np.float32)
    alibi = {"alibi_slopes": each, "kv_lengths": lengths, "causal": True}
    added = {"mask": bias, "kv_lengths": lengths, "causal": True}
    for got, want in zip(
        (tw.attention(q, k, v, **alibi), *gradients(q, k, v, dout, **alibi)),
        (tw.attention(q, k, v, **added), *gradients(q, k, v, dout, **added)),
        strict=True,
    ):
        assert same_bits(got, want)
    same = tw.attention(q, k, v, alibi_slopes=slopes(4))
    assert same_bits(same, tw.attention(q, k, v, alibi_slopes=np.stack([slopes(4)] * 2)))


def test_a_large_softcap_changes_little_and_a_small_one_bounds():
    q, k, v = arrays(1, 2, 2, 9, 40, 16)
    plain, lse = tw.attention(q, k, v, return_lse=True)
    assert same_bits(tw.attention(q, k, v, softcap=0), plain)
    np.testing.assert_allclose(tw.attention(q, k, v, softcap=1e4), plain, rtol=1e-4, atol=1e-5)
    _, lse = tw.attention(q * 1e4, k, v, softcap=0.25, return_lse=True)
    assert (abs(lse - np.log(40)) <= 0.25).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("Tq", [1, 3, 40])
@pytest.mark.parametrize("options", ["window", "all"])
def test_nan_and_inf_outside_a_window_do_not_leak(options, Tq, bad):
    q, k, v = arrays(1, 2, 1, Tq, 600, 16)
    dout = arrays(1, 2, 1, Tq, 1, 16, seed=1)[0]
    kwargs = OPTIONS[options](2)
    left = kwargs["window"][0]
    clean = (tw.attention(q, k, v, **kwargs), *gradients(q, k, v, dout, **kwargs))
    k[:, :, : 600 - Tq - left] = bad
    v[:, :, : 600 - Tq - left] = bad
    for a, b in zip(
        (tw.attention(q, k, v, **kwargs), *gradients(q, k, v, dout, **kwargs)), clean, strict=True
    ):
        assert same_bits(a, b)
    row = tw.attention(q[:, :, :1], k, v, window=(left + Tq - 1, -1))  # stands Tq - 1 further on
    assert np.isfinite(row).all()


@pytest.mark.parametrize("Tq", [1, 2, 130])
def test_keys_outside_a_window_are_not_even_read(Tq, level):
    """K and V on pages that may not be read, but for the tiles that the window meets."""
    program = f"""
import ctypes, mmap
import numpy as np
import tilewright as tw
tw.set_isa({level!r})
T, D, seen = 8192, 16, {Tq} + 100
def guarded():
    pages = mmap.mmap(-1, T * D * 4)
    x = np.frombuffer(pages, np.float32).reshape(1, 1, T, D)
    x[...] = np.random.default_rng(0).standard_normal(x.shape)
    hidden = (T - seen) // 256 * 256 * D * 4
    address = ctypes.c_void_p(x.ctypes.data)
    assert hidden % mmap.PAGESIZE == 0 < hidden
    assert ctypes.CDLL(None).mprotect(address, ctypes.c_size_t(hidden), 0) == 0
    return x
q = np.ones((1, 1, {Tq}, D), np.float32)
k, v = guarded(), guarded()
out = tw.attention(q, k, v, window=(100, 0))
inside = tw.attention(q, k[:, :, -seen:], v[:, :, -seen:], window=(100, 0))
np.testing.assert_allclose(out, inside, rtol=1e-4, atol=1e-5)
recorded = [tw.Tensor(x, requires_grad=True) for x in (q, k, v)]
tw.attention(*recorded, window=(100, 0)).backward(q)
assert not recorded[1].grad[0, 0, :-seen].any()
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr or found.returncode


@pytest.mark.parametrize("options", OPTIONS)
def test_options_and_any_number_of_threads(options):
    q, k, v = arrays(1, 4, 2, 700, 1300, 16)
    dout = arrays(1, 4, 1, 700, 1, 16, seed=1)[0]
    kwargs = OPTIONS[options](4)
    before = tw.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 7):
            tw.set_num_threads(n)
            found = [tw.attention(q, k, v, **kwargs), *gradients(q, k, v, dout, **kwargs)]
            few_panels = (slice(-1, None), slice(300, 330))  # chunks are tasks
            found += [tw.attention(q[:, :, rows], k, v, **kwargs) for rows in few_panels]
            results.append(found)
    finally:
        tw.set_num_threads(before)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def test_options_that_make_no_sense():
    q, k, v = arrays(2, 4, 2, 3, 5, 8)
    for error, message, kwargs in [
        (tw.ShapeError, r"window must be \(left, right\)", {"window": 3}),
        (tw.ShapeError, r"window must be \(left, right\)", {"window": (1, 2, 3)}),
        (tw.ShapeError, r"window must be \(left, right\)", {"window": (1.5, 0)}),
        (tw.ShapeError, r"window must be \(left, right\)", {"window": (-2, 0)}),
        (tw.ShapeError, "softcap must be a positive number", {"softcap": -1.0}),
        (tw.ShapeError, "softcap must be a positive number", {"softcap": np.nan}),
        (tw.ShapeError, "alibi_slopes must have shape", {"alibi_slopes": slopes(3)}),
        (tw.ShapeError, "alibi_slopes must have shape", {"alibi_slopes": slopes(4)[None]}),
        (tw.DtypeError, "alibi_slopes must be float32", {"alibi_slopes": slopes(4).astype("f8")}),
        (tw.DtypeError, "alibi_slopes must be float32", {"alibi_slopes": [0.5] * 4}),
        (tw.ShapeError, "dropout_p must be in", {"dropout_p": 1.5, "seed": 1}),
        (tw.ShapeError, "dropout_p must be in", {"dropout_p": np.nan, "seed": 1}),
        (tw.ShapeError, "seed must be in", {"dropout_p": 0.5, "seed": -1}),
        (tw.DtypeError, "seed must be an int", {"dropout_p": 0.5, "seed": 0.5}),
    ]:
        with pytest.raises(error, match=message):
            tw.attention(q, k, v, **kwargs)
    everything = tw.attention(q, k, v, window=(2**40, 2**62))
    assert same_bits(everything, tw.attention(q, k, v))


@pytest.mark.parametrize("Tq", [1, 2, 33, 70])
@pytest.mark.parametrize("heads", [(2, 2), (4, 1)])
def test_dropout_drops_what_the_op_drops_from_the_weights(heads, Tq):
    """With V = 1 the result is the weights themselves."""
    H, Hkv = heads
    q, k, _ = arrays(2, H, Hkv, Tq, 141, 16)
    v = np.broadcast_to(np.eye(141, dtype=np.float32), (2, Hkv, 141, 141))
    weights, lse = tw.attention(q, k, v, causal=Tq == 33, return_lse=True)
    got, got_lse = tw.attention(
        q, k, v, causal=Tq == 33, return_lse=True, dropout_p=0.3, seed=2**63 + 5
    )
    want = tw.dropout(weights, 0.3, seed=2**63 + 5)
    np.testing.assert_array_equal(got == 0, want == 0)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=0)
    assert same_bits(got_lse, lse)


def test_dropout_of_nothing_and_of_everything():
    q, k, v = arrays(1, 2, 1, 40, 300, 16)
    dout = arrays(1, 2, 1, 40, 1, 16, seed=1)[0]
    plain = (tw.attention(q, k, v), *gradients(q, k, v, dout))
    for p in (0, 1e-12):
        kwargs = {"dropout_p": p, "seed": 1}
        found = (tw.attention(q, k, v, **kwargs), *gradients(q, k, v, dout, **kwargs))
        assert all(same_bits(a, b) for a, b in zip(found, plain, strict=True))
    v[:] = np.nan  # what is dropped is not there
    kwargs = {"dropout_p": 1, "seed": 1}
    assert not tw.attention(q, k, v, **kwargs).any()
    assert not any(g.any() for g in gradients(q, k, v, dout, **kwargs))


def test_dropout_any_number_of_threads_and_no_seed():
    q, k, v = arrays(1, 4, 2, 600, 1100, 16)
    dout = arrays(1, 4, 1, 600, 1, 16, seed=1)[0]
    before = tw.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            tw.set_num_threads(n)
            tw.manual_seed(3)
            few_panels = tw.attention(q[:, :, :30], k, v, dropout_p=0.2)
            kwargs = {"dropout_p": 0.2, "seed": 9, "causal": True}
            all_rows = tw.attention(q, k, v, **kwargs)
            results.append([few_panels, all_rows, *gradients(q, k, v, dout, **kwargs)])
    finally:
        tw.set_num_threads(before)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))
    tw.manual_seed(3)
    first, second = (tw.attention(q[:, :, :30], k, v, dropout_p=0.2) for _ in range(2))
    assert same_bits(first, results[0][0])
    assert not same_bits(second, first)


def test_dropout_in_a_window_is_dropout_under_its_mask():
    q, k, v = arrays(1, 2, 1, 150, 400, 16)
    dout = arrays(1, 2, 1, 150, 1, 16, seed=1)[0]
    behind = np.arange(150)[:, None] + 250 - np.arange(400)
    drops = {"dropout_p": 0.4, "seed": 4}
    a, b = ({"window": (30, 2), **drops}, {"mask": (behind <= 30) & (behind >= -2), **drops})
    for got, want in zip(
        (tw.attention(q, k, v, **a), *gradients(q, k, v, dout, **a)),
        (tw.attention(q, k, v, **b), *gradients(q, k, v, dout, **b)),
        strict=True,
    ):
        assert same_bits(got, want)


def test_errors_name_the_argument():
    q, k, v = arrays(2, 4, 2, 3, 5, 8)
    cases = [
        (tw.ShapeError, "k must have head dimension 8", (q, k[..., :4], v), {}),
        (tw.ShapeError, "v must have shape", (q, k, v[:, :, :4]), {}),
        (tw.ShapeError, "k must have a number of heads", (q[:, :3], k, v), {}),
        (tw.ShapeError, "mask must broadcast", (q, k, v), {"mask": np.ones((3, 4), bool)}),
        (tw.DtypeError, "mask must be bool", (q, k, v), {"mask": np.ones((3, 5), np.int8)}),
        (tw.ShapeError, "kv_lengths must lie", (q, k, v), {"kv_lengths": np.array([5, 6])}),
        (tw.DtypeError, "q must be float32", (q.astype(np.float64), k, v), {}),
        (tw.DtypeError, "v is required", (q, k, None), {}),
        (
            tw.ShapeError,
            "out must have shape",
            (q, k, v),
            {"out": np.empty((2, 4, 3, 7), np.float32)},
        ),
        (tw.ShapeError, "out must not share memory", (q, k, v), {"out": q}),
    ]
    for error, message, args, kwargs in cases:
        with pytest.raises(error, match=message):
            tw.attention(*args, **kwargs)


def gradients(q, k, v, dout, **kwargs):
    """The gradients of q, k and v, as the tape asks for them."""
    tensors = [tw.Tensor(x, requires_grad=True) for x in (q, k, v)]
    backward(tw.attention(*tensors, **kwargs), dout)
    return [t.grad for t in tensors]


def test_gradients_of_what_is_masked_are_zero():
    q, k, v = arrays(2, 4, 2, 6, 20, 8)
    dout = np.ones_like(q)
    mask = np.ones((2, 1, 6, 20), bool)
    mask[0, 0, 3] = False
    mask[:, :, :, 7] = False
    dq, dk, dv = gradients(q, k, v, dout, mask=mask)
    assert not dq[0, :, 3].any()
    assert not dk[:, :, 7].any()
    assert not dv[:, :, 7].any()
    assert dq[1].all()
    dq, dk, dv = gradients(q, k, v, dout, kv_lengths=np.array([0, 13]))
    assert not dq[0].any()
    assert not dk[0].any()
    assert not dv[0].any()
    assert not dk[1, :, 13:].any()
    assert not dv[1, :, 13:].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("Tk", [40, 300])
def test_nan_and_inf_in_masked_positions_do_not_leak_into_gradients(bad, Tk):
    q, k, v = arrays(1, 2, 1, 12, Tk, 16)
    dout = arrays(1, 2, 1, 12, 1, 16, seed=1)[0]
    mask = np.ones((12, Tk), bool)
    mask[:, 7] = False  # a key that no row sees
    mask[4] = False  # a row that sees no key
    clean = gradients(q, k, v, dout, mask=mask)
    for at in range(4):
        x = [q.copy(), k.copy(), v.copy(), dout.copy()]
        x[at][:, :, 7 if at in (1, 2) else 4] = bad
        for got, want in zip(gradients(*x, mask=mask), clean, strict=True):
            assert same_bits(got, want)


@pytest.mark.parametrize(("H", "Hkv"), [(1, 1), (4, 2)])
def test_gradients_have_one_order_of_summation(H, Hkv):
    q, k, v = arrays(1, H, Hkv, 1100, 600, 16)
    dout = arrays(1, H, Hkv, 1100, 1, 16, seed=1)[0]
    before = tw.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 5):
            tw.set_num_threads(n)
            results.append(gradients(q, k, v, dout, causal=True))
    finally:
        tw.set_num_threads(before)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def test_memory_is_linear_in_the_sequence_length():
    """A process that may hold some Tk x D arrays, but not one Tq x Tk: 8 times the length."""
    program = """
import resource, sys
import numpy as np
import tilewright as tw
from tilewright.autograd import Tensor, backward
tw.set_num_threads(1)
def step(T):
    x = [Tensor(np.ones((1, 1, T, 8), np.float32), requires_grad=True) for _ in range(3)]
    backward(tw.attention(*x, causal=True), np.ones((1, 1, T, 8), np.float32))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(step(1024), step(8192))
"""
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    small, large = map(int, found.stdout.split())
    assert large - small < 100 * 1024  # KiB; the scores alone would be 256 MiB


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_from_a_cache_is_the_prefill(dtype):
    stored = np.float32 if dtype == "float32" else bfloat16
    q, k, v = arrays(2, 4, 2, 30, 30, 16, stored)
    want = tw.attention(q, k, v, causal=True)
    cache = tw.KVCache(2, 2, 2, 16, 32, dtype=dtype)
    for layer in range(2):
        cache.append(layer, k[:, :, :20], v[:, :, :20])
    got = tw.attention(q[:, :, :20], cache.layer(1), causal=True)
    assert same_bits(got, np.ascontiguousarray(want[:, :, :20]))
    for i in range(20, 30):
        for layer in range(2):
            cache.append(layer, k[:, :, i : i + 1], v[:, :, i : i + 1])
        got = tw.attention(q[:, :, i : i + 1], cache.layer(0), causal=True)
        assert same_bits(got, np.ascontiguousarray(want[:, :, i : i + 1]))
    assert cache.lengths.tolist() == [30, 30]
    cache.truncate([25, 7])
    assert cache.lengths.tolist() == [25, 7]
    got = tw.attention(q[:, :, 6:7], cache.layer(0), causal=True)
    assert same_bits(got[1], np.ascontiguousarray(want[1, :, 6:7]))
    with pytest.raises(tw.ShapeError, match="must fit into max_tokens = 32"):
        cache.append(0, k[:, :, :8], v[:, :, :8])
    with pytest.raises(tw.ShapeError, match="k must have shape"):
        cache.append(0, k[:, :1, :1], v[:, :1, :1])
