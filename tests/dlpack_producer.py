"""A small array library that knows DLPack and nothing else, written against the ABI by ctypes.

``Array`` owns bytes that no NumPy array owns and exports them as told: versioned or legacy, without
strides, at an offset, read-only, from another device. ``exports`` counts what happened to each
capsule. ``from_dlpack`` reads capsules of others back, so that this module is a family of arrays.
"""

from __future__ import annotations

import ctypes
import itertools

import ml_dtypes
import numpy as np

INT, UINT, FLOAT, BFLOAT, BOOL = 0, 1, 2, 4, 6
CPU, CUDA = 1, 2

_api = ctypes.pythonapi
_new = _api.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_valid = _api.PyCapsule_IsValid
_valid.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
_pointer = _api.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]
_rename = _api.PyCapsule_SetName
_rename.argtypes = [ctypes.c_void_p, ctypes.c_char_p]


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Managed(ctypes.Structure):
    name, used = b"dltensor", b"used_dltensor"
    _fields_ = [("tensor", Tensor), ("manager", ctypes.c_void_p), ("deleter", DELETER)]


class ManagedVersioned(ctypes.Structure):
    name, used = b"dltensor_versioned", b"used_dltensor_versioned"
    _fields_ = [
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p), ("deleter", DELETER),
        ("flags", ctypes.c_uint64), ("tensor", Tensor),
    ]  # fmt: skip


class Export:
    """One capsule: alive until its deleter is called, by the reader or by the unread capsule."""

    def __init__(self):
        self.deleted = 0


exports: list[Export] = []  # in the order they were made; tests clear it
_alive: dict[int, tuple] = {}  # address of the struct -> everything it points to
_manager = itertools.count(1)


def _delete(address):
    export, *_ = _alive[address]
    export.deleted += 1


@DELETER
def _deleter(address):
    _delete(address)


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _capsule_dies(capsule):
    for kind in (Managed, ManagedVersioned):
        if _valid(capsule, kind.name):  # nobody read it
            _delete(_pointer(capsule, kind.name))


def _code(dtype):
    if dtype == ml_dtypes.bfloat16:
        return BFLOAT
    return {"i": INT, "u": UINT, "f": FLOAT, "b": BOOL}[dtype.kind]


class Array:
    """Memory with a shape; ``options`` override what is exported, field by field."""

    def __init__(self, values, *, versioned=True, read_only=False, byte_offset=0, **options):
        values = np.asarray(values)
        self.dtype, self.shape = values.dtype, values.shape
        self.versioned, self.read_only, self.byte_offset = versioned, read_only, byte_offset
        self.options = options
        self.strides = [s // max(1, values.itemsize) for s in values.strides]
        low = sum(min(0, s * (n - 1)) for s, n in zip(self.strides, self.shape, strict=True))
        high = sum(max(0, s * (n - 1)) for s, n in zip(self.strides, self.shape, strict=True))
        size = (high - low + 1) * values.itemsize if values.size else 0
        self.start = byte_offset - low * values.itemsize  # where element 0 is
        self.memory = ctypes.create_string_buffer(self.start + size + 1)
        self.numpy()[...] = values

    def numpy(self):
        """A NumPy view of the memory, for comparisons."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        steps = [s * self.dtype.itemsize for s in self.strides]
        return np.ndarray(self.shape, self.dtype, self.memory, self.start, steps)

    def __dlpack_device__(self):
        return self.options.get("device_type", CPU), 0

    def __dlpack__(self, *, max_version=None):
        kind = ManagedVersioned if self.versioned and max_version else Managed
        return self.export(kind)

    def export(self, kind):
        struct, shape = kind(), (ctypes.c_int64 * max(1, len(self.shape)))(*self.shape)
        strides = (ctypes.c_int64 * max(1, len(self.shape)))(*self.strides)
        tensor = struct.tensor
        base = ctypes.addressof(self.memory) + self.start - self.byte_offset
        tensor.data = base if 0 not in self.shape else None
        tensor.device_type, tensor.byte_offset = CPU, self.byte_offset
        tensor.ndim, tensor.shape, tensor.strides = len(self.shape), shape, strides
        tensor.code, tensor.bits, tensor.lanes = _code(self.dtype), 8 * self.dtype.itemsize, 1
        struct.deleter = _deleter
        if kind is ManagedVersioned:
            struct.major, struct.minor, struct.flags = 1, 1, int(self.read_only)
        for name, value in self.options.items():
            setattr(tensor if hasattr(tensor, name) else struct, name, value)
        export = Export()
        exports.append(export)
        address = ctypes.addressof(struct)
        _alive[address] = (export, struct, shape, strides, self.memory)
        return _new(address, kind.name, ctypes.cast(_capsule_dies, ctypes.c_void_p))


class Old(Array):
    """As before DLPack 1: no keywords."""

    def __dlpack__(self):
        return self.export(Managed)


def from_dlpack(source):
    """Read another library's array, by a copy."""
    assert source.__dlpack_device__() == (CPU, 0)
    capsule = source.__dlpack__(max_version=(1, 0))
    kind = ManagedVersioned
    struct = kind.from_address(_pointer(id(capsule), kind.name))
    _rename(id(capsule), kind.used)
    tensor, size = struct.tensor, struct.tensor.bits // 8
    shape = [tensor.shape[d] for d in range(tensor.ndim)]
    strides = [tensor.strides[d] * size for d in range(tensor.ndim)]
    types = {FLOAT: "f", INT: "i", UINT: "u"}
    dtype = ml_dtypes.bfloat16 if tensor.code == BFLOAT else f"{types[tensor.code]}{size}"
    if 0 in shape:
        found = np.zeros(shape, dtype)
    else:  # elements lie at and after the first one: results are never reversed
        reach = sum(s * (n - 1) for s, n in zip(strides, shape, strict=True)) + size
        memory = (ctypes.c_char * reach).from_address(tensor.data + tensor.byte_offset)
        found = np.ndarray(shape, dtype, memory, 0, strides).copy()
    struct.deleter(ctypes.addressof(struct))
    return Array(found)
