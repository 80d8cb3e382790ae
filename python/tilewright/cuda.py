"""CuPy's arrays as a device: where "cuda" comes from. Imported with the first array of CuPy's.

Arrays, their memory pool and the current stream are CuPy's; kernels are ours, of the extension that
was built with CUDA. Nothing here waits for the GPU but ``get``.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from tilewright import _core, _extension
from tilewright.device import Device, register
from tilewright.errors import DeviceError

_INSTALL = "python -m pip install"
_CUPY = f"{_INSTALL} 'cupy-cuda13x>=14'"
_BUILD = f"TILEWRIGHT_CUDA=ON {_INSTALL} --no-binary tilewright tilewright"


class CudaDevice:
    """One GPU, as CuPy numbers them; see ``tilewright.device.Device``."""

    def __init__(self, cupy: Any, index: int, known: dict[int, CudaDevice]) -> None:
        self._cupy, self.index, self._known = cupy, index, known
        self.name = f"cuda:{index}" if index else "cuda"

    def at(self, x: Any) -> Device:
        return self._number(int(x.device.id))

    def called(self, name: str) -> Device | None:
        kind, _, index = name.partition(":")
        if kind != "cuda":
            return None
        count = self._cupy.cuda.runtime.getDeviceCount()
        if not (index or "0").isdecimal() or int(index or 0) >= count:
            raise DeviceError(f"device must be one of {count} GPUs, cuda:0 and on, got {name!r}")
        return self._number(int(index or 0))

    def current(self) -> AbstractContextManager[Any]:
        return self._cupy.cuda.Device(self.index)  # type: ignore[no-any-return]

    def empty(self, shape: Any, dtype: Any) -> Any:
        with self.current():
            return self._cupy.empty(shape, _plain(dtype))

    def empty_like(self, x: Any) -> Any:
        if type(x) is not self._cupy.ndarray:  # the kernel's own check words the error
            return self.empty(np.shape(x), np.float32)
        with self.current():
            return self._cupy.empty_like(x)

    def put(self, x: Any) -> Any:
        with self.current():
            return self._cupy.asarray(x)

    def get(self, x: Any) -> Any:
        order = sorted(range(x.ndim), key=lambda d: -abs(x.strides[d]))  # CuPy keeps none itself
        return self._cupy.asnumpy(x.transpose(order)).transpose(np.argsort(order))

    def stream(self) -> int:
        return int(self._cupy.cuda.get_current_stream().ptr)

    def _number(self, index: int) -> CudaDevice:
        if index not in self._known:
            self._known[index] = CudaDevice(self._cupy, index, self._known)
        return self._known[index]


def _plain(dtype: Any) -> Any:
    """A dtype that a device has; of others, an argument's own check words the error."""
    dtype = np.dtype(dtype)
    return np.dtype(np.float32) if dtype.hasobject else dtype


def connect() -> Device:
    """Make CuPy's arrays a device, once.

    Raises:
        DeviceError: something is missing; the message has the line that cures it.
    """
    missing = lacks()
    if missing:
        raise DeviceError(f"device 'cuda' can't be used: {missing}")
    cupy = sys.modules["cupy"]
    known: dict[int, CudaDevice] = {}
    first = known[0] = CudaDevice(cupy, 0, known)
    register(cupy.ndarray, first)
    return first


def lacks() -> str:
    """Say what is missing for a GPU and how to get it; empty where nothing is."""
    if not hasattr(_core, "enter_gpu"):
        return f"{_extension.WHY_NOT_CUDA}; to build it: {_BUILD}"
    try:
        import cupy  # type: ignore[import-not-found]
    except ImportError as error:
        return f"CuPy does not load ({_one_line(error)}); to install it: {_CUPY}"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy's own, of the driver: missing, too old
        return (
            f"the NVIDIA driver does not answer ({_one_line(error)}); CUDA 13 needs driver 580 or "
            "newer: https://www.nvidia.com/drivers"
        )
    return "" if count else "the NVIDIA driver sees no GPU: see nvidia-smi"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
