"""dropout: csrc/ops/dropout.cc (rule) · csrc/{cpu,simd}/dropout.cc · csrc/simd/philox.h (words)."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright import _core, random
from tilewright.registry import Context, Cost, Reference, op


@op(grads=("x",))
class dropout:
    """Zero each element with probability p, and scale the others by 1 / (1 - p).

        y[n] = x[n] / (1 - p) if word(seed, n) >= round(p * 2**32) else 0

    where n counts the elements in row-major order and word(seed, n) is a word of Philox4x32-10
    (``tw.random.words``): a decision depends on seed and n alone, not on shape, strides, threads
    or ISA level, and the backward pass makes it again instead of keeping a mask.

    Args:
        x: (...) float32, bfloat16 or float16, any strides.
        p: the probability of dropping, in [0, 1]. 0 returns x exactly, 1 zeros.
        seed: an int in [0, 2**64); another one for each call, or the same elements are dropped.
        out: where to write y; no overlap with x.

    Returns:
        y, like x. What is dropped is 0 even where x is NaN or infinite.

    Raises:
        ShapeError: p or seed is out of range. DtypeError: naming the argument.

    Source: Srivastava et al. 2014; Salmon et al. 2011 for the generator.
    """

    rows = ()  # the first row of another batch is another part of the stream
    cases = (
        "1;p=0.5", "5;p=0.5", "2,3,17;p=0.1", "70,33;p=0.9", "3;p=0", "4,5;p=1", "0;p=0.5",
        "3,0;p=0.5", "2,33;p=0.5,transposed", "64,65;p=0.25,sliced", "3,5001;p=0.5", "2;p=1e-12",
        "40;p=0.9999999999",
    )  # fmt: skip

    @staticmethod
    def forward(ctx: Context, x: Any, p: float, *, seed: int, out: Any = None) -> Any:
        seed = random.checked("dropout", seed)
        y = _core.empty_like(x) if out is None else out
        _core.dropout(x, p, seed, y)
        ctx.save(p, seed)
        return y

    @staticmethod
    def backward(ctx: Context, dy: Any) -> Any:
        p, seed = ctx.saved
        dx = _core.empty_like(dy)
        _core.dropout(dy, p, seed, dx)
        return dx

    @staticmethod
    def reference(x: Any, p: float, *, seed: int) -> Reference:
        threshold = round(p * 2**32)
        kept = (random.words(seed, np.arange(x.size)) >= threshold).reshape(x.shape)
        y = np.where(kept, x / (1 - p) if threshold < 2**32 else x, 0.0)
        return Reference(y, abs(y), 1)

    @staticmethod
    def cost(x: Any, *_: Any, **__: Any) -> Cost:
        return Cost(12 * x.size, 2 * x.nbytes)

    @staticmethod
    def make(case: str, rng: np.random.Generator, dtype: Any) -> tuple[Any, dict[str, Any]]:
        """Build a case: a shape, then p= and "transposed" or "sliced" for other strides."""
        sizes, _, flags = case.partition(";")
        shape = tuple(int(n) for n in sizes.split(","))
        p, _, layout = flags.removeprefix("p=").partition(",")
        if layout == "transposed":
            x = rng.standard_normal(shape[::-1]).astype(dtype).T
        elif layout == "sliced":
            x = rng.standard_normal((*shape[:-1], 2 * shape[-1])).astype(dtype)[..., ::-2]
        else:
            x = rng.standard_normal(shape).astype(dtype)
        return (x, float(p)), {"seed": int(rng.integers(2**63))}
