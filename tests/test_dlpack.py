"""DLPack both ways: arrays of another library go in and come out of every op, and who frees what.

The other library is dlpack_producer.py; torch takes its place in slow/test_torch_parity.py.
"""

from __future__ import annotations

import ctypes
import gc
import threading

import ml_dtypes
import numpy as np
import pytest

import dlpack_producer as other
import harness
import tilewright as tw
from tilewright import _core, interop
from tilewright.registry import OPS

bf16 = ml_dtypes.bfloat16


@pytest.fixture(autouse=True)
def every_capsule_is_freed_once():
    """After a test, when all arrays are gone, each capsule's deleter has been called once."""
    gc.collect()
    other.exports.clear()
    yield
    gc.collect()
    assert [e.deleted for e in other.exports] == [1] * len(other.exports)
    other._alive.clear()


def floats(*shape, dtype=np.float32):
    return np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape).astype(dtype)


# In ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [other.Array, other.Old])
@pytest.mark.parametrize(
    "dtype", [np.float32, bf16, np.float16, np.int8, np.uint8, np.int32, np.int64, np.bool_]
)
def test_an_array_is_read_where_it_is(kind, dtype):
    given = kind(floats(2, 3, dtype=dtype))
    seen = interop.array_over(given, "x")
    assert seen.dtype == dtype
    assert seen.shape == (2, 3)
    seen[0, 1] = 1
    np.testing.assert_array_equal(seen, given.numpy())


@pytest.mark.parametrize("versioned", [True, False])
def test_layouts(versioned):
    x = floats(4, 6)
    for values in (x.T, x[::2, 1::3], x[::-1, ::-1], x[2], x[2, 3], x[:, :0], x[None, :, None]):
        given = other.Array(values, versioned=versioned)
        np.testing.assert_array_equal(interop.array_over(given, "x"), values)


def test_no_strides_means_contiguous():
    null = ctypes.POINTER(ctypes.c_int64)()
    for values in (floats(2, 3, 4), floats(5), floats(1)[0], floats(3, 0, 2)):
        given = other.Array(values, strides=null)
        seen = interop.array_over(given, "x")
        np.testing.assert_array_equal(seen, values)
        assert seen.flags.c_contiguous


def test_byte_offset_is_added():
    given = other.Array(floats(5), byte_offset=64)
    np.testing.assert_array_equal(interop.array_over(given, "x"), floats(5))


def test_read_only_stays_read_only():
    given = other.Array(floats(3), read_only=True)
    assert not interop.array_over(given, "x").flags.writeable
    np.testing.assert_array_equal(tw.relu(given).numpy(), floats(3))
    with pytest.raises(tw.ShapeError, match="relu: out must be writable"):
        tw.relu(floats(3), out=given)


def test_a_misaligned_array_gets_the_op_s_own_error():
    given = other.Array(floats(3), byte_offset=1)
    with pytest.raises(tw.DtypeError, match=r"relu: x .*not aligned"):
        tw.relu(given)


# Refused -----------------------------------------------------------------------------------------


def test_another_device_is_a_device_error():
    with pytest.raises(tw.DeviceError, match=r"^relu: x must be in the CPU's memory, got CUDA"):
        tw.relu(other.Array(floats(3), device_type=other.CUDA))
    assert not other.exports  # it was not even asked for
    lies = other.Array(floats(3), device_type=other.CUDA)
    lies.__class__ = type("Lies", (other.Array,), {"__dlpack_device__": lambda self: (1, 0)})
    with pytest.raises(tw.DeviceError, match="relu: x must be in the CPU's memory"):
        tw.relu(lies)


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"code": 10, "bits": 8}, tw.DtypeError, "type code 10 of 8 bits"),
        ({"code": other.FLOAT, "bits": 128}, tw.DtypeError, "128 bits"),
        ({"lanes": 4}, tw.DtypeError, "4 lanes"),
        ({"major": 2}, tw.UnsupportedError, "version 2"),
        ({"ndim": 33}, tw.ShapeError, "at most 32 axes, got 33"),
        ({"ndim": -1}, tw.ShapeError, "got -1"),
        ({"data": None}, tw.ShapeError, "null pointer"),
    ],
)
def test_what_can_t_be_read_is_left_unread(fields, error, text):
    with pytest.raises(error, match=f"^relu: x must .*{text}"):
        tw.relu(other.Array(floats(3), **fields))


def test_float64_gets_the_remedy():
    with pytest.raises(tw.DtypeError, match=r"^relu: x .*use x\.astype\(np\.float32\)"):
        tw.relu(other.Array(np.zeros(3)))


def test_a_refusal_of_its_library_is_passed_on():
    class Refuses(other.Array):
        def __dlpack__(self, **_):
            raise BufferError("not today")

    with pytest.raises(tw.UnsupportedError, match=r"relu: x must .*Refuses: not today"):
        tw.relu(Refuses(floats(3)))


def test_a_capsule_is_read_once():
    capsule = other.Array(floats(3)).__dlpack__(max_version=(1, 0))
    first = _core.from_dlpack(capsule, "x")
    with pytest.raises(tw.DtypeError, match="nobody has read yet"):
        _core.from_dlpack(capsule, "x")
    np.testing.assert_array_equal(first, floats(3))
    with pytest.raises(tw.DtypeError, match="x must give a DLPack capsule"):
        _core.from_dlpack(object(), "x")


# Lifetimes: the fixture above counts the deleters ------------------------------------------------


@pytest.mark.parametrize("kind", [other.Array, other.Old])
def test_a_capsule_that_nobody_reads(kind):
    capsule = kind(floats(3)).__dlpack__()
    assert other.exports[0].deleted == 0
    del capsule
    assert other.exports[0].deleted == 1


@pytest.mark.parametrize("kind", [other.Array, other.Old])
def test_a_view_keeps_the_memory_and_the_producer_may_go_first(kind):
    given = kind(floats(4, 5))
    view = interop.array_over(given, "x")[1:, ::2]
    del given
    gc.collect()
    assert other.exports[0].deleted == 0
    np.testing.assert_array_equal(view, floats(4, 5)[1:, ::2])
    del view
    assert other.exports[0].deleted == 1


def test_a_call_keeps_nothing():
    tw.relu(other.Array(floats(3)))
    with pytest.raises(tw.ShapeError):
        tw.matmul(other.Array(floats(2, 3)), other.Array(floats(2, 3)))
    gc.collect()
    assert [e.deleted for e in other.exports] == [1] * 3


def test_the_tape_keeps_what_it_needs():
    x = tw.tensor(floats(2, 3), requires_grad=True)
    y = (x * other.Array(floats(2, 3))).sum()
    gc.collect()
    assert other.exports[0].deleted == 0
    y.backward()
    np.testing.assert_array_equal(x.grad, floats(2, 3))


@pytest.mark.parametrize("version", [None, (1, 0), (1, 7)])
def test_our_capsule_keeps_the_array(version):
    x = tw.tensor(floats(300_000))
    before = tw.memory_stats().in_use
    capsule = x.__dlpack__(max_version=version)
    del x
    seen = _core.from_dlpack(capsule, "x")
    assert tw.memory_stats().in_use == before
    np.testing.assert_array_equal(seen, floats(300_000))
    y = tw.relu(seen)
    capsule = tw.Tensor(y).__dlpack__(max_version=version)
    unread = tw.memory_stats().in_use
    del capsule, y
    assert tw.memory_stats().in_use < unread


def test_the_last_reader_may_be_another_thread():
    seen = [_core.from_dlpack(tw.tensor(floats(3)).__dlpack__(), "x")]
    thread = threading.Thread(target=seen.clear)
    thread.start()
    thread.join()
    assert not seen


# Out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, bf16, np.float16, np.int8, np.int64, np.bool_])
@pytest.mark.parametrize("version", [None, (0, 8), (1, 0)])
def test_a_tensor_goes_out_and_in_without_a_copy(dtype, version):
    for values in (floats(3, 4, dtype=dtype), floats(3, 4, dtype=dtype).T[1:, ::-2],
                   floats(2, 0, dtype=dtype), np.asarray(dtype(1))):  # fmt: skip
        x = tw.Tensor(values)
        assert x.__dlpack_device__() == (1, 0)
        seen = _core.from_dlpack(x.__dlpack__(max_version=version), "x")
        assert seen.dtype == values.dtype
        assert seen.tobytes() == values.tobytes()
        assert values.size == 0 or np.shares_memory(seen, values)


def test_numpy_reads_a_tensor():
    x = tw.tensor(floats(2, 3), requires_grad=True)
    assert np.shares_memory(np.from_dlpack(x), x.numpy())
    assert not np.shares_memory(np.from_dlpack(x, copy=True), x.numpy())


def test_what_an_export_can_t_say_is_a_buffer_error():
    x = tw.tensor(floats(3))
    with pytest.raises(BufferError, match="stream must be None"):
        x.__dlpack__(stream=1)
    with pytest.raises(BufferError, match="dl_device must be the CPU"):
        x.__dlpack__(dl_device=(other.CUDA, 0))
    constant = tw.Tensor(np.broadcast_to(np.float32(1), 3))
    with pytest.raises(BufferError, match="read-only"):
        constant.__dlpack__()
    seen = _core.from_dlpack(constant.__dlpack__(max_version=(1, 0)), "x")
    assert not seen.flags.writeable
    with pytest.raises(BufferError, match="no dtype"):
        _core.to_dlpack(np.zeros(3, "M8[s]"), True, False)
    with pytest.raises(BufferError, match="no dtype"):
        _core.to_dlpack(np.zeros(3, ">f4"), True, False)
    uneven = np.zeros(3, [("pad", "u1"), ("x", "f4")])["x"]
    with pytest.raises(BufferError, match="strides"):
        _core.to_dlpack(uneven, True, False)


# Families ----------------------------------------------------------------------------------------


def one_case_of_each_op():
    return [pytest.param(op.name, op.cases[-1], id=op.name) for op in OPS.values()]


@pytest.mark.parametrize(("name", "case"), one_case_of_each_op())
def test_every_op_answers_in_the_family_that_it_was_given(name, case, dtype):
    arguments = harness.inputs(name, case, dtype)
    guests = {n: other.Array(v) if isinstance(v, np.ndarray) else v for n, v in arguments.items()}
    if not any(type(v) is other.Array for v in guests.values()):
        pytest.skip("takes QuantizedArrays alone")
    want = harness.as_tuple(harness.call(OPS[name], arguments))
    result = harness.call(OPS[name], guests)
    got = harness.as_tuple(result)
    assert len(got) == len(want)
    if type(result) is tw.QuantizedArray:  # a kind of its own
        got = [other.Array(g) for g in got]
    for g, w in zip(got, want, strict=True):
        assert type(g) is other.Array
        assert harness.same_bits(g.numpy(), w)


def test_a_tensor_among_the_inputs_makes_the_answer_a_tensor():
    x, guest = tw.tensor(floats(2, 3), requires_grad=True), other.Array(floats(3, 4))
    y = tw.matmul(x, guest)
    assert type(y) is tw.Tensor
    assert y.requires_grad
    assert type(tw.tensor(floats(2)) + other.Array(floats(2))) is tw.Tensor


def test_arrays_beside_a_guest_and_a_guest_among_the_options():
    a, b, bias = floats(2, 3), floats(3, 4), floats(4)
    want = tw.matmul(a, b, bias=bias)
    for call in (
        lambda: tw.matmul(other.Array(a), b, bias=bias),
        lambda: tw.matmul(a, other.Array(b), bias=bias),
        lambda: tw.matmul(a, b, bias=other.Array(bias)),
    ):
        y = call()
        assert type(y) is other.Array
        assert harness.same_bits(y.numpy(), want)


def test_a_library_without_from_dlpack_gets_numpy():
    homeless = type("Homeless", (other.Array,), {"__module__": "nowhere"})
    assert type(tw.relu(homeless(floats(3)))) is np.ndarray
    inside = type("Inside", (other.Array,), {"__module__": "dlpack_producer.sub.module"})
    assert type(tw.relu(inside(floats(3)))) is other.Array


def test_an_array_namespace_comes_first():
    class Namespaced(other.Array):
        __module__ = "nowhere"

        def __array_namespace__(self):
            return other

    assert type(tw.relu(Namespaced(floats(3)))) is other.Array


def test_joins_answer_in_kind_too():
    x, guest = floats(2, 3), other.Array(floats(2, 3))
    for y, want in (
        (tw.concatenate([guest, x], axis=1), np.concatenate([x, x], axis=1)),
        (tw.stack([x, guest]), np.stack([x, x])),
        (tw.where(x > 1, guest, x), x),
    ):
        assert type(y) is other.Array
        np.testing.assert_array_equal(y.numpy(), want)
    assert type(tw.stack([x, x])) is np.ndarray


def test_out_is_written_and_returned():
    x, out = other.Array(-floats(3)), other.Array(floats(3) + 7)
    assert tw.relu(x, out=out) is out
    assert out.numpy().tolist() == [0, 0, 0]
    pair = other.Array(floats(2, 3)), other.Array(floats(2, 3))
    found = tw.layernorm(floats(2, 3), residual=floats(2, 3), out=pair)
    assert found[0] is pair[0]
    assert found[1] is pair[1]
    np.testing.assert_array_equal(pair[1].numpy(), 2 * floats(2, 3))
    with pytest.raises(tw.ShapeError, match="relu: out must not share memory with x"):
        tw.relu(x, out=x)
    tensor = tw.tensor(floats(3))
    assert tw.relu(x, out=tensor) is tensor


def test_the_rest_of_the_surface_takes_guests():
    x = floats(4, 3)
    t = tw.tensor(other.Array(x, read_only=True))
    assert harness.same_bits(t.numpy(), x)
    assert not np.shares_memory(t.numpy(), x)
    q = tw.quantize(other.Array(x), axis=1)
    assert harness.same_bits(q.data, tw.quantize(x, axis=1).data)
    packed = tw.pack(other.Array(x))
    assert harness.same_bits(
        tw.matmul(other.Array(x.T.copy()), packed).numpy(), tw.matmul(x.T.copy(), x)
    )
    assert (t > other.Array(x - 1)).numpy().all()
    t[1:] = other.Array(np.zeros((3, 3), np.float32))
    assert t.numpy()[1:].sum() == 0
    linear = tw.nn.Linear(3, 2)
    state = {n: other.Array(v + 1) for n, v in linear.state_dict().items()}
    linear.load_state_dict(state)
    assert harness.same_bits(linear.weight.data, state["weight"].numpy())
