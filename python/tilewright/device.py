"""Arrays in another memory than the CPU's: which there are, and what a call on them needs.

A *device array* is one that kernels take where it is and that results are made like: CuPy's arrays
on CUDA. NumPy arrays are none, and arrays of other libraries are foreign (interop.py). Every kind
has a ``Device``, found by the array's type.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np

from tilewright import _core
from tilewright.errors import DeviceError


class Device(Protocol):
    """Makes arrays of one kind in one memory. ``name`` is what users call it: "cuda"."""

    name: str

    def at(self, x: Any) -> Device:
        """Return the device of this kind that an array of it is on: one of several GPUs."""

    def called(self, name: str) -> Device | None:
        """Return the device of this kind with this name, such as "cuda:1", or None."""

    def current(self) -> AbstractContextManager[Any]:
        """Make it the one that launches and allocations go to, inside a block."""

    def empty(self, shape: Any, dtype: Any) -> Any:
        """Return a fresh C-contiguous array."""

    def empty_like(self, x: Any) -> Any:
        """Return a fresh array with the shape, dtype and order of axes of an array of this kind."""

    def put(self, x: Any) -> Any:
        """Return a copy of a NumPy array on the device."""

    def get(self, x: Any) -> Any:
        """Return a copy of a device array in NumPy, once what computes it is done."""

    def stream(self) -> int:
        """Return the address of the stream that launches go to."""

    def __hash__(self) -> int:
        """Constants are kept by device: one object is one device."""


_gpu: Any = _core  # has the two functions below where it was built with CUDA
_DEVICES: dict[type, Device] = {}  # one of each kind, by the type of their arrays


def register(kind: type, device: Device) -> None:
    """Say that arrays of this type, which have the CUDA array interface, are those of a device."""
    _DEVICES[kind] = device


def device_of(value: Any) -> Device | None:
    """Return the device that an array is on, or None: the CPU, or no array."""
    kind = type(value)
    if kind is np.ndarray:
        return None
    known = _DEVICES.get(kind)
    if known is None and _is_cupy(kind):
        from tilewright import cuda

        known = cuda.connect()
    return known and known.at(value)


def _is_cupy(kind: type) -> bool:
    return kind.__name__ == "ndarray" and kind.__module__.partition(".")[0] == "cupy"


def named(op: str, name: Any) -> Device | None:
    """Return the device that a user's argument names; None is the CPU.

    Raises:
        DeviceError: there is no such device here.
    """
    if name in (None, "cpu"):
        return None
    try:
        if str(name).partition(":")[0] == "cuda":
            from tilewright import cuda

            cuda.connect()  # or says what is missing
        for device in _DEVICES.values():
            if (found := device.called(name)) is not None:
                return found
    except DeviceError as error:
        raise DeviceError(f"{op}: {error}") from None
    known = " or ".join(repr(n) for n in ("cpu", *(d.name for d in _DEVICES.values())))
    raise DeviceError(f"{op}: device must be {known}, got {name!r}")


def is_device_name(target: Any) -> bool:
    """Whether this names a device, known or not, and no dtype."""
    if not isinstance(target, str):
        return False
    kinds = ("cpu", "cuda", "gpu", *(device.name for device in _DEVICES.values()))
    return target.partition(":")[0] in kinds


def is_array(value: Any) -> bool:
    """Whether this is an array, of NumPy or of a device."""
    return isinstance(value, np.ndarray) or device_of(value) is not None


def as_array(value: Any) -> Any:
    """Return an array of a device as it is, and anything else as a NumPy array."""
    return np.asarray(value) if device_of(value) is None else value


def moved(x: Any, device: Device | None) -> Any:
    """Return an array in the memory of a device or of the CPU (None): itself where it is there."""
    here = device_of(x)
    if here is device:
        return x
    host = x if here is None else here.get(x)
    if device is None:
        return host
    try:
        return device.put(host)
    except MemoryError as error:
        raise DeviceError(f"{device.name} is out of memory: {error}") from None


def empty(shape: Any, dtype: Any, device: Device | None) -> Any:
    """Return a fresh array on a device or on the CPU (None)."""
    with running_on(device, "empty"):
        return _core.empty(shape, dtype)


def running_on(device: Device | None, op: str) -> AbstractContextManager[Any]:
    """Run the calls inside the block on a device: results are its arrays. None changes nothing.

    Raises:
        DeviceError: its memory is used up; names the op and the bytes asked for.
    """
    return _NOTHING if device is None else _Running(device, op)


_NOTHING = nullcontext()


class _Running:
    def __init__(self, device: Device, op: str) -> None:
        self.device, self.op = device, op

    def __enter__(self) -> None:
        self.current = self.device.current()
        self.current.__enter__()
        self.before = _gpu.enter_gpu(self.device, self.device.stream())

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        _gpu.leave_gpu(self.before)
        self.current.__exit__(kind, error, trace)
        if isinstance(error, MemoryError):  # ours, or CuPy's: both say how many bytes
            raise DeviceError(f"{self.op}: {self.device.name} is out of memory: {error}") from None
