"""A stand-in for the module ``cupy`` over the emulator's memory: what ``tilewright.cuda`` asks for.

It is not CuPy, and no GPU: two devices that are numbers, streams that are addresses.
"""

from __future__ import annotations

import types

import numpy as np

import emulated


class ndarray(emulated.EmulatedArray):
    """An array of one of the devices."""

    __slots__ = ("device",)

    def __init__(self, host, index, base=None):
        super().__init__(host, base)
        self.device = types.SimpleNamespace(id=index)

    def kin(self, host, base=None):
        return ndarray(host, self.device.id, base)


ndarray.__module__ = "cupy"


def module(devices=2):
    """Return a fresh stand-in; ``entered`` lists the devices that were made current."""
    cupy = types.ModuleType("cupy")
    cupy.entered, current = [], [0]

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            cupy.entered.append(self.index)
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    def count():
        if isinstance(devices, Exception):
            raise devices
        return devices

    cupy.ndarray = ndarray
    cupy.empty = lambda shape, dtype: ndarray(emulated.DEVICE.empty(shape, dtype).host, current[-1])
    cupy.empty_like = lambda x: cupy.empty(x.shape, x.dtype)
    cupy.asarray = lambda x: ndarray(emulated.to_device(np.asarray(x)).host, current[-1])
    cupy.asnumpy = lambda x: np.array(x.get(), order="C")
    cupy.from_dlpack = lambda guest: guest.__dlpack__()  # of guests that are the stand-in's own
    tricks = types.SimpleNamespace(
        as_strided=lambda x, *layout: x.kin(np.lib.stride_tricks.as_strided(x.host, *layout))
    )
    cupy.lib = types.SimpleNamespace(stride_tricks=tricks)
    cupy.cuda = types.SimpleNamespace(
        Device=Device,
        runtime=types.SimpleNamespace(getDeviceCount=count),
        get_current_stream=lambda: types.SimpleNamespace(ptr=64 * current[-1]),
    )
    return cupy
