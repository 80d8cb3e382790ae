"""safetensors: round trips, hostile files, and a kill at any moment of saving."""

import contextlib
import json
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tilewright as tw

DTYPES = [
    np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int16, np.int8,
    np.uint64, np.uint32, np.uint16, np.uint8, np.bool_,
]  # fmt: skip
A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 5), (4, 0, 2)])
def test_round_trip(tmp_path, rng, dtype, shape):
    array = rng.integers(0, 100, shape).astype(dtype)
    tw.save({"x": array, "y": array}, tmp_path / "a")
    back = tw.load(tmp_path / "a")
    assert list(back) == ["x", "y"]
    assert same(back["x"], array)
    assert back["x"].flags.writeable
    assert back["x"].flags.aligned


def test_any_strides_tensors_and_big_endian(tmp_path, rng):
    array = rng.standard_normal((4, 6)).astype(np.float32)
    arrays = {"T": array.T, "back": array[::-1, ::2], "big": array.astype(">f4")}
    tw.save({**arrays, "tensor": tw.tensor(array)}, tmp_path / "a")
    back = tw.load(str(tmp_path / "a"))
    for name, value in arrays.items():
        assert np.array_equal(back[name], value)
    assert same(back["tensor"], array)


def test_metadata_and_odd_names(tmp_path):
    metadata = {"config": '{"a": 1}', "ü": "✓"}
    arrays = {"": np.zeros(1, np.int8), "blöcke.0": np.ones(1, np.int8), 'a"b': np.ones(2, np.int8)}
    tw.save(arrays, tmp_path / "a", metadata=metadata)
    assert tw.load_metadata(tmp_path / "a") == metadata
    assert set(tw.load(tmp_path / "a")) == set(arrays)
    tw.save({}, tmp_path / "empty")
    assert tw.load(tmp_path / "empty") == {}
    assert tw.load_metadata(tmp_path / "empty") == {}


def test_what_save_refuses_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    tw.save({"x": np.ones(2, np.int8)}, path)
    for arrays, metadata, error in [
        ({"x": np.zeros(1, np.complex64)}, None, tw.DtypeError),
        ({"x": np.array([None])}, None, tw.DtypeError),
        ({1: np.zeros(1)}, None, TypeError),
        ({"__metadata__": np.zeros(1)}, None, TypeError),
        ({}, {"a": 1}, TypeError),
    ]:
        with pytest.raises(error, match="save"):
            tw.save(arrays, path, metadata=metadata)
    assert tw.load(path)["x"].tolist() == [1, 1]
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_link_stays_a_link(tmp_path):
    tw.save({}, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    tw.save({"x": np.zeros(1, np.int8)}, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert list(tw.load(tmp_path / "real")) == ["x"]


def test_truncated_at_every_byte(tmp_path, rng):
    whole = tmp_path / "whole"
    tw.save({"a": rng.standard_normal(3).astype(np.float32), "b": np.arange(5)}, whole)
    content = whole.read_bytes()
    cut = tmp_path / "cut"
    for n in range(len(content)):
        cut.write_bytes(content[:n])
        with pytest.raises(tw.FormatError, match="cut: "):
            tw.load(cut)


HOSTILE = {
    "no JSON": b"{]",
    "no UTF-8": b'{"\xff": 1}',
    "no object": [1, 2],
    "deep lists": b"[" * 1_000_000,
    "deep objects": b'{"a":' * 200_000,
    "a huge integer": b'{"a": {"dtype": "F32", "shape": [' + b"9" * 10_000 + b"]}}",
    "twice the same name": b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]},'
    b'"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}',
    "twice the same field": b'{"a": {"dtype": "U8", "dtype": "U8", "shape": [0]}}',
    "no fields": {"a": {}},
    "a field too many": {"a": {**A, "more": 1}},
    "a list as tensor": {"a": [1]},
    "unknown dtype": {"a": {**A, "dtype": "F31"}},
    "a list as dtype": {"a": {**A, "dtype": ["F32"]}},
    "shape no list": {"a": {**A, "shape": 2}},
    "negative extent": {"a": {**A, "shape": [-2]}},
    "two negative extents": {"a": {**A, "shape": [-1, -2]}},
    "fractional extent": {"a": {**A, "shape": [2.0]}},
    "true as extent": {"a": {**A, "shape": [True, 2]}},
    "extent of 2**64": {"a": {**A, "shape": [2**64]}},
    "product of 2**64": {"a": {**A, "shape": [2**32, 2**32]}},
    "an axis of 0 beside one of 2**62": {"a": {**A, "shape": [0, 2**62], "data_offsets": [0, 8]}},
    "too many axes": {"a": {**A, "shape": [1] * 65 + [2]}},
    "shape too large for the bytes": {"a": {**A, "shape": [3]}},
    "offsets reversed": {"a": {**A, "data_offsets": [8, 0]}},
    "offsets negative": {"a": {**A, "data_offsets": [-8, 0]}},
    "offsets beyond the end": {"a": {**A, "data_offsets": [8, 16]}},
    "offsets of 2**63": {"a": {**A, "data_offsets": [2**63 - 8, 2**63]}},
    "three offsets": {"a": {**A, "data_offsets": [0, 4, 8]}},
    "offsets as text": {"a": {**A, "data_offsets": ["0", "8"]}},
    "overlap": {"a": {**A, "shape": [1], "data_offsets": [0, 4]}, "b": A},
    "gap": {"a": {**A, "shape": [1], "data_offsets": [4, 8]}},
    "bytes left over": {"a": {**A, "shape": [1], "data_offsets": [0, 4]}},
    "metadata no object": {"__metadata__": 1, "a": A},
    "metadata of numbers": {"__metadata__": {"a": 1}, "a": A},
    "half a surrogate as quantization": {
        "__metadata__": {"tilewright.quantized": "\ud800"},
        "a": A,
    },
    "half a surrogate in the metadata": {"__metadata__": {"\udfff": "a"}, "a": A},
    "half a surrogate as name": {"\ud800": A},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(tmp_path, name):
    path = write(tmp_path / "bad.st", HOSTILE[name], bytes(8))
    with pytest.raises(tw.FormatError, match=r"bad\.st: ") as caught:
        tw.load(path)
    assert len(str(caught.value)) < 1000
    names = HOSTILE[name] if isinstance(HOSTILE[name], dict) else {}
    if set(names) == {"a"} and name != "bytes left over":
        assert "tensor 'a'" in str(caught.value)


@pytest.mark.parametrize("length", [1, 10_000, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_hostile_header_lengths(tmp_path, length):
    path = write(tmp_path / "bad", {"a": A}, bytes(8), length)
    with pytest.raises(tw.FormatError):
        tw.load(path)


def test_a_shape_that_numpy_has_no_room_for(tmp_path):
    huge = {"a": {**A, "shape": [2**62, 0, 2**62], "data_offsets": [0, 0]}}
    with pytest.raises(tw.FormatError, match="tensor 'a'"):
        tw.load(write(tmp_path / "bad", huge))


quick = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quick
@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4)),
        max_size=5,
    ),
    st.dictionaries(st.text(max_size=8), st.text(max_size=20), max_size=3),
)
def test_any_dict_comes_back(tmp_path, wanted, metadata):
    rng = np.random.default_rng(0)
    arrays = {n: rng.integers(0, 2, shape).astype(d) for n, (d, shape) in wanted.items()}
    tw.save(arrays, tmp_path / "a", metadata=metadata)
    back = tw.load(tmp_path / "a")
    assert set(back) == set(arrays)
    assert all(same(back[name], arrays[name]) for name in arrays)
    assert tw.load_metadata(tmp_path / "a") == metadata


@quick
@given(st.integers(0, 400), st.binary(min_size=1, max_size=8))
def test_any_damage_is_an_error_or_other_data(tmp_path, at, damage):
    path = tmp_path / "a"
    tw.save({"a": np.arange(6, dtype=np.float32), "bb": np.ones((2, 2), np.int8)}, path)
    content = bytearray(path.read_bytes())
    at %= len(content)
    content[at : at + len(damage)] = damage
    path.write_bytes(content)
    with contextlib.suppress(tw.FormatError):
        assert all(isinstance(value, np.ndarray) for value in tw.load(path).values())


SAVER = """
import sys, numpy as np, tilewright as tw
path = sys.argv[1]
for n in range(1, 10**6):
    tw.save({"n": np.full(300_000, n, np.int32)}, path, metadata={"n": str(n)})
    print(n, flush=True)
"""


def test_a_kill_at_any_moment_loses_no_checkpoint(tmp_path, rng):
    path = tmp_path / "checkpoint"
    for _ in range(8):
        child = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        child.stdout.readline()  # the first one is on the disk
        time.sleep(rng.uniform(0.0, 0.03))
        child.send_signal(signal.SIGKILL)
        reported = [1, *map(int, child.stdout.read().split())]
        child.stdout.close()
        child.wait()
        n = int(tw.load_metadata(path)["n"])
        assert n in (reported[-1], reported[-1] + 1)  # the last reported, or the one being reported
        assert np.all(tw.load(path)["n"] == n)


def test_the_reference_implementation_agrees(tmp_path, rng):
    reference = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    arrays = {
        str(d): rng.integers(0, 2, (2, 3)).astype(d) for d in DTYPES if d != ml_dtypes.bfloat16
    }
    tw.save(arrays, tmp_path / "ours", metadata={"a": "b"})
    theirs = reference.load_file(tmp_path / "ours")
    assert all(same(theirs[name], arrays[name]) for name in arrays)
    reference.save_file(arrays, tmp_path / "theirs", metadata={"a": "b"})
    ours = tw.load(tmp_path / "theirs")
    assert all(same(ours[name], arrays[name]) for name in arrays)
