"""layernorm: csrc/ops/layernorm.cc (rule) · csrc/{cpu,simd}/layernorm.cc (blocks, rows)."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from tilewright import _core
from tilewright.registry import Context, Cost, Reference, converted, op, outs_for, rows_of


@op(grads=("x", "gamma", "beta", "residual"))
class layernorm:
    """Normalise the last axis, then scale and shift; with ``residual``, add that first.

        s = x + residual                  rounded to x's dtype
        y = (s - mean) * rstd * gamma + beta          rstd = 1 / sqrt(var + eps)

    Args:
        x: (..., C) float32, bfloat16 or float16, any strides.
        gamma: (C,), optional; float32, bfloat16 or float16.
        beta: (C,), optional.
        eps: added to the variance; not negative.
        residual: shaped like x, optional.
        out: where to write y, or (y, s) with residual, of which one may be residual itself; no
            other overlap.

    Returns:
        y (..., C) in x's dtype; with residual the pair (y, s). Mean and variance are float32, in
        two passes.

    Raises:
        ShapeError, DtypeError: naming the argument.

    Source: Ba, Kiros & Hinton 2016.
    """

    rows = ("x", "residual")
    cases = (
        "1,1", "7,33", "3,5,768", "2,4099", "16", "65,17", "0,8", "3,0", "2,64;plain",
        "4,31;residual", "66,48;residual", "2,3,5;residual,plain", "9,24;strided",
        "9,24;strided,residual", "70,130;eps=0.5",
    )  # fmt: skip

    @staticmethod
    def forward(
        ctx: Context,
        x: Any,
        gamma: Any = None,
        beta: Any = None,
        *,
        eps: float = 1e-5,
        residual: Any = None,
        out: Any = None,
    ) -> Any:
        if residual is None:
            y, s = _core.empty_like(x) if out is None else out, None
        else:
            y, s = outs_for("layernorm", out, "y", "s")
            y, s = (_core.empty_like(x) if o is None else o for o in (y, s))
        mean = rstd = None
        if ctx.needs:
            mean, rstd = _core.empty((2, rows_of(x)), np.float32)
        _core.layernorm_forward(x, gamma, beta, residual, eps, y, s, mean, rstd)
        kept = getattr(residual, "dtype", None)
        ctx.save(x if s is None else s, gamma, beta, mean, rstd, kept)
        return y if s is None else (y, s)

    @staticmethod
    def backward(ctx: Context, dy: Any, ds: Any = None) -> tuple[Any, ...]:
        s, gamma, beta, mean, rstd, kept = ctx.saved
        dx = dgamma = dbeta = None
        if dy is None:  # only s was used
            dx = ds
        else:
            dx = _core.empty_like(s)
            dgamma = _core.empty_like(gamma) if "gamma" in ctx.needs else None
            dbeta = _core.empty_like(beta) if "beta" in ctx.needs else None
            _core.layernorm_backward(s, gamma, mean, rstd, dy, ds, dx, dgamma, dbeta)
        return (
            dx if "x" in ctx.needs else None,
            dgamma,
            dbeta,
            converted(dx, kept) if "residual" in ctx.needs else None,
        )

    @staticmethod
    def reference(
        x: Any, gamma: Any = None, beta: Any = None, *, eps: float = 1e-5, residual: Any = None
    ) -> Any:
        s = x if residual is None else stored(x + residual, x, residual)
        size = abs(x) if residual is None else abs(x) + abs(residual)
        C = max(1, s.shape[-1])
        centred = s - s.sum(-1, keepdims=True) / C
        rstd = 1 / np.sqrt((centred**2).sum(-1, keepdims=True) / C + eps)
        y = centred * rstd
        # Roundings of s and of the mean are divided by the deviation; those of rstd scale with y.
        magnitude = (size + abs(s).sum(-1, keepdims=True) / C) * rstd
        magnitude = magnitude + abs(y) * (1 + magnitude.sum(-1, keepdims=True) / C)
        if gamma is not None:
            y, magnitude = y * gamma, magnitude * abs(gamma)
        if beta is not None:
            y, magnitude = y + beta, magnitude + abs(beta)
        normalised = Reference(y, magnitude, C)
        return normalised if residual is None else (normalised, Reference(s, size, 1))

    @staticmethod
    def tangent_size(
        d: Any,
        x: Any,
        gamma: Any = None,
        beta: Any = None,
        *,
        eps: float = 1e-5,
        residual: Any = None,
    ) -> Any:
        s = x if residual is None else stored(x + residual, x, residual)
        size = abs(x) if residual is None else abs(x) + abs(residual)
        size = size + size.mean(-1, keepdims=True)
        moved = abs(d) + abs(d).mean(-1, keepdims=True)
        return tangent_size(d, moved, s - s.mean(-1, keepdims=True), size, gamma, eps)

    @staticmethod
    def cost(x: Any, *_: Any, residual: Any = None, **__: Any) -> Cost:
        return Cost(8 * x.size, (2 if residual is None else 4) * x.nbytes)

    @staticmethod
    def make(case: str, rng: np.random.Generator, dtype: Any) -> tuple[Any, dict[str, Any]]:
        """Build a case: a shape, then flags: plain (no gamma, beta), residual, strided, eps=."""
        sizes, _, flags = case.partition(";")
        shape = tuple(int(n) for n in sizes.split(","))

        def array(*of: int) -> Any:
            return rng.standard_normal(of).astype(dtype)

        args = [array(*shape)]
        kwargs: dict[str, Any] = {}
        if "strided" in flags:
            args = [array(shape[-1], 2 * shape[0])[:, ::-2].T]
        if "residual" in flags:
            kwargs["residual"] = array(*shape)
        if "plain" not in flags:
            args += [array(shape[-1]), array(shape[-1])]
        if "eps=" in flags:
            kwargs["eps"] = float(flags.partition("eps=")[2])
        return tuple(args), kwargs


def stored(s: Any, *inputs: Any) -> Any:
    """Round the float64 sum as the op does: to 16 bits where that is what the inputs are."""
    for dtype in (ml_dtypes.bfloat16, np.float16):
        if all(np.array_equal(v, v.astype(dtype), equal_nan=True) for v in inputs):
            return s.astype(dtype).astype(np.float64)
    return s


def tangent_size(d: Any, moved: Any, s: Any, size: Any, gamma: Any, eps: float) -> Any:
    """What the rounding errors of dy/ds d scale with, for y = gamma h, h = s r, r = 1 / sqrt(s^2).

    dy/ds d = gamma r (d - h mean(h d)) may be far smaller than its terms: of two elements, h is
    nearly constant. They count by their size, h with what its own roundings, relative to size,
    bring in; r by those of the mean square.
    """
    rstd = 1 / np.sqrt((s**2).mean(-1, keepdims=True) + eps)
    h, rough = abs(s) * rstd, size * rstd
    terms = moved + h * (h * abs(d)).mean(-1, keepdims=True)
    errors = rough * (h * abs(d)).mean(-1, keepdims=True) + h * (rough * abs(d)).mean(
        -1, keepdims=True
    )
    found = rstd * (terms * (1 + (h * rough).mean(-1, keepdims=True)) + errors)
    return found if gamma is None else found * abs(gamma)
