"""Lets the generic tests run on a device as they are: ops take NumPy arrays there and back.

The device is emulated CUDA (emulated.py) or a GPU by CuPy (on_cuda.py); conftest.py chooses.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager

import numpy as np

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

_device = _kind = _to_device = None  # of use()


def device():
    """What was given to ``use``, or None."""
    return _device


def _is_there(value):
    """Whether this is on the device, the parts of a QuantizedArray included."""
    from tilewright import QuantizedArray

    return type(value.data if type(value) is QuantizedArray else value) is _kind


def moved(value):
    """The same with the device's arrays for NumPy's, in tuples and QuantizedArrays too."""
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return _to_device(value)
    return _each(moved, value)


def returned(value):
    """The same with NumPy's arrays."""
    return _device.get(value) if type(value) is _kind else _each(returned, value)


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
        out[...] = _device.get(moved)
    else:
        for part in ("data", "scale", "offset"):
            if getattr(out, part) is not None:
                _write(getattr(out, part), getattr(moved, part))


def use(device, kind, to_device):
    """Let what follows be about this device.

    Args:
        device: see ``tilewright.device.Device``.
        kind: the type of its arrays.
        to_device: copies a NumPy array there, with its strides and alignment.
    """
    from tilewright.device import register

    global _device, _kind, _to_device
    _device, _kind, _to_device = device, kind, to_device
    register(kind, device)


def wrap_ops():
    """Let each op's forward and backward run on the device, for NumPy arrays in and out."""
    from tilewright.device import running_on
    from tilewright.registry import OPS, Op

    for name in set(OPS) - KERNELS:  # which say so themselves: test_emulated.py
        del OPS[name]

    def forward(name, inner, *args, **kwargs):
        if _left_alone or any(_is_there(v) for v in (*args, *kwargs.values())):
            return inner(*args, **kwargs)
        ctx, args = args[0], args[1:]
        out = kwargs.get("out")
        there = {n: moved(v) for n, v in kwargs.items()}
        with running_on(_device, name):
            result = inner(ctx, *moved(args), **there)
        given = [(m, o) for m, o in zip(_flat(there.get("out")), _flat(out), strict=True)]
        results = []
        for r in result if type(result) is tuple else (result,):
            for m, o in given:
                if r is m:
                    _write(o, m)
                    r = o
                    break
            results.append(returned(r))
        return tuple(results) if type(result) is tuple else results[0]

    def backward(name, inner, ctx, *douts):
        if _left_alone or any(type(v) is _kind for v in douts):
            return inner(ctx, *douts)
        with running_on(_device, name):
            return returned(inner(ctx, *moved(douts)))

    for op in OPS.values():
        op.forward = functools.partial(forward, op.name, op.forward)
        if op.backward is not None:
            op.backward = functools.partial(backward, op.name, op.backward)
        type(op).__call__ = Op.__call__  # a fast path for plain arrays would pass by ``forward``


def _flat(value):
    return value if type(value) is tuple else (value,)
