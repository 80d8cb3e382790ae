"""A device for tests: arrays in the CUDA emulator's memory, which behave as CuPy's do.

``load(path)`` puts an emulated extension in the place of ``tilewright._core``, before tilewright is
imported. ``wrap_ops()`` then lets every registered op take NumPy arrays through the device and
back, so that the generic tests run on it as they are (``pytest --emulated FILE``).
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import sys
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np

try:
    from numpy.lib.array_utils import byte_bounds
except ImportError:  # NumPy 1
    from numpy import byte_bounds


# The ops that have CUDA kernels.
KERNELS = {
    *("relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"),
    *("attention", "attention_varlen"),
    *("layernorm", "rmsnorm"),
    *("dropout", "rope", "embedding", "mse", "cross_entropy"),
    *("softmax", "log_softmax"),
    *("matmul", "int8_matmul", "qmatmul", "quantize", "dequantize"),
}  # fmt: skip


# Arguments whose wrong shape only the device could tell: it has the offsets of the sequences.
TOLD_BY_DEVICE = {("attention_varlen", "q")}


def load(path):
    """Make the extension in this file ``tilewright._core``; it must come before tilewright."""
    name = "tilewright._core"
    assert name not in sys.modules, "tilewright was imported before --emulated took effect"
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    sys.modules[name] = module
    loader.exec_module(module)


def _emulator():
    from tilewright import _core

    return _core.emulator


class EmulatedArray(np.lib.mixins.NDArrayOperatorsMixin):
    """An array on the emulated device: NumPy computes on it as CuPy does on its own.

    Like CuPy's it is no ndarray, never becomes one unasked (``get`` copies it), and NumPy's
    functions return arrays of its kind. ``host`` is an ndarray over the same memory.
    """

    __slots__ = ("host",)
    __hash__ = None

    def __init__(self, host):
        self.host = host

    def kin(self, host):
        """Return an array of this kind, where this one is, over device memory."""
        return EmulatedArray(host)

    def _back(self, value, out=None):
        return _back(self.kin, value, out)

    @property
    def __cuda_array_interface__(self):
        h = self.host
        return {
            "shape": h.shape,
            "typestr": h.dtype.str,
            "data": (h.ctypes.data, not h.flags.writeable),
            "strides": h.strides,
            "version": 3,
        }

    def get(self):
        """Return a NumPy copy, in the same order of axes."""
        return self.host.copy(order="K")

    def __array__(self, *_: Any, **__: Any):
        raise TypeError("an array of the emulated device becomes NumPy's only by .get()")

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        return self._back(
            getattr(ufunc, method)(*_over(inputs), **_over(kwargs)), kwargs.get("out")
        )

    def __array_function__(self, func, types, args, kwargs):
        return self._back(func(*_over(args), **_over(kwargs)), kwargs.get("out"))

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self.host, name)
        if not callable(value):
            return self._back(value)
        return lambda *args, **kwargs: self._back(value(*_over(args), **_over(kwargs)))

    def __getitem__(self, index):
        return self._back(self.host[_over(index)])

    def __setitem__(self, index, value):
        if isinstance(value, np.ndarray) and value.ndim:
            raise TypeError("an array of the CPU can't be written to the emulated device")
        self.host[_over(index)] = _over(value)

    def __len__(self):
        return len(self.host)

    def __float__(self):
        return float(self.host)

    def __int__(self):
        return int(self.host)

    def __bool__(self):
        return bool(self.host)

    def __repr__(self):
        return f"emulated {self.host!r}"


def _over(value):
    """The ndarrays of what a NumPy function is given."""
    if isinstance(value, EmulatedArray):
        return value.host
    if type(value) in (tuple, list):
        return type(value)(_over(v) for v in value)
    if type(value) is dict:
        return {k: _over(v) for k, v in value.items()}
    return value


def _back(kin, value, out=None):
    """What a NumPy function returned, on the device; ``out`` where it was given."""
    if out is not None:
        return out[0] if type(out) is tuple and len(out) == 1 else out
    if isinstance(value, np.ndarray):
        return kin(value if _is_device_memory(value) else to_device(value).host)
    if isinstance(value, np.generic):
        return kin(to_device(np.asarray(value)).host)
    if type(value) in (tuple, list) and any(isinstance(v, np.ndarray) for v in value):
        return type(value)(_back(kin, v) for v in value)
    return value


def _is_device_memory(array):
    while isinstance(array, np.ndarray):
        array = array.base
    return type(array).__name__ == "PyCapsule"


class EmulatedDevice:
    """Makes arrays; see ``tilewright.device.Device``."""

    name = "emulated"

    def at(self, x):
        return self

    def called(self, name):
        return self if name == self.name else None

    def current(self):
        return nullcontext()

    def empty(self, shape, dtype):
        dtype = np.dtype(dtype)
        if dtype.hasobject:  # of an argument that no kernel takes: its check words the error
            dtype = np.dtype(np.float32)
        count = int(np.prod(shape, dtype=np.int64))
        data = _emulator().allocate(count * dtype.itemsize)
        return EmulatedArray(data.view(dtype).reshape(shape))

    def empty_like(self, x):
        if type(x) is not EmulatedArray:  # the kernel's own check words the error
            return self.empty(np.shape(x), np.float32)
        order = sorted(range(x.ndim), key=lambda d: -abs(x.host.strides[d]))
        made = self.empty([x.shape[d] for d in order], x.dtype)
        return made.transpose(np.argsort(order)) if order != sorted(order) else made

    def put(self, x):
        return to_device(x)

    def get(self, x):
        return x.get()

    def stream(self):
        return 0


DEVICE = EmulatedDevice()


def to_device(x):
    """Copy a NumPy array to the device, with its strides: those of a view stay a view's."""
    x = np.asarray(x)
    if x.size == 0:
        made = DEVICE.empty(x.shape, x.dtype)
        made.host[...] = x
        made.host.flags.writeable = x.flags.writeable
        return made
    low, high = byte_bounds(x)
    shift = low % 64  # and their alignment
    memory = DEVICE.empty((high - low + shift,), np.uint8).host
    view = np.ndarray(x.shape, x.dtype, memory, x.ctypes.data - low + shift, x.strides)
    view[...] = x
    view.flags.writeable = x.flags.writeable
    return EmulatedArray(view)


def _is_there(value):
    """Whether this is on the device, the parts of a QuantizedArray included."""
    from tilewright import QuantizedArray

    return type(value.data if type(value) is QuantizedArray else value) is EmulatedArray


def _moved(value):
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return to_device(value)
    return _each(_moved, value)


def _returned(value):
    return value.get() if type(value) is EmulatedArray else _each(_returned, value)


def _each(f, value):
    """The same with f of the parts of a tuple or a QuantizedArray; what has no parts as it is."""
    from tilewright import QuantizedArray

    if type(value) is tuple:
        return tuple(f(v) for v in value)
    if type(value) is QuantizedArray:
        options = {n: getattr(value, n) for n in ("shape", "axis", "along", "bits", "group_size")}
        return QuantizedArray.of(f(value.data), f(value.scale), f(value.offset), **options)
    return value


_left_alone = False


@contextmanager
def left_alone():
    """Let ops of NumPy arrays run on the CPU, as users know them, inside the block."""
    global _left_alone
    _left_alone = True
    try:
        yield
    finally:
        _left_alone = False


def _write(out, moved):
    """What the device wrote to a moved ``out``, into ``out`` itself."""
    if isinstance(out, np.ndarray):
        out[...] = moved.get()
    else:
        for part in ("data", "scale", "offset"):
            if getattr(out, part) is not None:
                _write(getattr(out, part), getattr(moved, part))


def wrap_ops():
    """Let each op's forward and backward run on the device, for NumPy arrays in and out."""
    from tilewright.device import register, running_on
    from tilewright.registry import OPS, Op

    register(EmulatedArray, DEVICE)
    for name in set(OPS) - KERNELS:  # which say so themselves: test_emulated.py
        del OPS[name]

    def forward(inner, *args, **kwargs):
        if _left_alone or any(_is_there(v) for v in (*args, *kwargs.values())):
            return inner(*args, **kwargs)
        ctx, args = args[0], args[1:]
        out = kwargs.get("out")
        moved = {n: _moved(v) for n, v in kwargs.items()}
        with running_on(DEVICE):
            result = inner(ctx, *_moved(args), **moved)
        given = [(m, o) for m, o in zip(_flat(moved.get("out")), _flat(out), strict=True)]
        results = []
        for r in result if type(result) is tuple else (result,):
            for m, o in given:
                if r is m:
                    _write(o, m)
                    r = o
                    break
            results.append(_returned(r))
        return tuple(results) if type(result) is tuple else results[0]

    def backward(inner, ctx, *douts):
        if _left_alone or any(type(v) is EmulatedArray for v in douts):
            return inner(ctx, *douts)
        with running_on(DEVICE):
            return _returned(inner(ctx, *_moved(douts)))

    for op in OPS.values():
        op.forward = functools.partial(forward, op.forward)
        if op.backward is not None:
            op.backward = functools.partial(backward, op.backward)
        type(op).__call__ = Op.__call__  # a fast path for plain arrays would pass by ``forward``


def _flat(value):
    return value if type(value) is tuple else (value,)
