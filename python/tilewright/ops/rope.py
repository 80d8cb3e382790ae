"""rope: csrc/ops/rope.cc (rule) · csrc/{cpu,simd}/rope.cc (blocks, rows)."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright import _core
from tilewright.registry import Context, Cost, Reference, op


@op(grads=("x",))
class rope:
    """Rotary position embedding: turn pairs of elements by angles that depend on the position.

        (a, b) -> (a cos - b sin, b cos + a sin)

    The first R elements of each row are R/2 pairs: (i, i + R/2), or (2i, 2i + 1) interleaved. The
    others, if R < D, are passed on.

    Args:
        x: (..., T, D) float32, bfloat16 or float16, any strides.
        cos: (T, R/2), or (B, T, R/2) where x is (B, ..., T, D): a table for each sequence. Of any
            of these dtypes; constant, it has no gradient.
        sin: like cos.
        interleaved: pairs are neighbours, as in GPT-J and GGUF; else halves, as in Hugging Face's
            Llama.
        out: where to write y; no overlap with an input.

    Returns:
        y, like x. Its gradient is turned back by the same angles.

    Raises:
        ShapeError, DtypeError: naming the argument.

    Source: Su et al. 2021.
    """

    rows = ("x", "cos", "sin")
    cases = (
        "1,2", "3,8", "2,5,6", "2,3,5,64", "2,2,7,64;interleaved", "3,34;interleaved",
        "3,5;R=2", "2,9,70;R=34", "2,9,70;R=34,interleaved", "4,3,40;R=0", "2,2,3,16;tables",
        "2,3,66;tables,interleaved", "0,4", "2,0,4", "2,65,130;strided",
    )  # fmt: skip

    @staticmethod
    def forward(
        ctx: Context, x: Any, cos: Any, sin: Any, *, interleaved: bool = False, out: Any = None
    ) -> Any:
        y = _core.empty_like(x) if out is None else out
        _core.rope(x, cos, sin, interleaved, False, y)
        ctx.save(cos, sin, interleaved)
        return y

    @staticmethod
    def backward(ctx: Context, dy: Any) -> Any:
        cos, sin, interleaved = ctx.saved
        dx = _core.empty_like(dy)
        _core.rope(dy, cos, sin, interleaved, True, dx)
        return dx

    @staticmethod
    def reference(x: Any, cos: Any, sin: Any, *, interleaved: bool = False) -> Reference:
        half, T = cos.shape[-1], x.shape[-2]
        batched = cos.ndim == 3 and x.ndim >= 3
        lead = x.shape[:1] if batched else ()
        if cos.shape != (*lead, T, half) or sin.shape != cos.shape or 2 * half > x.shape[-1]:
            raise ValueError("the tables don't fit x")
        if batched:
            table = (x.shape[0], *(1,) * (x.ndim - 3), T, half)
            cos, sin = cos.reshape(table), sin.reshape(table)
        turned, rest = x[..., : 2 * half], x[..., 2 * half :]
        if interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
        else:
            a, b = turned[..., :half], turned[..., half:]

        def joined(first: Any, second: Any) -> Any:
            if interleaved:
                pairs = np.stack([first, second], -1).reshape(turned.shape)
            else:
                pairs = np.concatenate([first, second], -1)
            return np.concatenate([pairs, rest], -1)

        y = joined(a * cos - b * sin, b * cos + a * sin)
        size = joined(abs(a * cos) + abs(b * sin), abs(b * cos) + abs(a * sin))
        return Reference(y, abs(size), 2)

    @staticmethod
    def cost(x: Any, cos: Any, *_: Any, **__: Any) -> Cost:
        return Cost(3 * x.size, 2 * x.nbytes + 2 * cos.nbytes)

    @staticmethod
    def make(case: str, rng: np.random.Generator, dtype: Any) -> tuple[Any, dict[str, Any]]:
        """Build a case: the shape of x, then flags: R=, interleaved, tables (B), strided."""
        sizes, _, flags = case.partition(";")
        shape = tuple(int(n) for n in sizes.split(","))
        options = flags.split(",")
        R = next((int(f[2:]) for f in options if f.startswith("R=")), shape[-1] // 2 * 2)
        lead = shape[:1] if "tables" in options else ()
        angles = 3 * rng.standard_normal((*lead, shape[-2], R // 2))
        if "strided" in options:
            x = rng.standard_normal((*shape[:-1], 2 * shape[-1])).astype(dtype)[..., ::-2]
        else:
            x = rng.standard_normal(shape).astype(dtype)
        args = (x, np.cos(angles).astype(dtype), np.sin(angles).astype(dtype))
        return args, {"interleaved": True} if "interleaved" in options else {}
