"""log_softmax: csrc/ops/softmax.cc (rule) · csrc/{cpu,simd}/softmax.cc (blocks, rows)."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright import _core
from tilewright.ops.softmax import last, softmax
from tilewright.registry import Context, Cost, Reference, op


@op(grads=("x",))
class log_softmax:
    """The logarithm of softmax: y = (x - max(x)) - log(sum(exp(x - max(x)))) along an axis.

    Args:
        x: (...) float32, bfloat16 or float16, any strides, at least one axis.
        axis: along which exp(y) sums to one.
        out: where to write y; no overlap with an input.

    Returns:
        y, like x: exact also where softmax itself would be 0. -inf among finite elements stays
        -inf; a slice that is all -inf, or holds NaN or +inf, is NaN.

    Raises:
        ShapeError, DtypeError: naming the argument.
    """

    rows = ("x",)
    cases = (
        "1", "5", "3,4", "2,3,17", "7,64", "66,33", "2,1500", "0,3", "3,0", "2,3,5;axis=0",
        "4,9,2;axis=1", "5,40;masked", "6,2051;shifted",
    )  # fmt: skip
    make = staticmethod(softmax.make)

    @staticmethod
    def forward(ctx: Context, x: Any, axis: int = -1, *, out: Any = None) -> Any:
        y = _core.empty_like(x) if out is None else out
        _core.softmax_forward(last("log_softmax", x, axis), last("log_softmax", y, axis), True)
        ctx.save(y, axis)
        return y

    @staticmethod
    def backward(ctx: Context, dy: Any) -> Any:
        y, axis = ctx.saved
        dx = _core.empty_like(y)
        y_last, dy_last, dx_last = (last("log_softmax", v, axis) for v in (y, dy, dx))
        _core.softmax_backward(y_last, dy_last, dx_last, True)
        return dx

    @staticmethod
    def reference(x: Any, axis: int = -1) -> Reference:
        if x.size == 0:
            return Reference(x, abs(x), 1)
        shift = x - x.max(axis, keepdims=True)
        log_sum = np.log(np.exp(shift).sum(axis, keepdims=True))
        # The sum has a relative error, hence its logarithm an absolute one; so has x - max.
        return Reference(shift - log_sum, abs(shift) + abs(log_sum) + 8.0, x.shape[axis])

    @staticmethod
    def cost(x: Any, *_: Any, **__: Any) -> Cost:
        return Cost(20 * x.size, 2 * x.nbytes)
