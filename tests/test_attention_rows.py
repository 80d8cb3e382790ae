"""A row of attention has bits of its own: of any path, neighbours, layout and thread count."""

import ml_dtypes
import numpy as np
import pytest

import tilewright as tw
from attention_inputs import OPTIONS, arrays, gradients
from harness import same_bits

bfloat16 = ml_dtypes.bfloat16
pytestmark = pytest.mark.usefixtures("isa")


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
