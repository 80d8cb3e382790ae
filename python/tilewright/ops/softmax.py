"""softmax: csrc/ops/softmax.cc (rule) · csrc/{cpu,simd}/softmax.cc (blocks, rows)."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright import _core
from tilewright.errors import ShapeError
from tilewright.registry import Context, Cost, Reference, op


@op(grads=("x",))
class softmax:
    """Exponentials that sum to one: y = exp(x - max(x)) / sum(exp(x - max(x))) along an axis.

    Args:
        x: (...) float32, bfloat16 or float16, any strides, at least one axis.
        axis: which axis sums to one.
        out: where to write y; no overlap with x.

    Returns:
        y, like x. -inf among finite elements gives 0. A slice that is all -inf, or holds NaN or
        +inf, has no softmax: it is NaN, as the definition gives in NumPy (attention's fully
        masked rows, by contrast, are 0).

    Raises:
        ShapeError, DtypeError: naming the argument.
    """

    rows = ("x",)
    cases = (
        "1", "5", "3,4", "2,3,17", "7,64", "66,33", "2,1000", "0,3", "3,0", "2,3,5;axis=0",
        "4,9,2;axis=1", "16,5;axis=0", "5,40;masked", "6,2051;shifted",
    )  # fmt: skip

    @staticmethod
    def forward(ctx: Context, x: Any, axis: int = -1, *, out: Any = None) -> Any:
        y = _core.empty_like(x) if out is None else out
        if axis == -1:
            _core.softmax_forward(x, y, False)
        else:
            _core.softmax_forward(last("softmax", x, axis), last("softmax", y, axis), False)
        ctx.save(y, axis)
        return y

    @staticmethod
    def backward(ctx: Context, dy: Any) -> Any:
        y, axis = ctx.saved
        dx = _core.empty_like(y)
        y_last, dy_last, dx_last = (last("softmax", v, axis) for v in (y, dy, dx))
        _core.softmax_backward(y_last, dy_last, dx_last, False)
        return dx

    @staticmethod
    def reference(x: Any, axis: int = -1) -> Reference:
        if x.size == 0:
            return Reference(x, abs(x), 1)
        shift = x - x.max(axis, keepdims=True)
        e = np.exp(shift)
        y = e / e.sum(axis, keepdims=True)
        # A rounding of x - max is one of |x - max| in the exponent; the exponential adds 8 more.
        size = np.where(np.isfinite(shift), abs(shift), 0.0)
        return Reference(y, y * (8 + size), x.shape[axis])

    @staticmethod
    def cost(x: Any, *_: Any, **__: Any) -> Cost:
        return Cost(20 * x.size, 2 * x.nbytes)

    @staticmethod
    def make(case: str, rng: np.random.Generator, dtype: Any) -> tuple[Any, dict[str, Any]]:
        """Build a case: a shape, then a flag: axis=, masked (some far down), shifted."""
        sizes, _, flag = case.partition(";")
        x = rng.standard_normal(tuple(int(n) for n in sizes.split(","))).astype(dtype)
        if flag == "masked":
            x[1:, ::3] = -50
        if flag == "shifted":
            x = x + x.dtype.type(64)
        axis = int(flag.removeprefix("axis=")) if flag.startswith("axis=") else -1
        return (x, axis), {}


def last(op: str, x: Any, axis: int) -> Any:
    """Return a view of x in which ``axis`` is the last one, the others in their order."""
    rank = getattr(x, "ndim", None)
    if axis == -1 or rank is None:
        return x
    if not -rank <= axis < rank:
        raise ShapeError(
            f"{op}: axis must be in [{-rank}, {rank}) for x of {rank} axes, got {axis}"
        )
    return np.moveaxis(x, axis, -1)
