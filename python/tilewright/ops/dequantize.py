"""dequantize: csrc/ops/quantize.cc (rule) · csrc/cpu/quantize.cc · csrc/simd/quantize.cc."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tilewright import _core
from tilewright.device import device_of, running_on
from tilewright.errors import DtypeError
from tilewright.ops.quantize import quantize
from tilewright.packed import PackedMatrix
from tilewright.quantized import QuantizedArray
from tilewright.registry import NO_TAPE, Context, Cost, Reference, empty_for, empty_in_order, op


@op()
class dequantize:
    """Turn a QuantizedArray back into floats.

        y = scale * q                  with offsets y = fma(scale, q, offset)       rounded once

    Args:
        q: a QuantizedArray, or ``tw.pack`` of one.
        out: where to write y: float32, bfloat16 or float16, shaped like q; no overlap with q.

    Returns:
        y float32, shaped like q (or ``out``). A scale that is not finite gives NaN.

    Raises:
        ShapeError, DtypeError: naming the argument.
    """

    rows = ()

    @staticmethod
    def forward(ctx: Context, q: Any, *, out: Any = None) -> Any:
        if isinstance(q, PackedMatrix):
            y = empty_for(out, q.shape, np.float32)
            _core.unpack_floats(q, y)
            return y
        if not isinstance(q, QuantizedArray):
            raise DtypeError(f"dequantize: q must be a QuantizedArray, got {type(q).__name__}")
        with running_on(device_of(q.data), "dequantize"):  # the caller has not looked into q
            y = empty_in_order(q.data, np.float32, q.shape) if out is None else out
            axis, group = -1 if q.axis is None else q.axis, q.group_size or 0
            _core.dequantize(q.data, q.scale, q.offset, axis, y, q.bits, group, q.along)
        return y

    @staticmethod
    def reference(q: Any) -> Reference:
        y = q.integers() * spread(q.scale, q)
        offset = 0.0 if q.offset is None else spread(q.offset, q)
        return Reference(y + offset, abs(y) + abs(offset), 1)

    @staticmethod
    def cost(q: Any, **_: Any) -> Cost:
        size = math.prod(q.shape)
        return Cost(1.0 * size, q.nbytes + 4 * size)

    cases = quantize.cases

    @staticmethod
    def make(case: str, rng: Any, dtype: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x, options = quantize.make(case, rng, np.float32)
        return (quantize.forward(NO_TAPE, *x, **options),), {}


def spread(value: Any, q: QuantizedArray) -> Any:
    """Return scales or offsets as float64, broadcastable against the array they belong to."""
    value = value.astype(np.float64)
    if q.group_size is not None:
        return np.repeat(value, q.group_size, q.along).take(range(q.shape[q.along]), q.along)
    shape = [1] * q.ndim
    if q.axis is not None:
        shape[q.axis] = -1
    return value.reshape(shape)
