"""A KVCache on a device: its pages are there, and attention reads them with the bits of an array.

Collected only where TILEWRIGHT_EMULATED names an emulated extension (README.md).
"""

from __future__ import annotations

import numpy as np
import pytest
from ml_dtypes import bfloat16

import emulated
import on_device
import tilewright as tw
from tilewright import _core

F32 = np.float32
STORED = {"float32": F32, "bfloat16": bfloat16, "float16": np.float16}


def normal(rng, *shape, dtype=F32):
    return rng.standard_normal(shape).astype(dtype)


def stored(x, dtype):
    """What a cache keeps of x, as an array that attention takes."""
    if dtype != "int8":
        return x.astype(STORED[dtype])
    scale = abs(x).max(-1, keepdims=True) / F32(127)
    return scale * np.rint(x / scale)


def filled(k, v, steps, **options):
    B, H, T, D = k.shape
    cache = tw.KVCache(1, B, H, D, T + 4, **options)
    begin = 0
    for step in (*steps, T - sum(steps)):
        part = slice(begin, begin + step)
        cache.append(0, emulated.to_device(k[:, :, part]), emulated.to_device(v[:, :, part]))
        begin += step
    return cache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize(
    ("D", "T", "page", "steps"),
    [(16, 9, 4, (3, 1)), (64, 70, 128, (69,)), (33, 40, 16, (16, 5)), (8, 7, 1, ())],
)
def test_pages_have_the_bits_of_an_array(dtype, D, T, page, steps, rng):
    k, v = normal(rng, 2, 2, T, D), normal(rng, 2, 2, T, D)
    q = emulated.to_device(normal(rng, 2, 4, 3, D, dtype=STORED.get(dtype, F32)))
    cache = filled(k, v, steps, dtype=dtype, page=page)
    got = tw.attention(q, cache.layer(0), causal=True)
    assert type(got) is emulated.EmulatedArray
    keys, values = (emulated.to_device(stored(x, dtype)) for x in (k, v))
    assert got.get().tobytes() == tw.attention(q, keys, values, causal=True).get().tobytes()


def test_queries_of_another_dtype_than_the_pages(rng):
    k, v, q = (normal(rng, 1, 2, 20, 16) for _ in range(3))
    cache = filled(k, v, (), dtype="bfloat16", page=8)
    got = tw.attention(emulated.to_device(q), cache.layer(0))
    keys, values = (emulated.to_device(x.astype(bfloat16)) for x in (k, v))
    assert got.get().tobytes() == tw.attention(emulated.to_device(q), keys, values).get().tobytes()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_many_pages_and_chunks(dtype, rng):
    """More than one launch holds, of pieces and of the table; chunks of 512 keys that are split."""
    k, v = normal(rng, 1, 1, 601, 8), normal(rng, 1, 1, 601, 8)
    cache = filled(k, v, (600,), dtype=dtype, page=2)
    q = emulated.to_device(normal(rng, 1, 1, 1, 8))
    keys, values = (emulated.to_device(stored(x, dtype)) for x in (k, v))
    got = tw.attention(q, cache.layer(0))
    assert got.get().tobytes() == tw.attention(q, keys, values).get().tobytes()


def test_sequences_of_different_lengths(rng):
    k, v, q = normal(rng, 2, 1, 11, 8), normal(rng, 2, 1, 11, 8), normal(rng, 2, 1, 1, 8)
    cache = filled(k, v, (), dtype="float32", page=4)
    cache.truncate([11, 3])
    assert cache.lengths.tolist() == [11, 3]
    q = emulated.to_device(q)
    got = tw.attention(q, cache.layer(0)).get()
    keys, values = emulated.to_device(k), emulated.to_device(v)
    lengths = emulated.to_device(np.array([11, 3]))
    want = tw.attention(q, keys, values, kv_lengths=lengths).get()
    assert got.tobytes() == want.tobytes()
    # The host can't see that these are too many: rows are wrong, nothing outside is read.
    tw.attention(q, cache.layer(0), kv_lengths=emulated.to_device(np.array([11, 11])))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_forks_share_pages_until_they_write(dtype, rng):
    k, v, q = normal(rng, 1, 2, 6, 16), normal(rng, 1, 2, 6, 16), normal(rng, 1, 2, 1, 16)
    cache = filled(k, v, (), dtype=dtype, page=4)
    before = _core.emulator.allocated_bytes()
    fork = cache.fork()
    assert _core.emulator.allocated_bytes() == before
    k1, v1 = normal(rng, 1, 2, 1, 16), normal(rng, 1, 2, 1, 16)
    fork.append(0, emulated.to_device(k1), emulated.to_device(v1))
    q = emulated.to_device(q)
    for c, keys, values in (
        (cache, k, v),
        (fork, np.concatenate([k, k1], 2), np.concatenate([v, v1], 2)),
    ):
        got = tw.attention(q, c.layer(0))
        arrays = (emulated.to_device(stored(x, dtype)) for x in (keys, values))
        assert got.get().tobytes() == tw.attention(q, *arrays).get().tobytes()


def test_pages_are_given_back(rng):
    before = _core.emulator.allocated_bytes()
    cache = filled(normal(rng, 1, 1, 6, 8), normal(rng, 1, 1, 6, 8), (), page=2)
    assert _core.emulator.allocated_bytes() > before
    cache.truncate(0)
    assert _core.emulator.allocated_bytes() == before
    cache.append(0, normal(rng, 1, 1, 2, 8), normal(rng, 1, 1, 2, 8))  # empty: on the CPU now


def test_one_cache_is_in_one_memory(rng):
    host = normal(rng, 1, 1, 2, 8)
    device = emulated.to_device(host)
    cache = tw.KVCache(1, 1, 1, 8, 9, dtype="float32")
    with pytest.raises(tw.DeviceError, match=r"^KVCache.append: v must be on the GPU like k, got"):
        cache.append(0, device, host)
    cache.append(0, device, device)
    with pytest.raises(tw.DeviceError, match=r"k must be on the GPU like the tokens before"):
        cache.append(0, host, host)
    error = r"^attention: q must be where the keys of the KVCache are, on the GPU"
    with on_device.left_alone(), pytest.raises(tw.DeviceError, match=error):
        tw.attention(host, cache.layer(0))
