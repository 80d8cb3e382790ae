"""What the generic tests don't say of arrays on a device: here that of emulated CUDA.

Collected only where TILEWRIGHT_EMULATED names an emulated extension (README.md).
"""

from __future__ import annotations

import numpy as np
import pytest

import emulated
import harness
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


def test_an_op_without_a_kernel_says_so(x):
    with pytest.raises(tw.UnsupportedError, match=r"^pack: there is no CUDA kernel yet, and b is"):
        tw.pack(x)


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
        grads = op.backward(ctx, *[np.ones_like(out) for out in outs])
    return tuple(
        np.ascontiguousarray(r).tobytes()
        for r in (*outs, *harness.as_tuple(grads))
        if r is not None
    )
