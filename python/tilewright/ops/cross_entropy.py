"""cross_entropy: csrc/ops/loss.cc (rule) · csrc/cpu/cross_entropy.cc · csrc/simd/softmax.cc."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tilewright import _core
from tilewright.registry import Context, Cost, Reference, op


@op(grads=("logits",))
class cross_entropy:
    """Negative log-likelihood of a class, or of probabilities, under softmax(logits).

        loss = sum over c of q[c] * (log(sum(exp(logits))) - logits[c])          then reduced

    where a target that is an id counts with q[target] = weight[target], and one of probabilities
    with q = weight * target. ``label_smoothing`` = e first makes (1 - e) * target + e / C of it.

    Args:
        logits: (..., C) float32, bfloat16 or float16, any strides.
        target: (...) int32 or int64 class ids, or (..., C) probabilities of a float dtype, which
            have no gradient.
        weight: (C,), of the classes; optional.
        reduction: "mean", "sum" or "none". The mean divides by the weights of the ids that count;
            for probabilities by the number of rows, as PyTorch does.
        ignore_index: an id that doesn't count; its loss and gradient are 0.
        label_smoothing: the share of each target that is spread over all classes, in [0, 1].
        out: where to write the loss; no overlap with an input.

    Returns:
        The loss, float32 also for logits of 16 bits: () or, for "none", (...). The mean of no
        targets is NaN.

    Raises:
        ShapeError: a target is no class; the message names it. Targets on a GPU are not read for
        that: the loss and the gradient of such a row are NaN. DtypeError. UnsupportedError:
        ignore_index is not negative where target holds probabilities.

    Source: Szegedy et al. 2016, section 7, for label smoothing.
    """

    rows = ("logits", "target")
    cases = (
        "1,1", "3,5", "2,3,17", "70,33", "5,1025", "2,3001", "7", "0,4", "3,5;sum", "2,3,17;none",
        "66,8;none", "9,10;ignore", "9,10;ignore,none", "4,6;ignore=3", "3,40;int32",
        "7,9;weight", "2,3,17;weight,none", "9,10;weight,ignore,sum", "5,7;smooth=0.1",
        "66,33;smooth=0.3,weight", "9,35;smooth=0.2,ignore", "3,5;smooth=1,none", "4,6;soft",
        "66,33;soft,none", "5,9;soft,weight,smooth=0.1", "2,3,70;soft,weight,sum", "0,4;soft",
    )  # fmt: skip

    @staticmethod
    def forward(
        ctx: Context,
        logits: Any,
        target: Any,
        *,
        weight: Any = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        out: Any = None,
    ) -> Any:
        loss = out
        if loss is None:
            shape = getattr(logits, "shape", (0,))[:-1] if reduction == "none" else ()
            loss = _core.empty(shape, np.float32)
        lse = scale = None  # what the backward pass reads
        if ctx.needs:
            rows = math.prod(getattr(logits, "shape", ())[:-1])  # also where there are no classes
            lse = _core.empty((rows,), np.float32)
            if reduction == "mean":
                scale = _core.empty((), np.float32)
        _core.cross_entropy_forward(
            logits, target, weight, label_smoothing, ignore_index, reduction, loss, lse, scale
        )
        ctx.save(logits, target, weight, label_smoothing, ignore_index, lse, scale)
        return loss

    @staticmethod
    def backward(ctx: Context, dloss: Any) -> Any:
        logits, target, weight, label_smoothing, ignore_index, lse, scale = ctx.saved
        dlogits = _core.empty_like(logits)
        _core.cross_entropy_backward(
            logits, target, weight, label_smoothing, ignore_index, lse, dloss, scale, dlogits
        )
        return dlogits

    @staticmethod
    def reference(
        logits: Any,
        target: Any,
        *,
        weight: Any = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> Reference:
        C = logits.shape[-1]
        w = np.ones(C) if weight is None else weight
        if w.shape != (C,):
            raise ValueError("weight is not one number for each class")
        shift = logits - logits.max(-1, keepdims=True, initial=-np.inf)
        log_sum = np.log(np.exp(shift).sum(-1, keepdims=True))
        nll = log_sum - shift
        # The sum has a relative error, hence its logarithm an absolute one; so has x - max.
        size = abs(log_sum) + abs(shift) + 8.0
        keep, spread = 1.0 - label_smoothing, label_smoothing / max(1, C)
        if np.asarray(target).dtype.kind == "f":
            if target.shape != logits.shape:
                raise ValueError("target and logits differ in shape")
            q = w * (keep * target + spread)
            losses, magnitude = (q * nll).sum(-1), (abs(q) * size).sum(-1)
            divisor = np.float64(losses.size)
        else:
            counts = np.asarray(target) != ignore_index
            ids = np.asarray(np.where(counts, target, 0))[..., None]
            own = np.where(counts, keep * w[ids[..., 0]] if C else 0.0, 0.0)
            losses = own * np.take_along_axis(nll, ids, -1)[..., 0]
            magnitude = abs(own) * np.take_along_axis(size, ids, -1)[..., 0]
            if spread:
                losses = losses + (w * spread * nll).sum(-1)
                magnitude = magnitude + (abs(w) * spread * size).sum(-1)
            losses, magnitude = np.where(counts, losses, 0.0), np.where(counts, magnitude, 0.0)
            divisor = np.where(counts, w[ids[..., 0]] if C else 0.0, 0.0).sum()
        if reduction == "none":
            return Reference(losses, magnitude, C)
        scale = 1.0
        if reduction == "mean":
            scale = 1.0 / divisor if divisor else np.nan
        return Reference(losses.sum() * scale, magnitude.sum() * abs(scale), C)

    @staticmethod
    def cost(logits: Any, target: Any, **_: Any) -> Cost:
        return Cost(20 * logits.size, logits.nbytes + target.nbytes)

    @staticmethod
    def make(case: str, rng: np.random.Generator, dtype: Any) -> tuple[Any, dict[str, Any]]:
        """Build a case: a shape, then flags.

        sum, none; ignore (every third), ignore=; int32; soft (probabilities); weight; smooth=.
        """
        sizes, _, flags = case.partition(";")
        shape = tuple(int(n) for n in sizes.split(","))
        logits = (2 * rng.standard_normal(shape)).astype(dtype)
        kind = np.int32 if "int32" in flags else np.int64
        target = np.asarray(rng.integers(0, shape[-1], shape[:-1], kind))
        kwargs: dict[str, Any] = {}
        for flag in flags.split(","):
            if flag in ("sum", "none"):
                kwargs["reduction"] = flag
            elif flag == "ignore":
                target[::3] = -100
            elif flag.startswith("ignore="):
                kwargs["ignore_index"] = int(flag.removeprefix("ignore="))
            elif flag == "weight":
                kwargs["weight"] = rng.uniform(0.5, 2.0, shape[-1]).astype(dtype)
            elif flag.startswith("smooth="):
                kwargs["label_smoothing"] = float(flag.removeprefix("smooth="))
        if "soft" in flags.split(","):
            p = rng.random(shape)
            target = (p / p.sum(-1, keepdims=True)).astype(dtype)
        return (logits, target), kwargs
