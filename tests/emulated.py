"""A device for tests: arrays in the CUDA emulator's memory, which behave as CuPy's do.

``load(path)`` puts an emulated extension in the place of ``tilewright._core``, before tilewright is
imported.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from contextlib import nullcontext
from typing import Any

import numpy as np

try:
    from numpy.lib.array_utils import byte_bounds
except ImportError:  # NumPy 1
    from numpy import byte_bounds


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

    __slots__ = ("__weakref__", "base", "host")
    __hash__ = None

    def __init__(self, host, base=None):
        self.host = host
        self.base = base  # whose memory it is, if not its own

    def kin(self, host, base=None):
        """Return an array of this kind, where this one is, over device memory."""
        return EmulatedArray(host, base)

    def _back(self, value, out=None):
        return _back(self, value, out)

    @property
    def flags(self):
        """As far as CuPy has them."""
        flags = self.host.flags
        return types.SimpleNamespace(
            c_contiguous=flags.c_contiguous,
            f_contiguous=flags.f_contiguous,
            owndata=self.base is None,
        )

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


def _back(array, value, out=None):
    """What a NumPy function of an array returned, on the device; ``out`` where it was given."""
    if out is not None:
        return out[0] if type(out) is tuple and len(out) == 1 else out
    if isinstance(value, np.ndarray) and _is_device_memory(value):
        return array.kin(value, array if array.base is None else array.base)
    if isinstance(value, np.ndarray | np.generic):
        return array.kin(to_device(np.asarray(value)).host)
    if type(value) in (tuple, list) and any(isinstance(v, np.ndarray) for v in value):
        return type(value)(_back(array, v) for v in value)
    return value


def _is_device_memory(array):
    while hasattr(array, "base"):  # an ndarray, or what as_strided puts between two
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
