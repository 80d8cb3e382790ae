"""quantize: csrc/ops/quantize.cc (rule) · csrc/cpu/quantize.cc · csrc/simd/quantize.cc.

A function and no registered op: its result is a QuantizedArray, which no gradient flows through.
tests/test_quantize.py holds it to its formula, bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright import _core
from tilewright.autograd import unwrap
from tilewright.errors import DtypeError, ShapeError
from tilewright.quantized import (
    QuantizedArray,
    check_axes,
    check_bits,
    check_groups,
    packed_shape,
    scale_shape,
)
from tilewright.registry import empty_in_order

_SIGNED, _UNSIGNED = np.dtype(np.int8), np.dtype(np.uint8)


def quantize(
    x: Any,
    *,
    bits: int = 8,
    axis: int | None = None,
    group_size: int | None = None,
    symmetric: bool = True,
    out: QuantizedArray | None = None,
) -> QuantizedArray:
    """Round an array to integers: x ~ scale * q + offset.

        symmetric   s = max|x| / L             q = clamp(rne(x / s), -L, L), L = 127 (4 bits: 7)
        else        s = (max x - min x) / L    q = clamp(rne((x - min x) / s), 0, L), L = 255 (15)
                    offset = min x

    All in float32, rounded to nearest even; s is 1 where that is 0. The bits are the same on every
    ISA level. The maxima are those of the whole array, of each index of ``axis``, or of each group
    of ``group_size`` neighbours along the reduced axis: the last one that is not ``axis``.

    Args:
        x: float32, bfloat16 or float16 (or a Tensor of it), any shape and strides.
        bits: 8 or 4; 4 are packed two a byte along the reduced axis, the lower nibble first.
        axis: the axis that keeps a scale for each index (weights (out, in): 0), or None.
        group_size: None, or how many neighbours share a scale: x has two axes and ``axis`` is
            given, or it has one. The last group is shorter where the size does not divide.
        symmetric: True: int8, no offsets. False: uint8 with offsets.
        out: a QuantizedArray of x's shape, made with the same arguments, to write to.

    Returns:
        A QuantizedArray. Where a NaN or an infinity is among the numbers that share a scale (or
        max x - min x overflows) their integers are 0 and the scale is NaN or infinite: everything
        computed from them is NaN, and no others are touched.

    Raises:
        ShapeError, DtypeError, UnsupportedError: naming the argument.
    """
    check_bits("quantize", bits)
    x = unwrap(x, "quantize: x")
    if not isinstance(x, np.ndarray):
        raise DtypeError(f"quantize: x must be an array, got {type(x).__name__}")
    axis, along = check_axes("quantize", "x", x.shape, axis, None, bits)
    check_groups("quantize", "x", x.shape, axis, group_size)
    kind = _SIGNED if symmetric else _UNSIGNED
    if out is None:
        data = empty_in_order(x, kind, packed_shape(x.shape, along, bits))
        scale = _core.empty(scale_shape(x.shape, axis, along, group_size), np.float32)
        offset = None if symmetric else _core.empty_like(scale)
    else:
        _check_out(out, x, kind, bits, axis, along, group_size, symmetric)
        data, scale, offset = out.data, out.scale, out.offset
    kept = -1 if axis is None else axis
    _core.quantize(x, kept, data, scale, offset, bits, group_size or 0, along)
    if out is not None:
        return out
    return QuantizedArray.of(
        data,
        scale,
        offset,
        shape=x.shape,
        axis=axis,
        along=along,
        bits=bits,
        group_size=group_size,
    )


def _check_out(
    out: Any,
    x: Any,
    kind: Any,
    bits: int,
    axis: int | None,
    along: int,
    group_size: int | None,
    symmetric: bool,
) -> None:
    """Refuse an ``out`` that was not made as it is to be written.

    The kernel checks data, scales and offsets; two lengths have as many bytes of 4 bits.
    """
    if not isinstance(out, QuantizedArray):
        raise DtypeError(
            f"quantize: out must be a QuantizedArray of {bits} bits, got {type(out).__name__}"
        )
    if out.bits != bits:
        raise ShapeError(f"quantize: out must be a QuantizedArray of {bits} bits, got {out!r}")
    want = (axis, group_size, not symmetric)
    if (out.axis, out.group_size, out.offset is not None) != want:
        raise ShapeError(
            f"quantize: out must be a QuantizedArray with axis {axis}, group_size {group_size}, "
            f"{'no ' * symmetric}offsets, got {out!r}"
        )
    if bits == 8:
        return
    if (out.shape, out.along, out.data.dtype) != (x.shape, along, kind):
        raise ShapeError(
            f"quantize: out must be a QuantizedArray {x.shape} {kind.name[:-1]}4 packed along axis "
            f"{along}, got {out!r} packed along axis {out.along}"
        )
