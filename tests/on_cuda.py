"""CuPy's arrays for tests on a GPU: copies of NumPy's with their strides and alignment."""

from __future__ import annotations

import cupy
import numpy as np

from emulated import byte_bounds
from tilewright import cuda

DEVICE, KIND = cuda.connect(), cupy.ndarray


def to_device(x):
    """Copy a NumPy array to the GPU; the strides of a view stay a view's."""
    x = np.asarray(x)
    if x.size == 0:
        return cupy.empty(x.shape, x.dtype)
    low, high = byte_bounds(x)
    shift = low % 64
    begin, host = x.ctypes.data - low + shift, np.zeros(high - low + shift, np.uint8)
    np.ndarray(x.shape, x.dtype, host, begin, x.strides)[...] = x
    first = cupy.asarray(host)[begin : begin + x.itemsize].view(x.dtype)
    return cupy.lib.stride_tricks.as_strided(first, x.shape, x.strides)
