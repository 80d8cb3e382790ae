"""rmsnorm: csrc/ops/layernorm.cc (rule) · csrc/{cpu,simd}/layernorm.cc (blocks, rows)."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright import _core
from tilewright.ops.layernorm import layernorm, stored, tangent_size
from tilewright.registry import Context, Cost, Reference, converted, op, outs_for, rows_of


@op(grads=("x", "gamma", "residual"))
class rmsnorm:
    """Divide the last axis by its root mean square, then scale; with ``residual``, add that first.

        s = x + residual                  rounded to x's dtype
        y = s * rstd * gamma          rstd = 1 / sqrt(sum(s^2) / C + eps)

    Args:
        x: (..., C) float32, bfloat16 or float16, any strides.
        gamma: (C,), optional; float32, bfloat16 or float16.
        eps: added to the mean square; not negative.
        residual: shaped like x, optional.
        out: where to write y, or (y, s) with residual, of which one may be residual itself; no
            other overlap.

    Returns:
        y (..., C) in x's dtype; with residual the pair (y, s). The mean square is float32, and y is
        rounded once.

    Raises:
        ShapeError, DtypeError: naming the argument.

    Source: Zhang & Sennrich 2019.
    """

    rows = ("x", "residual")
    # One element alone: y = sign(x) but for eps, whose gradient float32 can't tell from 0.
    cases = (
        "1,1;eps=0.5", "7,33", "3,5,768", "2,4099", "16", "65,17", "0,8", "3,0", "2,64;plain",
        "4,31;residual", "66,48;residual", "2,3,5;residual,plain", "9,24;strided",
        "9,24;strided,residual", "70,130;eps=0.5",
    )  # fmt: skip

    @staticmethod
    def forward(
        ctx: Context,
        x: Any,
        gamma: Any = None,
        *,
        eps: float = 1e-6,
        residual: Any = None,
        out: Any = None,
    ) -> Any:
        if residual is None:
            y, s = _core.empty_like(x) if out is None else out, None
        else:
            y, s = outs_for("rmsnorm", out, "y", "s")
            y, s = (_core.empty_like(x) if o is None else o for o in (y, s))
        rstd = None
        if ctx.needs:
            rstd = _core.empty((rows_of(x),), np.float32)
        _core.rmsnorm_forward(x, gamma, residual, eps, y, s, rstd)
        ctx.save(x if s is None else s, gamma, rstd, getattr(residual, "dtype", None))
        return y if s is None else (y, s)

    @staticmethod
    def backward(ctx: Context, dy: Any, ds: Any = None) -> tuple[Any, ...]:
        s, gamma, rstd, kept = ctx.saved
        dx = dgamma = None
        if dy is None:  # only s was used
            dx = ds
        else:
            dx = _core.empty_like(s)
            dgamma = _core.empty_like(gamma) if "gamma" in ctx.needs else None
            _core.rmsnorm_backward(s, gamma, rstd, dy, ds, dx, dgamma)
        return (
            dx if "x" in ctx.needs else None,
            dgamma,
            converted(dx, kept) if "residual" in ctx.needs else None,
        )

    @staticmethod
    def reference(x: Any, gamma: Any = None, *, eps: float = 1e-6, residual: Any = None) -> Any:
        s = x if residual is None else stored(x + residual, x, residual)
        size = abs(x) if residual is None else abs(x) + abs(residual)
        C = max(1, s.shape[-1])
        rstd = 1 / np.sqrt((s**2).sum(-1, keepdims=True) / C + eps)
        y = s * rstd
        # The rounding of s, and those of the mean square, half of which reach rstd.
        magnitude = size * rstd + abs(y)
        if gamma is not None:
            y, magnitude = y * gamma, magnitude * abs(gamma)
        normalised = Reference(y, magnitude, C)
        return normalised if residual is None else (normalised, Reference(s, size, 1))

    @staticmethod
    def tangent_size(
        d: Any, x: Any, gamma: Any = None, *, eps: float = 1e-6, residual: Any = None
    ) -> Any:
        s = x if residual is None else stored(x + residual, x, residual)
        size = abs(x) if residual is None else abs(x) + abs(residual)
        return tangent_size(d, abs(d), s, size, gamma, eps)

    @staticmethod
    def cost(x: Any, *_: Any, residual: Any = None, **__: Any) -> Cost:
        return Cost(5 * x.size, (2 if residual is None else 4) * x.nbytes)

    @staticmethod
    def make(case: str, rng: np.random.Generator, dtype: Any) -> tuple[Any, dict[str, Any]]:
        """Build a case: a shape, then flags: plain (no gamma), residual, strided, eps=."""
        args, kwargs = layernorm.make(case, rng, dtype)
        return args[:2], kwargs
