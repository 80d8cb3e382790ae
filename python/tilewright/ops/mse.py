"""mse: csrc/ops/mse.cc (rule) · csrc/{cpu,simd}/mse.cc (blocks of elements)."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright import _core
from tilewright.registry import Context, Cost, Reference, op


@op(grads=("x", "y"))
class mse:
    """Squared error: loss = (x - y)^2, then reduced.

    Args:
        x: (...) float32, bfloat16 or float16, any strides.
        y: shaped like x; of any of these dtypes.
        reduction: "mean" over all elements, "sum", or "none".
        out: where to write the loss; no overlap with an input.

    Returns:
        The loss, float32 also for inputs of 16 bits: () or, for "none", (...). The mean of no
        elements is NaN. Sums are double.

    Raises:
        ShapeError, DtypeError: naming the argument. UnsupportedError: no such reduction.
    """

    rows = ("x", "y")
    cases = (
        "1", "7", "3,5", "2,3,17;sum", "66,33;none", "300,41", "0;sum", "0;mean", "3,0;none",
        "33,20;strided", "33,20;strided,none", "20000;sum",
    )  # fmt: skip

    @staticmethod
    def forward(ctx: Context, x: Any, y: Any, *, reduction: str = "mean", out: Any = None) -> Any:
        loss = out
        if loss is None:
            shape = getattr(x, "shape", ()) if reduction == "none" else ()
            loss = _core.empty(shape, np.float32)
        _core.mse_forward(x, y, reduction, loss)
        ctx.save(x, y, 2.0 / max(1, x.size) if reduction == "mean" else 2.0)
        return loss

    @staticmethod
    def backward(ctx: Context, dloss: Any) -> tuple[Any, Any]:
        x, y, scale = ctx.saved
        dx = dy = None
        if "x" in ctx.needs:
            dx = _core.empty_like(x)
            _core.mse_backward(x, y, dloss, scale, dx)
        if "y" in ctx.needs:
            dy = _core.empty_like(y)
            _core.mse_backward(x, y, dloss, -scale, dy)
        return dx, dy

    @staticmethod
    def reference(x: Any, y: Any, *, reduction: str = "mean") -> Reference:
        if x.shape != y.shape:
            raise ValueError("x and y differ in shape")
        loss = (x - y) ** 2
        if reduction == "none":
            return Reference(loss, 2 * loss, 2)
        total = loss.sum() if reduction == "sum" else loss.sum() / np.float64(loss.size)
        return Reference(total, 2 * total, 2)  # x - y and its square are rounded

    @staticmethod
    def cost(x: Any, *_: Any, **__: Any) -> Cost:
        return Cost(3 * x.size, 2 * x.nbytes)

    @staticmethod
    def make(case: str, rng: np.random.Generator, dtype: Any) -> tuple[Any, dict[str, Any]]:
        """Build a case: a shape, then flags: a reduction, strided."""
        sizes, _, flags = case.partition(";")
        shape = tuple(int(n) for n in sizes.split(","))
        x, y = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
        if "strided" in flags:
            x = np.asfortranarray(x)[::-1]
        named = [f for f in flags.split(",") if f in ("mean", "sum", "none")]
        return (x, y), {"reduction": named[0]} if named else {}
