"""What the generic tests don't say of arrays on a device: here that of emulated CUDA.

Collected only where TILEWRIGHT_EMULATED names an emulated extension (README.md).
"""

from __future__ import annotations

import functools
import itertools
import re

import numpy as np
import pytest

import emulated
import harness
import on_device
import tilewright as tw
from tilewright import _core
from tilewright.autograd import NO_TAPE, Context
from tilewright.registry import OPS

F32 = np.float32


@pytest.fixture
def x(rng):
    return emulated.to_device(rng.standard_normal((5, 40)).astype(F32))


def test_results_are_arrays_of_the_device(x):
    y = tw.softmax(x)
    assert type(y) is emulated.EmulatedArray
    np.testing.assert_allclose(y.get().sum(-1), 1, rtol=1e-6)


def test_tensors_and_their_gradients_stay_on_the_device(x):
    t = tw.tensor(x, requires_grad=True)
    y = tw.softmax(t)
    assert type(y.data) is emulated.EmulatedArray
    y.backward(emulated.to_device(np.ones((5, 40), F32)))
    assert type(t.grad) is emulated.EmulatedArray
    assert abs(t.grad.get()).max() < 1e-6  # rows sum to one whatever x is


def test_arrays_of_the_cpu_are_refused_beside_them(x):
    with pytest.raises(tw.DeviceError, match=r"^softmax: out must be on emulated like the other"):
        tw.softmax(x, out=np.empty((5, 40), F32))


def test_memory_is_given_back(x):
    before = _core.emulator.allocated_bytes()
    tw.softmax(x)
    assert _core.emulator.allocated_bytes() == before


def _normal(*shape):
    return emulated.to_device(np.random.default_rng(0).standard_normal(shape).astype(F32))


def _with_gradient(op, *inputs):
    dy = op(*inputs)
    tensors = [tw.tensor(x, requires_grad=True) for x in inputs]

    def call():
        for t in tensors:
            t.grad = None
        op(*tensors).backward(dy)
        for t in tensors:
            t.grad = None

    return call


def _append():
    tokens = _normal(1, 2, 5, 8)
    return lambda: tw.KVCache(1, 1, 2, 8, 9, page=2).append(0, tokens, tokens)


def _quantized():
    x, w = _normal(5, 40), tw.quantize(_normal(40, 7), axis=1)
    return lambda: tw.qmatmul(x, w, compute="int8")


# name -> a function that makes a call, whose results, workspaces and gradients are on the device
CALLS = {
    "softmax": lambda: _with_gradient(tw.softmax, _normal(5, 40)),
    "matmul": lambda: _with_gradient(tw.matmul, _normal(5, 40), _normal(40, 7)),
    "layernorm": lambda: _with_gradient(tw.layernorm, _normal(70, 8), _normal(8), _normal(8)),
    "attention": lambda: _with_gradient(
        tw.attention, _normal(1, 1, 2, 8), _normal(1, 1, 600, 8), _normal(1, 1, 600, 8)
    ),
    "qmatmul": _quantized,
    "tensor": lambda: functools.partial(tw.tensor, _normal(5, 40)),
    "KVCache.append": _append,
}


@pytest.mark.parametrize("name", CALLS)
def test_out_of_memory_names_the_bytes_and_leaks_nothing(name):
    """Whichever of its allocations fails: each time there is a little more room."""
    call = CALLS[name]()
    before, blamed = _core.emulator.allocated_bytes(), set()
    for room in itertools.count(0, 256):
        _core.emulator.set_memory_limit(before + room)
        try:
            call()
            break
        except tw.DeviceError as error:
            says = r"(\S+): emulated is out of memory: no room for \d+ bytes"
            blamed.add(re.match(says, str(error))[1])
        finally:
            _core.emulator.set_memory_limit(2**63)
        assert _core.emulator.allocated_bytes() == before
    assert blamed == {name}


def test_out_of_memory_on_the_way_to_the_device():
    _core.emulator.set_memory_limit(_core.emulator.allocated_bytes())
    try:
        error = r"^emulated is out of memory: no room for 4\d\d bytes"
        with on_device.left_alone(), pytest.raises(tw.DeviceError, match=error):
            tw.tensor(np.ones(100, F32)).to("emulated")
    finally:
        _core.emulator.set_memory_limit(2**63)


@pytest.mark.parametrize("quantized", [False, True])
def test_nothing_is_packed_on_a_device(quantized, x):
    with pytest.raises(tw.UnsupportedError, match=r"^pack: b must be on the CPU; kernels of a GPU"):
        tw.pack(tw.quantize(x, axis=1) if quantized else x)


@pytest.mark.parametrize(
    "K", [32, 288, 544, 4128]
)  # part of a step, of a chain, of two; two rounds
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("group_size", "symmetric"), [(None, True), (16, True), (32, False)])
def test_few_rows_by_quantized_weights_have_the_bits_of_many(K, bits, group_size, symmetric, rng):
    """The kernel for decoding, and the one that it does the work of."""
    options = {"bits": bits, "axis": 0, "group_size": group_size, "symmetric": symmetric}
    q = on_device.moved(tw.quantize(rng.standard_normal((35, K)).astype(F32), **options)).T
    x = rng.standard_normal((20, K)).astype(F32)
    x[0, 3], x[1, K - 1] = np.inf, np.nan
    bias = emulated.to_device(rng.standard_normal(35).astype(F32))
    ran = []
    _core.emulator.set_runner(lambda launch: bool(ran.append(launch["what"])))
    try:
        many = tw.qmatmul(emulated.to_device(x), q, bias=bias, compute="float").get()
        assert ran.pop().startswith("matmul_ffma:")
        for rows in (1, 2, 3, 8):
            few = tw.qmatmul(emulated.to_device(x[:rows]), q, bias=bias, compute="float").get()
            assert ran.pop().startswith("qgemm_decode:")
            assert harness.same_bits(few, many[:rows])
    finally:
        _core.emulator.set_runner(None)


@pytest.mark.parametrize("rows", [0, 1, 64, 65, 5000])  # blocks of 64, and blocks of those
def test_rows_are_summed(rows, rng):
    wide = rng.standard_normal((rows, 70)).astype(F32)
    for x in (wide, np.asfortranarray(wide), wide[::-1, ::2]):
        out = emulated.DEVICE.empty((x.shape[1],), F32)
        _core.sum_rows(emulated.to_device(x), out)
        exact = x.astype(np.float64)
        bound = 2 * max(1, rows) ** 0.5 * 2.0**-24 * abs(exact).sum(0)
        assert (abs(out.get() - exact.sum(0)) <= bound).all()


def test_a_bad_id_is_nan_and_has_no_gradient(rng):
    """The host does not read ids of a device, hence can't raise."""
    table = tw.tensor(
        emulated.to_device(rng.standard_normal((5, 40)).astype(F32)), requires_grad=True
    )
    ids = np.array([1, -1, 4, 5, 1, 2**40])
    y = tw.embedding(emulated.to_device(ids), table)
    good = (ids >= 0) & (ids < 5)
    want = np.where(good[:, None], table.data.get()[np.where(good, ids, 0)], np.nan)
    np.testing.assert_array_equal(y.data.get(), want)
    dy = rng.standard_normal((6, 40)).astype(F32)
    y.backward(emulated.to_device(dy))
    dtable = np.zeros((5, 40), F32)
    dtable[1], dtable[4] = dy[0] + dy[4], dy[2]
    np.testing.assert_array_equal(table.grad.get(), dtable)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}])
def test_a_bad_target_is_nan_in_its_row_alone(options, rng):
    host = rng.standard_normal((6, 40)).astype(F32)
    ids = np.array([1, -1, 40, 39, -100, 2**40])
    logits = tw.tensor(emulated.to_device(host), requires_grad=True)
    loss = tw.cross_entropy(logits, emulated.to_device(ids), reduction="none", **options)
    loss.backward(emulated.to_device(np.ones(6, F32)))
    bad = np.isin(ids, (-1, 40, 2**40))
    on_cpu = tw.tensor(host, requires_grad=True)
    want = tw.cross_entropy(on_cpu, np.where(bad, 0, ids), reduction="none", **options)
    want.backward(np.ones(6, F32))
    for found, right in ((loss.data, want.data), (logits.grad, on_cpu.grad)):
        assert np.isnan(found.get()[bad]).all()
        np.testing.assert_allclose(found.get()[~bad], right[~bad], rtol=1e-5, atol=1e-6)
    assert np.isnan(float(tw.cross_entropy(logits, emulated.to_device(ids))))


def test_there_is_no_target_without_classes():
    logits, ids = emulated.to_device(np.empty((2, 0), F32)), emulated.to_device(np.zeros(2, int))
    with pytest.raises(tw.ShapeError, match=r"^cross_entropy: target .* without classes$"):
        tw.cross_entropy(logits, ids)


ORDERS = [("in order", 0), ("reversed", 0), ("shuffled", 1), ("shuffled", 2)]


@pytest.mark.parametrize(("name", "case"), harness.all_cases())
def test_the_order_of_threads_does_not_matter(name, case):
    """The same bits in every schedule, forward and backward, and nothing is found."""
    arguments = harness.inputs(name, case, harness.DTYPES["float32"])
    found = set()
    for order, seed in ORDERS:
        _core.emulator.set_schedule(order, seed)
        try:
            found.add(_bits(OPS[name], arguments))
        finally:
            _core.emulator.set_schedule("in order")
    assert len(found) == 1


def _bits(op, arguments):
    needs = [n for n in op.grads if harness.is_float(arguments.get(n))]
    ctx = Context(frozenset(needs)) if needs and op.backward else NO_TAPE
    outs = harness.as_tuple(op.forward(ctx, **arguments))
    grads = ()
    if needs and op.backward:
        rng = harness.rng_for("order", op.name)  # ones would add up alike in any order
        dys = [np.asarray(rng.standard_normal(out.shape)).astype(out.dtype) for out in outs]
        grads = op.backward(ctx, *dys)
    return tuple(
        np.ascontiguousarray(r).tobytes()
        for r in (*outs, *harness.as_tuple(grads))
        if r is not None
    )


def test_tensors_move_to_a_device_and_back(rng):
    host = rng.standard_normal((3, 4)).astype(F32)
    leaf = tw.tensor(host, requires_grad=True)
    moved = leaf.to("emulated")
    assert (leaf.device, moved.device, moved.to("emulated")) == ("cpu", "emulated", moved)
    np.testing.assert_array_equal(moved.numpy(), host)
    (moved * moved).sum().to("cpu").backward()
    np.testing.assert_array_equal(leaf.grad, 2 * host)
    assert tw.tensor(host, device="emulated").device == "emulated"
    assert "emulated" not in repr(moved)
    with pytest.raises(tw.DeviceError, match=r"^to: device must be 'cpu' or 'emulated', got 'gpu'"):
        leaf.to("gpu")


def test_arithmetic_stays_on_the_device(rng):
    host = rng.standard_normal((3, 4)).astype(F32)
    x = tw.tensor(host, device="emulated", requires_grad=True)
    y = (tw.where(x > 0, x, 0.5 * x) + 1).mean(axis=0).reshape(2, 2).max()
    assert y.device == "emulated"
    y.backward()
    on_cpu = tw.tensor(host, requires_grad=True)
    (tw.where(on_cpu > 0, on_cpu, 0.5 * on_cpu) + 1).mean(axis=0).reshape(2, 2).max().backward()
    np.testing.assert_array_equal(x.grad.get(), on_cpu.grad)


def test_modules_move_and_come_back():
    model = tw.nn.Sequential(tw.nn.Linear(3, 4), tw.nn.LayerNorm(4))
    before = {name: p.numpy().copy() for name, p in model.named_parameters()}
    assert model.to("emulated") is model
    assert {p.device for p in model.parameters()} == {"emulated"}
    model.to("cpu")
    for name, p in model.named_parameters():
        assert p.device == "cpu"
        np.testing.assert_array_equal(p.data, before[name])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("compute", ["int8", "float"])
def test_quantized_products_stay_on_the_device(bits, group_size, compute, x, rng):
    """By integers the bits are the CPU's; by floats those of a product with the dequantized."""
    w = rng.standard_normal((40, 24)).astype(F32)
    options = {"bits": bits, "axis": 1, "group_size": group_size, "symmetric": False}
    here = tw.quantize(w, **options)
    q = tw.quantize(emulated.to_device(w), **options)
    for part in ("data", "scale", "offset"):
        assert type(getattr(q, part)) is emulated.EmulatedArray
        assert harness.same_bits(getattr(q, part).get(), getattr(here, part)), part
    y = tw.qmatmul(x, q, compute=compute)
    assert type(y) is emulated.EmulatedArray
    if compute == "int8":
        want = tw.qmatmul(x.get(), here, compute=compute)
    else:
        want = tw.matmul(x, emulated.to_device(tw.dequantize(here))).get()
    assert harness.same_bits(y.get(), want)


def test_quantized_arrays_alone_stay_on_the_device(x, rng):
    w = emulated.to_device(rng.standard_normal((40, 24)).astype(F32))
    here = tw.quantize(x.get(), axis=0, symmetric=False), tw.quantize(w.get(), axis=1)
    there = tw.quantize(x, axis=0, symmetric=False), tw.quantize(w, axis=1)
    with on_device.left_alone():
        y, back = tw.qmatmul(*there), tw.dequantize(there[0])
        assert type(y) is type(back) is emulated.EmulatedArray
        assert harness.same_bits(y.get(), tw.qmatmul(*here))
        assert harness.same_bits(back.get(), tw.dequantize(here[0]))


def test_quantized_weights_of_another_memory_are_refused(x, rng):
    w = tw.quantize(rng.standard_normal((40, 24)).astype(F32), axis=1)
    with pytest.raises(tw.DeviceError, match=r"^qmatmul: .* in one memory"):
        tw.qmatmul(x, w)


OPTIMIZERS = {
    "adam": (tw.optim.Adam, {"weight_decay": 0.3, "maximize": True}),
    "adamw": (tw.optim.AdamW, {"weight_decay": 0.2, "amsgrad": True, "betas": (0.5, 0.6)}),
    "sgd": (tw.optim.SGD, {"weight_decay": 0.3}),
    "momentum": (tw.optim.SGD, {"momentum": 0.9, "dampening": 0.4}),
    "nesterov": (tw.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "rmsprop": (tw.optim.RMSprop, {"alpha": 0.7}),
    "centered": (tw.optim.RMSprop, {"alpha": 0.7, "centered": True, "momentum": 0.5}),
}


def tensors_of_any_kind(rng):
    """Around the run of a block, more than a launch takes, in every dtype, with gaps."""
    sizes = [(4095,), (4096,), (3, 4097), (0, 5), (), *[(7,)] * 60]
    arrays = [np.asarray(rng.standard_normal(size), F32) for size in sizes]
    arrays += [rng.standard_normal((5, 9)).astype(t) for t in harness.DTYPES.values()]
    arrays += [np.asfortranarray(arrays[2]), arrays[0][::-2]]
    return arrays


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_have_the_bits_of_the_cpu(name, rng):
    kind, options = OPTIMIZERS[name]
    arrays = tensors_of_any_kind(rng)
    here = [tw.Tensor(a.copy(), requires_grad=True) for a in arrays]
    there = [tw.Tensor(emulated.to_device(a), requires_grad=True) for a in arrays]
    optimizers = [kind(params, lr=0.1, **options) for params in (here, there)]
    for _ in range(5):
        for p, q in zip(here, there, strict=True):
            p.grad = rng.standard_normal(p.shape).astype(p.dtype)
            q.grad = emulated.to_device(p.grad)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(here, there, strict=True):
        assert harness.same_bits(p.data, q.data.get()), p.shape
        for slot, state in optimizers[0].state[p].items():
            if slot != "step":
                assert harness.same_bits(state, optimizers[1].state[q][slot].get()), (slot, p.shape)


@pytest.mark.parametrize("there", [emulated.to_device, lambda x: x], ids=["emulated", "cpu"])
def test_sums_have_the_bits_of_the_cpu(there, rng):
    """What a program adds and copies gradients by; NumPy's sum is the reference."""
    for a, b in itertools.product(tensors_of_any_kind(rng), repeat=2):
        if a.shape != b.shape:
            continue
        wide = a.astype(F32) + b.astype(F32)
        out = there(np.empty(a.shape, a.dtype))
        _core.sum(there(a), there(b), out)
        assert harness.same_bits(_back(out), wide.astype(a.dtype)), (a.shape, a.dtype, b.dtype)
        _core.sum(there(b), None, out)
        assert harness.same_bits(_back(out), b.astype(F32).astype(a.dtype))
        both = there(a.copy())
        _core.sum(both, there(b), both)
        assert harness.same_bits(_back(both), wide.astype(a.dtype))


def _back(x):
    return x.get() if type(x) is emulated.EmulatedArray else x


@pytest.mark.parametrize("p", [2.0, 1.0, np.inf])
def test_gradients_are_clipped_on_the_device(p, rng):
    arrays = tensors_of_any_kind(rng)
    here = [tw.Tensor(a, requires_grad=True) for a in arrays]
    there = [tw.Tensor(emulated.to_device(a), requires_grad=True) for a in arrays]
    for x, y in zip(here, there, strict=True):
        x.grad, y.grad = x.data.copy(), emulated.to_device(x.data)
    exact = np.concatenate([a.astype(np.float64).ravel() for a in arrays])
    norm = tw.optim.clip_grad_norm_(there, 0.5, p)
    assert norm == pytest.approx(np.linalg.norm(exact, p), rel=1e-12)
    assert tw.optim.clip_grad_norm_(here, 0.5, p) == pytest.approx(norm, rel=1e-12)
    for x, y in zip(here, there, strict=True):
        np.testing.assert_array_equal(x.grad, y.grad.get())
    limit = 2.0**-14  # a number of every dtype
    tw.optim.clip_grad_value_(there, limit)
    assert max(abs(y.grad.get()).max(initial=0) for y in there) == limit


def test_state_follows_its_parameter_and_is_saved_from_there(rng, tmp_path):
    start, grads = rng.standard_normal((3, 5)).astype(F32), rng.standard_normal((3, 3, 5), F32)
    whole, moving = (tw.tensor(start, requires_grad=True) for _ in range(2))
    optimizers = [tw.optim.AdamW([p], lr=0.1) for p in (whole, moving)]
    for i, grad in enumerate(grads):
        if i == 1:
            moving.data = emulated.to_device(moving.data)
        whole.grad, moving.grad = grad, grad if i == 0 else emulated.to_device(grad)
        for optimizer in optimizers:
            optimizer.step()
    assert type(optimizers[1].state[moving]["m"]) is emulated.EmulatedArray
    assert harness.same_bits(whole.data, moving.data.get())
    tw.save(optimizers[1].state_dict(), tmp_path / "state")
    again = tw.optim.AdamW([tw.tensor(start, requires_grad=True, device="emulated")])
    again.load_state_dict(tw.load(tmp_path / "state"))
    (p,) = again.params
    assert harness.same_bits(again.state[p]["v"].get(), optimizers[0].state[whole]["v"])


def test_gradients_of_another_memory_are_refused(x):
    p = tw.Tensor(x, requires_grad=True)
    p.grad = np.ones((5, 40), F32)
    with pytest.raises(tw.DeviceError, match=r"^sgd_step: grads\[0\] must be in the memory of"):
        tw.optim.SGD([p]).step()
