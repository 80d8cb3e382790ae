"""Arrays in another memory than the CPU's: which there are, and what a call on them needs.

A *device array* is one that kernels take where it is and that results are made like: CuPy's arrays
on CUDA. NumPy arrays are none, and arrays of other libraries are foreign (interop.py). Every kind
has a ``Device``, found by the array's type.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from tilewright import _core


class Device(Protocol):
    """Makes arrays of one kind. ``name`` is "cuda", or what errors call it."""

    name: str

    def empty(self, shape: Any, dtype: Any) -> Any:
        """Return a fresh C-contiguous array."""

    def empty_like(self, x: Any) -> Any:
        """Return a fresh array with the shape, dtype and order of axes of an array of this kind."""

    def stream(self) -> int:
        """Return the address of the stream that launches go to."""


_gpu: Any = _core  # has the two functions below where it was built with CUDA
_DEVICES: dict[type, Device] = {}  # by the type of their arrays


def register(kind: type, device: Device) -> None:
    """Say that arrays of this type, which have the CUDA array interface, are those of a device."""
    _DEVICES[kind] = device


def device_of(value: Any) -> Device | None:
    """Return the device whose arrays are of this type, or None."""
    return _DEVICES.get(type(value))


def as_array(value: Any) -> Any:
    """Return an array of a device as it is, and anything else as a NumPy array."""
    return np.asarray(value) if device_of(value) is None else value


@contextmanager
def running_on(device: Device | None) -> Iterator[None]:
    """Run the calls inside the block on a device: results are its arrays. None changes nothing."""
    if device is None:
        yield
        return
    before = _gpu.enter_gpu(device, device.stream())
    try:
        yield
    finally:
        _gpu.leave_gpu(before)
