"""Large results: memory that is used again, and never while somebody still looks at it."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from ml_dtypes import bfloat16

import tilewright as tw
from tilewright import _core

LARGE = (1024, 512)  # 2 MiB of float32


@pytest.fixture(autouse=True)
def trimmed():
    gc.collect()
    tw.trim()
    yield
    gc.collect()
    tw.trim()


def address(array):
    return array.__array_interface__["data"][0]


def test_memory_is_used_again_when_the_array_is_gone():
    first = _core.empty(LARGE, np.float32)
    where, before = address(first), tw.memory_stats().reused
    del first
    assert tw.memory_stats().kept >= 2 << 20
    second = _core.empty(LARGE, np.float32)
    assert address(second) == where
    assert tw.memory_stats().reused == before + 1


def test_the_newest_of_several_is_used_first():
    arrays = [_core.empty(LARGE, np.float32) for _ in range(3)]
    for expected in (1, 0, 2):
        where = address(arrays[expected])
        for other in {0, 1, 2} - {expected}:
            arrays[other] = None
        arrays[expected] = None  # the last to go
        arrays = [_core.empty(LARGE, np.float32)]
        assert address(arrays[0]) == where
        arrays += [_core.empty(LARGE, np.float32) for _ in range(2)]


def test_what_a_view_shows_is_not_handed_out():
    x = np.ones(LARGE, np.float32)
    y = tw.relu(x)
    view = y[3:, ::2]
    del y
    others = [tw.relu(2 * x) for _ in range(4)]
    assert (view == 1).all()
    assert len({address(o) for o in others}) == 4


def test_results_are_ordinary_arrays():
    y = tw.matmul(np.ones(LARGE, np.float32), np.ones((512, 512), np.float32))
    assert type(y) is np.ndarray
    assert y.flags.owndata
    assert y.flags.writeable
    assert address(y) % 64 == 0
    y = np.resize(y, (2, *LARGE))
    assert (y == 512).all()


def test_growing_an_array_moves_its_contents():
    y = _core.empty((1 << 18,), np.float32)
    y[:] = np.arange(y.size)
    y.resize(1 << 19, refcheck=False)
    assert (y[: 1 << 18] == np.arange(1 << 18)).all()


def test_kept_memory_is_bounded_and_trim_returns_it():
    sizes = [(300 + 37 * i, 1024) for i in range(20)]
    for shape in sizes * 3:
        _core.empty(shape, np.float32)
        stats = tw.memory_stats()
        assert stats.in_use + stats.kept <= 2 * stats.peak
    tw.trim()
    assert tw.memory_stats().kept == 0
    assert tw.memory_stats().in_use == 0


def test_old_blocks_make_room_for_new_ones():
    for i in range(8):
        _core.empty((300 + 100 * i, 1024), np.float32)
    where = address(_core.empty((2048, 1024), np.float32))
    assert address(_core.empty((2048, 1024), np.float32)) == where


def test_quantized_ops_take_recycled_memory():
    """Results, gradients and what the tape keeps, also where they are written along a transpose."""
    x = np.ones((1025, 2048), np.float32)
    a = tw.tensor(x[:, :1025], requires_grad=True)
    bias = tw.tensor(np.ones(1025, np.float32), requires_grad=True)
    for view in (x, x.T):
        q = tw.quantize(view)
        packed = tw.pack(tw.quantize(view, axis=1))
        for large in (q.data, tw.dequantize(q), tw.dequantize(packed)):
            assert handler(large) == "tilewright_recycling"
        assert (q.data.strides > q.data.T.strides) == (view is x)
    y = tw.qmatmul(a, tw.quantize(x[:, :1025], axis=1), bias=bias, activation="relu")
    assert handler(y.data) == "tilewright_recycling"
    assert all(handler(v) == "tilewright_recycling" for v in y._node.ctx.saved if is_large(v))
    y.sum().backward()
    assert handler(a.grad) == "tilewright_recycling"


def handler(array):
    """Name of the allocator that an array's memory, or that of the array it shows, is from."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return np._core.multiarray.get_handler_name(array)


def is_large(value):
    return isinstance(value, np.ndarray) and value.nbytes >= 1 << 20


def test_small_results_are_numpy_s_own():
    before = tw.memory_stats()
    kept = [tw.relu(np.ones((8, 8), np.float32)) for _ in range(10)]
    assert len(kept) == 10
    assert tw.memory_stats() == before


def test_numpy_s_allocator_is_left_as_it_was():
    before = np._core.multiarray.get_handler_name() if hasattr(np, "_core") else None
    tw.relu(np.ones(LARGE, np.float32))
    ordinary = np.empty(LARGE, np.float32)
    if before is not None:
        assert np._core.multiarray.get_handler_name() == before
        assert np._core.multiarray.get_handler_name(ordinary) == before


POISON = """
import hashlib, json, sys
import numpy as np
import harness, tilewright as tw
from tilewright import _core
from tilewright.registry import OPS

def digest(name, case, dtype):
    parts = harness.as_tuple(harness.call(OPS[name], harness.inputs(name, case, dtype)))
    return hashlib.sha256(b"".join(np.ascontiguousarray(p).tobytes() for p in parts)).hexdigest()

poisoned = np.isnan(_core.empty((1000,), np.float32)).all()
digests = {}
for level in (harness.SUPPORTED_ISAS[0], harness.SUPPORTED_ISAS[-1]):
    with tw.options(isa=level):
        for op in OPS.values():
            for case in op.cases:
                for name, dtype in harness.DTYPES.items():
                    digests[f"{level} {op.name}[{case}] {name}"] = digest(op.name, case, dtype)
print(json.dumps([bool(poisoned), digests]))
"""


def test_poisoned_memory_never_shows():
    """Every op's results are the same when all memory that it is given starts as NaN."""
    found, path = [], os.pathsep.join(sys.path)
    for poison in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", POISON],
            env={
                **os.environ,
                "TILEWRIGHT_POISON": poison,
                "PYTHONPATH": path,
            },
            capture_output=True,
            text=True,
            timeout=600,
            check=True,
        )
        found.append(json.loads(done.stdout))
    (_, want), (poisoned, got) = found
    assert poisoned
    assert [case for case in want if want[case] != got[case]] == []


def test_copies_of_what_holds_a_packed_matrix_share_it():
    packed = tw.pack(np.ones((4, 4), np.float32))
    assert copy.deepcopy([packed])[0] is packed
    assert copy.copy(packed) is packed
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(packed)


def endless(*shape, dtype=np.float32):
    """More elements than any memory has, by strides of 0."""
    return np.broadcast_to(np.ones((), dtype), shape)


MOST = 2**62 - 1  # elements of 2 bytes that an array can have
TOO_LARGE = {
    "pack": lambda: tw.pack(endless(2**60, 1)),
    "pack int8": lambda: tw.pack(endless(2**62, 1, dtype=np.int8)),
    "matmul": lambda: tw.matmul(endless(5, 2**58), endless(2**58, 1)),
    "matmul bias": lambda: tw.matmul(
        endless(0, 0, dtype=bfloat16),
        endless(0, MOST, dtype=bfloat16),
        bias=endless(MOST, dtype=bfloat16),
    ),
    "int8_matmul": lambda: tw.int8_matmul(
        endless(5, 2**60, dtype=np.int8), endless(2**60, 1, dtype=np.int8)
    ),
    "qmatmul": lambda: tw.qmatmul(
        endless(5, 2**58),
        tw.QuantizedArray(endless(2**58, 1, dtype=np.int8), np.ones((), np.float32)),
    ),
    "embedding": lambda: tw.embedding(endless(2**61 - 1, dtype=np.int32), np.zeros((3, 0), "f4")),
    "cross_entropy": lambda: tw.cross_entropy(
        endless(2**61 - 1, 1), np.broadcast_to(np.int32(0), 2**61 - 1)
    ),
}


@pytest.mark.parametrize("call", TOO_LARGE.values(), ids=TOO_LARGE)
def test_sizes_that_wrap_around_are_errors(call):
    with pytest.raises(MemoryError):
        call()
