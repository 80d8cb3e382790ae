"""The device "cuda", with a stand-in for CuPy over the emulator: no GPU, and none of CuPy's code.

Collected only where TILEWRIGHT_EMULATED names an emulated extension (README.md).
"""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

import cupy_stand_in
import on_device
import tilewright as tw
from tilewright import cuda, device

F32 = np.float32


@pytest.fixture
def cupy(monkeypatch):
    """The stand-in in CuPy's place; its arrays are a device once one is seen."""
    return _put(monkeypatch, cupy_stand_in.module())


def _put(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(device, "_DEVICES", dict(device._DEVICES))
    return module


@pytest.fixture(autouse=True)
def _ops_are_the_users():
    with on_device.left_alone():
        yield


def test_arrays_of_cupy_are_taken_and_returned(cupy, rng):
    host = rng.standard_normal((3, 8)).astype(F32)
    y = tw.softmax(cupy.asarray(host))
    assert type(y) is cupy.ndarray
    assert y.device.id == 0
    np.testing.assert_allclose(y.get(), tw.softmax(host), atol=1e-7)


def test_calls_run_on_the_device_of_their_arrays(cupy, rng):
    with cupy.cuda.Device(1):
        x = cupy.asarray(rng.standard_normal((3, 8)).astype(F32))
    cupy.entered.clear()
    y = tw.layernorm(x)
    assert y.device.id == 1
    assert set(cupy.entered) == {1}


def test_arrays_of_two_devices_are_refused(cupy):
    a = tw.tensor(np.ones((2, 2), F32), device="cuda")
    b = tw.tensor(np.ones((2, 2), F32), device="cuda:1")
    assert (a.device, b.device) == ("cuda", "cuda:1")
    error = r"^matmul: b must be on the same device as the arg.* before it, got cuda:1 and cuda$"
    with pytest.raises(tw.DeviceError, match=error):
        tw.matmul(a, b)
    np.testing.assert_array_equal(tw.matmul(a, b.to("cuda")).numpy(), np.full((2, 2), 2))


class Guest:
    """An array of another library in a GPU's memory, over one of the stand-in's."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self):
        return self.array

    def __dlpack_device__(self):
        return 2, 0

    def __array_namespace__(self):
        return types.SimpleNamespace(from_dlpack=Guest)


def test_arrays_of_other_libraries_go_in_and_out(cupy, rng):
    x = cupy.asarray(rng.standard_normal((3, 8)).astype(F32))
    y = tw.softmax(Guest(x))
    assert type(y) is Guest
    assert y.array.get().tobytes() == tw.softmax(x).get().tobytes()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_the_order_of_axes_stays_on_the_way_back(cupy, order, rng):
    x = rng.standard_normal((2, 3, 4)).astype(F32)
    there = device.named("test", "cuda").put(x).transpose(order)
    back = device.moved(there, None)
    np.testing.assert_array_equal(back, x.transpose(order))
    assert back.strides == x.transpose(order).strides
    assert device.moved(cupy.asarray(np.float32(3)), None) == 3


def test_a_module_moves_and_trains(cupy, rng):
    model = tw.nn.Linear(4, 3).to("cuda:1")
    x = tw.tensor(rng.standard_normal((5, 4)).astype(F32), device="cuda:1")
    before = model.weight.numpy().copy()
    tw.mse(model(x), tw.tensor(np.zeros((5, 3), F32), device="cuda:1")).backward()
    tw.optim.SGD(model.parameters(), lr=0.1).step()
    assert model.weight.device == "cuda:1"
    assert abs(model.weight.numpy() - before).max() > 0


@pytest.mark.parametrize("name", ["cuda:2", "cuda:x", "cuda:-1"])
def test_a_device_that_is_not_there(cupy, name):
    with pytest.raises(tw.DeviceError, match=rf"^to: device must be one of 2 GPUs.*got '{name}'"):
        tw.tensor(np.ones(2, F32)).to(name)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (None, r"CuPy does not load .*; to install it: python -m pip install 'cupy-cuda13x"),
        (RuntimeError("driver is insufficient"), r"driver does not answer \(driver is insuff.*580"),
        (0, r"the NVIDIA driver sees no GPU"),
    ],
)
def test_what_is_missing_is_named(monkeypatch, found, says):
    _put(monkeypatch, None if found is None else cupy_stand_in.module(found))
    with pytest.raises(tw.DeviceError, match=rf"^to: device 'cuda' can't be used: .*{says}"):
        tw.tensor(np.ones(2, F32)).to("cuda")
    assert cuda.lacks() in tw_report()


def tw_report():
    from tilewright.cli.report import lines

    return "\n".join(lines())


def test_a_program_runs_on_the_device_of_its_arrays(cupy, rng):
    with cupy.cuda.Device(1):
        w = tw.Tensor(cupy.asarray(rng.standard_normal((8, 3)).astype(F32)), requires_grad=True)
        x = cupy.asarray(rng.standard_normal((5, 8)).astype(F32))
    sgd = tw.optim.SGD([w], lr=0.5)

    def train(x):
        sgd.zero_grad()
        loss = tw.mse(tw.relu(x @ w), x @ w)
        loss.backward()
        sgd.step()
        return loss

    start, plain, compiled = w.data.get(), [], []
    for step, losses in ((train, plain), (tw.compile(train), compiled)):
        w.data[...] = cupy.asarray(start)
        for _ in range(4):
            cupy.entered.clear()
            losses.append(step(x))
            assert set(cupy.entered) == {1}
    assert [float(a) for a in compiled] == [float(a) for a in plain]
    assert {a.device for a in compiled} == {"cuda:1"}
