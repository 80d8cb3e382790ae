"""quantize: csrc/ops/quantize.cc (rule) · csrc/cpu/quantize.cc · csrc/simd/quantize.cc.

Its result is a QuantizedArray, which no gradient flows through. tests/test_quantize.py holds it to
its formula, bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright import _core
from tilewright.device import is_array
from tilewright.errors import DtypeError, ShapeError
from tilewright.quantized import (
    QuantizedArray,
    check_axes,
    check_bits,
    check_groups,
    packed_shape,
    scale_shape,
)
from tilewright.registry import NO_TAPE, Context, Cost, Op, Reference, empty_in_order, op

_SIGNED, _UNSIGNED = np.dtype(np.int8), np.dtype(np.uint8)


@op()
class quantize:
    """Round an array to integers: x ~ scale * q + offset.

        symmetric   s = max|x| / L             q = clamp(rne(x / s), -L, L), L = 127 (4 bits: 7)
        else        s = (max x - min x) / L    q = clamp(rne((x - min x) / s), 0, L), L = 255 (15)
                    offset = min x

    All in float32, rounded to nearest even; s is 1 where that is 0. The bits are the same on every
    ISA level. The maxima are those of the whole array, of each index of ``axis``, or of each group
    of ``group_size`` neighbours along the reduced axis: the last one that is not ``axis``.

    Args:
        x: float32, bfloat16 or float16, any shape and strides.
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

    @staticmethod
    def call(self: Op, x: Any, **options: Any) -> Any:
        if type(x) is np.ndarray and "out" not in options:  # `forward` itself checks the options
            return quantize.forward(NO_TAPE, x, **options)
        return Op.__call__(self, x, **options)

    @staticmethod
    def forward(
        ctx: Context,
        x: Any,
        *,
        bits: int = 8,
        axis: int | None = None,
        group_size: int | None = None,
        symmetric: bool = True,
        out: QuantizedArray | None = None,
    ) -> QuantizedArray:
        check_bits("quantize", bits)
        if not is_array(x):
            raise DtypeError(f"quantize: x must be an array, got {type(x).__name__}")
        if not isinstance(symmetric, bool | np.bool_):
            raise DtypeError(f"quantize: symmetric must be a bool, got {type(symmetric).__name__}")
        axis, along = check_axes("quantize", "x", x.shape, axis, None, bits)
        check_groups("quantize", "x", x.shape, axis, group_size)
        kind = _SIGNED if symmetric else _UNSIGNED
        if out is None:
            data = empty_in_order(x, kind, packed_shape(x.shape, along, bits))
            scale = _core.empty(scale_shape(x.shape, axis, along, group_size), np.float32)
            offset = None if symmetric else _core.empty_like(scale)
        else:
            _check_out(out, x, kind, bits, axis, along, group_size, bool(symmetric))
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

    @staticmethod
    def reference(
        x: Any,
        *,
        bits: int = 8,
        axis: int | None = None,
        group_size: int | None = None,
        symmetric: bool = True,
    ) -> tuple[Reference, ...]:
        """Data, scale and, where there is one, offset: in float32, whose roundings are the rule."""
        x = np.asarray(x, np.float32)
        axis, along = check_axes("quantize", "x", x.shape, axis, None, bits)
        check_groups("quantize", "x", x.shape, axis, group_size)
        low, high = (_folded(f, x, axis, along, group_size) for f in (np.minimum, np.maximum))
        top = 2.0 ** (bits - symmetric) - 1
        scale = (np.maximum(high, -low) if symmetric else high - low) / np.float32(top)
        scale = np.where(scale == 0, np.float32(1), scale)
        offset = np.zeros_like(low) if symmetric else low
        wide, shift = scale, offset
        if group_size is not None:
            wide, shift = (
                np.repeat(v, group_size, along).take(range(x.shape[along]), along)
                for v in (scale, offset)
            )
        q = np.clip(np.rint((x - shift) / wide), -top if symmetric else 0, top)
        q = np.where(np.isfinite(wide), q, 0).astype(_SIGNED if symmetric else _UNSIGNED)
        shape = scale_shape(x.shape, axis, along, group_size)
        floats = [v.reshape(shape) for v in ([scale] if symmetric else [scale, offset])]
        data = q if bits == 8 else _paired(q, along)
        return (Reference(data, 0, 1), *(Reference(v, abs(v), 1) for v in floats))

    @staticmethod
    def cost(x: Any, *, bits: int = 8, **_: Any) -> Cost:
        return Cost(3.0 * x.size, x.nbytes + x.size * bits // 8)

    rows = ()

    # shape; kept axis; then 4 bits, g group size, o offsets
    cases = (
        "1,1;0",
        "3,5;none",
        "7,33;1",
        "17,130;0",
        "2,3,65;1",
        "0,4;1",
        "96,768;0",
        "7,33;1;o",
        "5,70;0;g32",
        "70,5;1;g7;o",
        "37;none",
        "70;none;g16",
        "3,65;none;4",
        "5,33;0;4;g8",
        "33,5;1;4;g5;o",
    )

    @staticmethod
    def make(case: str, rng: Any, dtype: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        shape, axis, *flags = case.split(";")
        groups = [int(f[1:]) for f in flags if f[0] == "g"]
        x = rng.standard_normal([int(n) for n in shape.split(",")]).astype(dtype)
        return (x,), {
            "bits": 4 if "4" in flags else 8,
            "axis": None if axis == "none" else int(axis),
            "group_size": groups[0] if groups else None,
            "symmetric": "o" not in flags,
        }


def _folded(fold: np.ufunc, x: Any, axis: int | None, along: int, group_size: int | None) -> Any:
    """The least or the largest of all that share a scale; 0 where there is nothing."""
    if group_size is not None:
        return fold.reduceat(x, range(0, x.shape[along], group_size), along)
    others = tuple(d for d in range(x.ndim) if d != axis)
    if x.size:
        return fold.reduce(x, others, keepdims=True)
    return np.zeros([x.shape[d] if d == axis else 1 for d in range(x.ndim)], np.float32)


def _paired(q: Any, along: int) -> Any:
    """Numbers of 4 bits, two a byte along an axis, the first one in the lower nibble."""
    q = np.moveaxis(q, along, -1)
    even = np.pad(q, [(0, 0)] * (q.ndim - 1) + [(0, q.shape[-1] % 2)])
    return np.moveaxis(even[..., ::2] & 15 | even[..., 1::2] << 4, -1, along)


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
