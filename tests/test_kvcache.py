"""KVCache: attention has the bits it has over one array; pages come, are shared, and go."""

import copy
import threading

import ml_dtypes
import numpy as np
import pytest

import harness
import tilewright as tw
import tolerance
from tilewright.registry import OPS

LEVELS = [level.name for level in tw.isas() if level.supported]
DTYPES = ["float32", "bfloat16", "float16", "int8"]
bfloat16 = ml_dtypes.bfloat16


@pytest.fixture(autouse=True, params=LEVELS)
def level(request):
    tw.set_isa(request.param)
    yield request.param
    tw.set_isa("")


def normal(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32).astype(dtype)


def keys_and_values(B, H, T, D, seed=0):
    return normal(B, H, T, D, seed=seed + 1), normal(B, H, T, D, seed=seed + 2)


def stored(x, dtype, largest=127):
    """What the cache makes of x: the definition, in NumPy."""
    if dtype != "int8":
        return x.astype(bfloat16 if dtype == "bfloat16" else dtype)
    amax = abs(x.astype(np.float32)).max(axis=-1, keepdims=True, initial=0)
    scale = np.where(amax == 0, np.float32(1), amax / np.float32(largest))
    return scale * np.clip(np.rint(x / scale), -largest, largest).astype(np.float32)


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def filled(k, v, dtype="float32", page=128, steps=None, **sizes):
    """A cache of one layer that holds k and v, appended in these steps."""
    B, H, T, D = k.shape
    cache = tw.KVCache(1, B, H, D, sizes.get("max_tokens", T), dtype=dtype, page=page)
    at = 0
    for n in steps or [T]:
        cache.append(0, k[:, :, at : at + n], v[:, :, at : at + n])
        at += n
    assert cache.lengths.tolist() == [at] * B
    return cache


SIZES = {  # H, Hkv, Tq, Tk, D: few rows and panels, blocks and chunks with and without an end
    "a row": (2, 2, 1, 130, 16),
    "a group": (6, 2, 1, 257, 40),
    "some rows, odd dims": (4, 2, 3, 127, 17),
    "one dim": (1, 1, 2, 20, 1),
    "more rows than lanes": (2, 1, 37, 140, 24),
    "chunks": (2, 1, 1, 1100, 32),
    "chunks of panels": (2, 2, 33, 1030, 13),
    "wide": (1, 1, 5, 40, 256),
}


@pytest.mark.parametrize("page", [1, 16, 100, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_paged_attention_has_the_bits_of_attention_over_an_array(size, dtype, page):
    H, Hkv, Tq, Tk, D = SIZES[size]
    k, v = keys_and_values(2, Hkv, Tk, D)
    cache = filled(k, v, dtype, page)
    kd, vd = stored(k, dtype), stored(v, dtype)
    lengths = np.array([Tk - 2, max(Tk // 2, 1)])
    for q in (normal(2, H, Tq, D), normal(2, H, Tq, D, dtype=bfloat16)):
        near = {"window": (70, 3), "softcap": 2.0, "alibi_slopes": np.full(H, 0.1, np.float32)}
        for more in ({}, {"causal": True}, {"causal": True, "kv_lengths": lengths}, near):
            got = tw.attention(q, cache.layer(0), return_lse=True, **more)
            want, lse = tw.attention(q, kd, vd, prefer="latency", return_lse=True, **more)
            assert same_bits(got[0], want.astype(q.dtype))  # whatever is stored
            assert same_bits(got[1], lse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_reach_the_keys_of_pages(dtype):
    k, v = keys_and_values(2, 2, 150, 20)
    cache, q = filled(k, v, dtype, 48), normal(2, 4, 3, 20)
    for mask in (
        np.random.default_rng(1).random((2, 4, 3, 150)) < 0.5,
        normal(3, 150, seed=7),
        np.zeros((2, 1, 1, 150), bool),
    ):
        got = tw.attention(q, cache.layer(0), mask=mask)
        assert same_bits(got, tw.attention(q, stored(k, dtype), stored(v, dtype), mask=mask))


@pytest.mark.parametrize("page", [1, 16, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_are_the_whole(dtype, page):
    k, v = keys_and_values(2, 2, 300, 17)
    q = normal(2, 2, 1, 17)
    want = tw.attention(q, filled(k, v, dtype, page).layer(0))
    for steps in ([1] * 20 + [280], [127, 2, 171], [0, 128, 128, 44]):
        cache = filled(k, v, dtype, page, steps)
        assert same_bits(tw.attention(q, cache.layer(0)), want)


@pytest.mark.parametrize("given", [np.float32, bfloat16, np.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_appended_may_have_any_strides_and_float_dtype(dtype, given):
    k, v = (x.astype(given) for x in keys_and_values(2, 3, 33, 12))
    q = normal(2, 3, 2, 12)
    want = tw.attention(q, stored(k, dtype), stored(v, dtype))
    token_major = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)) for x in (k, v)]
    dims_first = [np.asfortranarray(x) for x in (k, v)]
    backwards = [np.ascontiguousarray(x[..., ::-1]) for x in (k, v)]
    for views in (
        [x.transpose(0, 2, 1, 3) for x in token_major],
        dims_first,
        [x[..., ::-1] for x in backwards],
    ):
        assert same_bits(tw.attention(q, filled(*views, dtype, 16).layer(0)), want)


@pytest.mark.parametrize("page", [1, 16, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_of_different_lengths(dtype, page):
    k, v = keys_and_values(3, 2, 140, 16)
    more = keys_and_values(3, 2, 9, 16, seed=50)
    lengths = [140, 1, 77]
    cache = filled(k, v, dtype, page, max_tokens=149)
    cache.truncate(lengths)
    assert cache.lengths.tolist() == lengths
    cache.append(0, *more)
    assert cache.layer(0).lengths.tolist() == [n + 9 for n in lengths]
    q = normal(3, 4, 9, 16)
    got = tw.attention(q, cache.layer(0), causal=True)
    for b, n in enumerate(lengths):
        whole = (
            np.concatenate([x[b : b + 1, :, :n], y[b : b + 1]], 2)
            for x, y in zip((k, v), more, strict=True)
        )
        alone = tw.attention(q[b : b + 1], *(stored(x, dtype) for x in whole), causal=True)
        assert same_bits(got[b : b + 1], alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_truncated_tokens_leave_nothing_behind(dtype):
    k, v = keys_and_values(2, 1, 200, 16)
    bad_k, bad_v = k.copy(), v.copy()
    bad_k[:, :, 90:], bad_v[:, :, 90:] = np.nan, np.inf
    q = normal(2, 1, 1, 16)
    for page in (1, 16, 128):
        cache = filled(bad_k, bad_v, dtype, page)
        cache.truncate(90)
        with np.errstate(invalid="ignore"):
            got = tw.attention(q, cache.layer(0))
        want = tw.attention(q, stored(k[:, :, :90], dtype), stored(v[:, :, :90], dtype))
        assert same_bits(got, want)
        cache.append(0, k[:, :, 90:], v[:, :, 90:])
        assert same_bits(
            tw.attention(q, cache.layer(0)), tw.attention(q, filled(k, v, dtype).layer(0))
        )
    cache.truncate(0)
    assert cache.nbytes == 0
    out, lse = tw.attention(q, cache.layer(0), return_lse=True)
    assert not out.any()
    assert (lse == -np.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_that_is_not_finite_reaches_the_rows_that_see_it_only(dtype):
    k, v = keys_and_values(1, 1, 40, 16)
    q = normal(1, 1, 40, 16)
    want = tw.attention(q, filled(k, v, dtype).layer(0), causal=True)
    k[0, 0, 30, 3], v[0, 0, 33, 5] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        got = tw.attention(q, filled(k, v, dtype).layer(0), causal=True)
    assert same_bits(got[:, :, :30], want[:, :, :30])
    assert np.isnan(got[0, 0, 30:]).all()


# Pages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [1, 16, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forks_share_a_prefix_and_go_their_own_ways(dtype, page):
    k, v = keys_and_values(2, 2, 200, 16)
    ends = [keys_and_values(1, 2, 70, 16, seed=100 * i) for i in range(3)]
    prompt = filled(k, v, dtype, page, max_tokens=300)
    before = prompt.nbytes
    forks = [prompt.fork(1) for _ in ends]
    for fork in forks:
        assert fork.lengths.tolist() == [200]
        assert fork.nbytes == before // 2
    for t in range(70):  # in turn, so that each writes between the others' writes
        for fork, end in zip(forks, ends, strict=True):
            fork.append(0, *(x[:, :, t : t + 1] for x in end))
    q = normal(1, 2, 1, 16)
    for fork, end in zip(forks, ends, strict=True):
        whole = (np.concatenate([x[1:], y], 2) for x, y in zip((k, v), end, strict=True))
        assert same_bits(
            tw.attention(q, fork.layer(0)), tw.attention(q, *(stored(x, dtype) for x in whole))
        )
    untouched = tw.attention(q.repeat(2, 0), prompt.layer(0))
    assert same_bits(untouched, tw.attention(q.repeat(2, 0), filled(k, v, dtype).layer(0)))


def test_beams_are_forks_in_another_order():
    k, v = keys_and_values(3, 1, 20, 8)
    cache = filled(k, v, max_tokens=24)
    parents = [2, 0, 0, 2]
    beams = cache.fork(parents)
    assert beams.batch == 4
    q, more = normal(4, 1, 1, 8), keys_and_values(4, 1, 4, 8, seed=9)
    beams.append(0, *more)
    whole = (np.concatenate([x[parents], y], 2) for x, y in zip((k, v), more, strict=True))
    assert same_bits(tw.attention(q, beams.layer(0)), tw.attention(q, *whole))
    assert cache.fork().lengths.tolist() == [20] * 3
    assert cache.fork(np.array([1], np.int64)).batch == 1
    none = cache.fork([])
    none.truncate([])
    assert none.batch == none.nbytes == 0


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy])
def test_a_copy_is_a_fork(make):
    k, v = keys_and_values(1, 1, 40, 8)
    cache = filled(k, v, max_tokens=64)
    other = make(cache)
    other.append(0, k[:, :, :1], v[:, :, :1])
    assert (cache.lengths.tolist(), other.lengths.tolist()) == ([40], [41])
    q = normal(1, 1, 1, 8)
    assert same_bits(tw.attention(q, cache.layer(0)), tw.attention(q, k, v))


def test_a_fork_costs_what_it_writes():
    k, v = keys_and_values(1, 1, 40, 8)
    cache = filled(k, v, page=16, max_tokens=64)
    one_page = 16 * 8 * 4 * 2
    assert cache.nbytes == 3 * one_page
    both = cache.fork([0, 0])
    assert both.nbytes == 3 * one_page
    both.append(0, *keys_and_values(2, 1, 1, 8))
    assert both.nbytes == (3 + 2 - 1 + 0) * one_page  # two full pages shared, a last one each
    assert cache.nbytes == 3 * one_page
    alone = cache.fork(0)
    alone.truncate(32)
    alone.append(0, *keys_and_values(1, 1, 1, 8))  # a new page: nothing shared is written
    assert alone.nbytes == 3 * one_page
    q = normal(1, 1, 1, 8)
    assert same_bits(tw.attention(q, cache.layer(0)), tw.attention(q, k, v))


def test_the_last_holder_of_a_page_writes_in_place():
    k, v = keys_and_values(1, 1, 10, 8)
    cache = filled(k, v, max_tokens=20)
    del_me = cache.fork()
    del del_me
    q = normal(1, 1, 1, 8)
    cache.append(0, k, v)
    want = (np.concatenate([x, x], 2) for x in (k, v))
    assert same_bits(tw.attention(q, cache.layer(0)), tw.attention(q, *want))


def test_memory_follows_the_tokens_not_the_most_of_them():
    cache = tw.KVCache(2, 3, 2, 8, 1 << 30, dtype="bfloat16")
    assert cache.nbytes == 0
    k, v = keys_and_values(3, 2, 130, 8)
    cache.append(0, k[:, :, :1], v[:, :, :1])
    one_page = 128 * 2 * 8 * 2 * 2
    assert cache.nbytes == 3 * one_page
    cache.append(1, k, v)
    assert cache.nbytes == 9 * one_page
    assert cache.lengths.tolist() == [1, 1, 1]
    cache.truncate([0, 130, 128])
    assert cache.nbytes == (0 + 3 + 2) * one_page
    small = tw.KVCache(1, 1, 2, 8, 10, dtype="float32")
    small.append(0, k[:1, :, :1], v[:1, :, :1])
    assert small.nbytes == 10 * 2 * 8 * 4 * 2  # a page is never longer than a sequence may be


def test_int8_takes_about_half_of_bfloat16():
    sizes = {}
    for dtype in DTYPES:
        k, v = keys_and_values(1, 2, 128, 64)
        sizes[dtype] = filled(k, v, dtype).nbytes
    assert sizes["float32"] == 2 * sizes["bfloat16"] == 2 * sizes["float16"]
    assert sizes["int8"] == sizes["bfloat16"] // 2 + 2 * 2 * 128 * 4


# Accuracy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("Tq", "D"), [(1, 64), (40, 16)])
def test_int8_stays_within_its_bound(Tq, D, isa):
    k, v = keys_and_values(2, 2, 300, D)
    v[:, :, 7] *= 50  # a token with a scale of its own
    k[:, :, 9], v[:, :, 9] = 0, 0
    q = normal(2, 4, Tq, D)
    exact = [x.astype(np.float64) for x in (q, k, v)]
    want = OPS["attention"].reference(*exact, causal=True)
    bound = tolerance.bound(want, np.float32) + tolerance.int8_cache_bound(*exact)
    got = tw.attention(q, filled(k, v, "int8").layer(0), causal=True)
    where = f"isa={isa} Tq={Tq} D={D}"
    harness.assert_within("attention, int8 cache float32", got, want.value, bound, where)
    coarse = tw.attention(q, stored(k, "int8", 7), stored(v, "int8", 7), causal=True)
    assert not (abs(coarse - want.value) <= bound).all()


# Errors ------------------------------------------------------------------------------------------


@pytest.fixture
def cache():
    return tw.KVCache(2, 2, 3, 16, 32)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"dtype": "int4"}, tw.DtypeError, "dtype must be 'float32', 'bfloat16', 'float16' or"),
        ({"layers": 0}, tw.ShapeError, "layers must lie between 1 and"),
        ({"batch": -1}, tw.ShapeError, "batch must lie between 0 and"),
        ({"heads_kv": 0}, tw.ShapeError, "heads_kv must lie between 1 and"),
        ({"head_dim": 257}, tw.ShapeError, "head_dim must lie between 1 and 256, got 257"),
        ({"max_tokens": -1}, tw.ShapeError, "max_tokens must lie between 0 and"),
        ({"page": 0}, tw.ShapeError, "page must lie between 1 and"),
        ({"page": 1 << 40}, tw.ShapeError, "page must lie between 1 and"),
    ],
)
def test_sizes_that_no_cache_has(change, error, text):
    sizes = {"layers": 2, "batch": 2, "heads_kv": 3, "head_dim": 16, "max_tokens": 32}
    with pytest.raises(error, match=text):
        tw.KVCache(**(sizes | change))


def test_what_cannot_be_appended(cache):
    k, v = keys_and_values(2, 3, 8, 16)
    cache.append(0, k, v)
    for bad, text in [
        ((2, k, v), "layer must lie between 0 and 1, got 2"),
        ((-1, k, v), "layer must lie between 0 and 1, got -1"),
        ((0, k[:1], v[:1]), r"k must have shape \(2, 3, 8, 16\)"),
        ((0, k[..., :8], v[..., :8]), r"k must have shape \(2, 3, 8, 16\)"),
        ((0, k[0], v[0]), "k must have shape"),
        ((0, k, v[:, :, :7]), r"v must have shape \(2, 3, 8, 16\) to match k"),
        ((0, *keys_and_values(2, 3, 25, 16)), "k must fit into max_tokens = 32 after 8 tokens"),
    ]:
        with pytest.raises(tw.ShapeError, match=r"KVCache.append: " + text):
            cache.append(*bad)
    for name, bad in (("k", (k.astype(np.float64), v)), ("v", (k, v.astype(np.int32)))):
        with pytest.raises(tw.DtypeError, match=f"KVCache.append: {name} must be float32"):
            cache.append(0, *bad)
    with pytest.raises(tw.DtypeError, match=r"KVCache.append: k is required, got None"):
        cache.append(0, None, v)
    assert cache.layer(0).lengths.tolist() == [8, 8]
    assert cache.lengths.tolist() == [0, 0]


def test_one_full_sequence_stops_the_batch(cache):
    k, v = keys_and_values(2, 3, 32, 16)
    cache.append(0, k, v)
    cache.truncate([32, 4])
    with pytest.raises(tw.ShapeError, match="after 32 tokens of sequence 0, got 1"):
        cache.append(0, k[:, :, :1], v[:, :, :1])
    assert cache.layer(0).lengths.tolist() == [32, 4]


def test_appending_is_counted(level):
    cache, k = tw.KVCache(1, 1, 2, 8, 9), normal(1, 2, 3, 8)
    row = f"kvcache_append@{level}"
    before = tw.stats().calls.get("kvcache_append", {}).get(row, 0)
    (call,) = tw.explain(cache.append, 0, k, k).calls
    assert (call.op, call.isa, call.shape) == ("kvcache_append", level, "(1, 2, 3, 8)")
    assert tw.stats().calls["kvcache_append"][row] == before + 1


def test_what_truncate_layer_and_fork_refuse(cache):
    for n in (-1, [1], [1, 2, 3], [1, -2], 1.5, [[1, 2]]):
        with pytest.raises(tw.ShapeError, match=r"KVCache.truncate: n must"):
            cache.truncate(n)
    for i in (-1, 2):
        with pytest.raises(tw.ShapeError, match=r"KVCache.layer: index must"):
            cache.layer(i)
    for i in (-1, 2, [0, 2], 0.5):
        with pytest.raises(tw.ShapeError, match=r"KVCache.fork: i must name sequences"):
            cache.fork(i)


def test_queries_that_do_not_fit_the_cache(cache):
    k, v = keys_and_values(2, 3, 8, 16)
    cache.append(0, k, v)
    layer = cache.layer(0)
    for shape in ((1, 3, 2, 16), (2, 3, 2, 8), (2, 2, 16)):
        with pytest.raises(tw.ShapeError, match="attention: q must"):
            tw.attention(normal(*shape), layer)
    with pytest.raises(tw.ShapeError, match="k must have a number of heads that divides the 4"):
        tw.attention(normal(2, 4, 2, 16), layer)
    q = normal(2, 3, 2, 16)
    with pytest.raises(tw.ShapeError, match="v must be None"):
        tw.attention(q, layer, v)
    cache.truncate([8, 5])
    with pytest.raises(tw.ShapeError, match="kv_lengths must lie between 0 and the 5 keys"):
        tw.attention(q, layer, kv_lengths=np.array([8, 6]))
    with pytest.raises(tw.UnsupportedError, match="gradients through a KVCache"):
        tw.attention(tw.tensor(q, requires_grad=True), layer)


# Threads -----------------------------------------------------------------------------------------


def test_a_cache_may_be_read_while_it_grows():
    """What a thread reads has the bits of some moment: it never sees half an append."""
    T, page = 200, 16
    k, v = keys_and_values(1, 2, T, 16)
    q = normal(1, 2, 1, 16)
    moments = {tw.attention(q, k[:, :, :n], v[:, :, :n]).tobytes() for n in range(T + 1)}
    cache = tw.KVCache(1, 1, 2, 16, T, dtype="float32", page=page)
    strange = []

    def read():
        while cache.lengths[0] < T:
            if tw.attention(q, cache.layer(0)).tobytes() not in moments:
                strange.append(1)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for t in range(T):
        cache.append(0, k[:, :, t : t + 1], v[:, :, t : t + 1])
        if t % 50 == 49:
            cache.fork().truncate(0)
    for reader in readers:
        reader.join()
    assert not strange
