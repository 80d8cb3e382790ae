"""Arrays of other libraries, by DLPack: read without a copy, answered in their own kind.

An object with ``__dlpack__`` that is no NumPy array is *foreign* here: a torch tensor, a JAX array.
Ops see NumPy arrays over its memory; their results go back through the ``from_dlpack`` of the
module that the object came from.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from tilewright import _core
from tilewright.errors import DeviceError, UnsupportedError
from tilewright.quantized import QuantizedArray

# Types that are certain to be neither foreign nor a Tensor: the common case, told by one look-up.
PLAIN = frozenset(
    {np.ndarray, type(None), bool, int, float, str, _core.PackedMatrix, QuantizedArray}
)
FLOATS = frozenset(np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16))

_VERSION = (1, 0)  # of the DLPack ABI that we write; every 1.x is read
_CUDA = 2
_HOST = {1: "the CPU", 3: "memory pinned for CUDA", 11: "memory pinned for ROCm"}
_DEVICES = {**_HOST, 2: "CUDA", 7: "Vulkan", 8: "Metal", 10: "ROCm", 13: "managed by CUDA"}


def is_foreign(value: Any) -> bool:
    """Whether ``value`` is an array of another library that speaks DLPack."""
    kind = type(value)
    return kind not in PLAIN and hasattr(kind, "__dlpack__") and not issubclass(kind, np.ndarray)


def array_over(value: Any, what: str) -> Any:
    """Return a NumPy array over the memory of a foreign array, or CuPy's over that of a GPU.

    Args:
        value: the foreign array.
        what: starts the messages.

    Raises:
        DeviceError: the memory is another device's, or what a GPU needs is missing.
        DtypeError: a dtype that NumPy does not have.
        UnsupportedError: its library refuses to export it, and says why.
    """
    try:
        device, index = value.__dlpack_device__()
        missing = ""
        if device == _CUDA:
            from tilewright import cuda

            if not (missing := cuda.lacks()):
                cuda.connect()
                return sys.modules["cupy"].from_dlpack(value)  # which keeps the rules of streams
            missing = f", and {missing}"
        if device not in _HOST:
            name = _DEVICES.get(device, f"DLPack device type {int(device)}")
            raise DeviceError(
                f"{what} must be in the CPU's memory, got {name} (device {index}){missing}"
            )
        try:
            capsule = value.__dlpack__(max_version=_VERSION)
        except TypeError:  # made before version 1: no such keyword
            capsule = value.__dlpack__()
    except DeviceError:
        raise
    except (BufferError, RuntimeError, TypeError, ValueError) as refused:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise UnsupportedError(
            f"{what} must be an array that its library exports, got a {kind}: {refused}"
        ) from refused
    return _core.from_dlpack(capsule, what)


def capsule_of(
    array: Any,
    stream: Any = None,
    max_version: tuple[int, int] | None = None,
    dl_device: tuple[int, int] | None = None,
    copy: bool | None = None,
) -> Any:
    """Write a NumPy array as a DLPack capsule: the body of every ``__dlpack__`` here.

    Raises:
        BufferError: the array can't be exported so: another device, strides or a dtype that DLPack
            has no word for, or read-only with a ``max_version`` that can't say it.
    """
    if stream is not None:
        raise BufferError(f"the CPU's memory has no streams: stream must be None, got {stream}")
    if dl_device is not None and tuple(dl_device) != (1, 0):
        raise BufferError(f"dl_device must be the CPU, (1, 0), got {dl_device}")
    versioned = max_version is not None and max_version[0] >= 1
    return _core.to_dlpack(array.copy() if copy else array, versioned, bool(copy))


class Exported:
    """A NumPy array for another library's ``from_dlpack``, whatever its dtype."""

    __slots__ = ("array",)

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return capsule_of(self.array, **options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def importer_of(value: Any) -> Callable[[Any], Any] | None:
    """Return the ``from_dlpack`` of the library that a foreign array comes from, if it has one.

    That is its array namespace (``__array_namespace__``), or the innermost module of its type's
    dotted name that has the function.
    """
    if hasattr(value, "__array_namespace__"):
        found = getattr(value.__array_namespace__(), "from_dlpack", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    name = type(value).__module__
    while name:
        found = getattr(sys.modules.get(name), "from_dlpack", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
        name = name.rpartition(".")[0]
    return None
