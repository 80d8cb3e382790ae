"""Losses as modules. Each loss is float32, also of bfloat16 inputs; sums run in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tilewright.autograd import Tensor, unwrap
from tilewright.device import as_array
from tilewright.errors import DtypeError, ShapeError
from tilewright.nn.module import Module, tw
from tilewright.registry import Context, rule
from tilewright.tensor import check_dtype, is_float, tensor


class _Loss(Module):
    _reductions: tuple[str, ...] = ("mean", "sum", "none")

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        if reduction not in self._reductions:
            *most, last = (f'"{name}"' for name in self._reductions)
            raise ValueError(
                f"{type(self).__name__}: reduction must be {', '.join(most)} or {last}, "
                f"got {reduction!r}"
            )
        self.reduction = reduction

    def _register(self, name: str, weight: Any) -> None:
        """Keep a weight of elements or classes: a buffer where there is one."""
        if weight is None:
            setattr(self, name, None)
        else:
            copied = tensor(weight).data
            kept = copied if is_float(copied.dtype) else copied.astype(np.float32)
            self.register_buffer(name, kept)


def _reduced(losses: Any, reduction: str, divisor: float) -> Any:
    """The losses, their sum, or their sum divided; float32."""
    if reduction == "none":
        return losses.astype(np.float32, copy=False)
    total = losses.sum(dtype=np.float64)
    if reduction != "sum":
        total = total / (divisor or np.nan)
    return as_array(total).astype(np.float32)


# Element by element ---------------------------------------------------------------------------


class _Formula(NamedTuple):
    """A loss of two elements, and its derivatives by either; each takes float32 arrays."""

    value: Callable[[Any, Any], Any]
    by_x: Callable[[Any, Any], Any]
    by_y: Callable[[Any, Any], Any]


class _Elementwise:
    """reduce(weight * formula(x, y))."""

    @staticmethod
    def forward(
        ctx: Context,
        x: Any,
        y: Any,
        name: str,
        formula: _Formula,
        reduction: str,
        weight: Any = None,
    ) -> Any:
        x, y = _checked(name, "x", x), _checked(name, "y", y)
        if x.shape != y.shape:
            raise ShapeError(f"{name}: y must have shape {x.shape} to match x, got {y.shape}")
        rows = x.shape[0] if x.ndim else 1
        divisor = {"mean": x.size, "batchmean": rows}.get(reduction, 1)
        ctx.save(x, y, formula, weight, divisor)
        with np.errstate(all="ignore"):
            losses = formula.value(_wide(x), _wide(y))
            if weight is not None:
                losses = losses * weight
        return _reduced(losses, reduction, divisor)

    @staticmethod
    def backward(ctx: Context, dloss: Any) -> tuple[Any, ...]:
        x, y, formula, weight, divisor = ctx.saved
        scale = dloss / np.float32(max(1, divisor))
        if weight is not None:
            scale = scale * weight
        found = []
        for name, like, slope in (("x", x, formula.by_x), ("y", y, formula.by_y)):
            with np.errstate(all="ignore"):
                grad = scale * slope(_wide(x), _wide(y)) if name in ctx.needs else None
            found.append(None if grad is None else grad.astype(like.dtype, copy=False))
        return tuple(found)


_elementwise: Any = rule(grads=("x", "y"))(_Elementwise)


def _checked(name: str, arg: str, x: Any) -> Any:
    x = as_array(x)
    check_dtype(name, arg, x)
    if not is_float(x.dtype):
        raise DtypeError(f"{name}: {arg} must be floating, got {x.dtype}")
    return x


def _wide(x: Any) -> Any:
    return x.astype(np.float32, copy=False)


class _ElementwiseLoss(_Loss):
    def _formula(self) -> _Formula:
        raise NotImplementedError

    def forward(self, x: Any, y: Any) -> Any:
        """The loss of x against the target y, which has its shape; both may want gradients."""
        name = type(self).__name__
        for arg, factors in self._buffers.items():
            if not _broadcasts(factors.shape, tuple(x.shape)):
                raise ShapeError(
                    f"{name}: {arg} must broadcast to x {tuple(x.shape)}, got {factors.shape}"
                )
        weight = self._buffers.get("weight")
        return _elementwise(x, y, name, self._formula(), self.reduction, weight)


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    ends = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(n in (1, m) for n, m in ends)


def _of_difference(value: Callable[[Any], Any], slope: Callable[[Any], Any]) -> _Formula:
    return _Formula(
        lambda x, y: value(x - y), lambda x, y: slope(x - y), lambda x, y: -slope(x - y)
    )


class MSELoss(_Loss):
    """(x - y)**2."""

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__(reduction)

    def forward(self, x: Any, y: Any) -> Any:
        """The loss of x against the target y, which has its shape; both may want gradients."""
        return tw.mse(x, y, reduction=self.reduction)


class L1Loss(_ElementwiseLoss):
    """|x - y|; the gradient at 0 is 0."""

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__(reduction)

    def _formula(self) -> _Formula:
        return _of_difference(np.abs, np.sign)


class HuberLoss(_ElementwiseLoss):
    """With d = x - y: d**2 / 2 where |d| <= delta, else delta * (|d| - delta / 2)."""

    def __init__(self, *, reduction: str = "mean", delta: float = 1.0) -> None:
        super().__init__(reduction)
        if not delta > 0.0:
            raise ValueError(f"HuberLoss: delta must be above 0, got {delta}")
        self.delta = delta

    def _formula(self) -> _Formula:
        delta = np.float32(self.delta)

        def value(d: Any) -> Any:
            size = abs(d)
            return np.where(size <= delta, d * d / 2, delta * (size - delta / 2))

        return _of_difference(value, lambda d: np.clip(d, -delta, delta))


class SmoothL1Loss(_ElementwiseLoss):
    """With d = x - y: d**2 / (2 beta) where |d| < beta, else |d| - beta / 2."""

    def __init__(self, *, reduction: str = "mean", beta: float = 1.0) -> None:
        super().__init__(reduction)
        if not beta >= 0.0:
            raise ValueError(f"SmoothL1Loss: beta must be at least 0, got {beta}")
        self.beta = beta

    def _formula(self) -> _Formula:
        if self.beta == 0.0:
            return _of_difference(np.abs, np.sign)
        beta = np.float32(self.beta)

        def value(d: Any) -> Any:
            size = abs(d)
            return np.where(size < beta, d * d / (2 * beta), size - beta / 2)

        return _of_difference(value, lambda d: np.clip(d / beta, -1, 1))


class BCELoss(_ElementwiseLoss):
    """-(y log(x) + (1 - y) log(1 - x)) of probabilities x; logarithms are at least -100.

    From logits, BCEWithLogitsLoss is exact where this one has lost its digits.

    Args:
        weight: factors, broadcast to x.
        reduction: "mean", "sum" or "none".
    """

    weight: Any

    def __init__(self, weight: Any = None, *, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self._register("weight", weight)

    def forward(self, x: Any, y: Any) -> Any:
        """The loss of probabilities x against the target y, which has its shape.

        Raises:
            ValueError: an x is outside of [0, 1].
        """
        p = as_array(unwrap(x))
        if (p < 0).any() or (p > 1).any():
            raise ValueError("BCELoss: x must be probabilities in [0, 1]")
        return super().forward(x, y)

    def _formula(self) -> _Formula:
        def logarithms(x: Any) -> tuple[Any, Any]:
            return np.maximum(np.log(x), -100), np.maximum(np.log1p(-x), -100)

        def value(x: Any, y: Any) -> Any:
            log_p, log_q = logarithms(x)
            return -(y * log_p + (1 - y) * log_q)

        def by_y(x: Any, y: Any) -> Any:
            log_p, log_q = logarithms(x)
            return log_q - log_p

        smallest = np.float32(1e-12)
        return _Formula(value, lambda x, y: (x - y) / np.maximum((1 - x) * x, smallest), by_y)


class BCEWithLogitsLoss(_ElementwiseLoss):
    """BCELoss of sigmoid(x), computed from x.

        loss = (1 - y) * x + (1 + (pos_weight - 1) * y) * log(1 + exp(-x))

    Args:
        weight: factors, broadcast to x.
        reduction: "mean", "sum" or "none".
        pos_weight: of the positive part y * log(sigmoid(x)), broadcast to x.
    """

    weight: Any
    pos_weight: Any

    def __init__(
        self, weight: Any = None, *, reduction: str = "mean", pos_weight: Any = None
    ) -> None:
        super().__init__(reduction)
        self._register("weight", weight)
        self._register("pos_weight", pos_weight)

    def _formula(self) -> _Formula:
        positive = np.float32(1) if self.pos_weight is None else self.pos_weight

        def softplus_of_minus(x: Any) -> Any:
            return np.log1p(np.exp(-abs(x))) + np.maximum(-x, 0)

        def value(x: Any, y: Any) -> Any:
            return (1 - y) * x + (1 + (positive - 1) * y) * softplus_of_minus(x)

        def by_x(x: Any, y: Any) -> Any:
            e = np.exp(-abs(x))
            logistic = np.where(x < 0, e, np.float32(1)) / (1 + e)
            return (1 + (positive - 1) * y) * logistic - positive * y

        return _Formula(value, by_x, lambda x, y: (positive - 1) * softplus_of_minus(x) - x)


class KLDivLoss(_ElementwiseLoss):
    """y * (log(y) - x) of log-probabilities x and a target y of probabilities.

    Args:
        reduction: "mean" over all elements, "batchmean" (the sum divided by the first extent, which
            is the divergence's definition), "sum" or "none".
        log_target: y holds log-probabilities, too.
    """

    _reductions = ("mean", "batchmean", "sum", "none")

    def __init__(self, *, reduction: str = "mean", log_target: bool = False) -> None:
        super().__init__(reduction)
        self.log_target = log_target

    def _formula(self) -> _Formula:
        if self.log_target:
            return _Formula(
                lambda x, y: np.exp(y) * (y - x),
                lambda x, y: -np.exp(y),
                lambda x, y: np.exp(y) * (y - x + 1),
            )

        def times_log(x: Any, y: Any) -> Any:
            return np.where(y == 0, np.float32(0), y * np.log(y)) - y * x

        def by_y(x: Any, y: Any) -> Any:
            return np.where(y == 0, np.float32(0), np.log(y) + 1) - x

        return _Formula(times_log, lambda x, y: -y, by_y)


# Of classes -----------------------------------------------------------------------------------


def _classes_last(x: Any) -> Any:
    """(N, C, ...) -> (N, ..., C), a view."""
    if x.ndim < 3:
        return x
    axes = (0, *range(2, x.ndim), 1)
    return x.permute(axes) if isinstance(x, Tensor) else np.transpose(x, axes)


class CrossEntropyLoss(_Loss):
    """Minus the log probability of each target under the softmax of its logits.

    The classes are on axis 1, as in PyTorch: logits (C,), (N, C) or (N, C, ...). (In
    ``tw.cross_entropy`` they are on the last.)

    Args:
        weight: (C,), of each class; "mean" divides by the weights of the targets.
        ignore_index: a target that does not count.
        reduction: "mean", "sum" or "none".
        label_smoothing: the share of each target that is spread over all classes.
    """

    weight: Any

    def __init__(
        self,
        weight: Any = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(reduction)
        self._register("weight", weight)
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing

    def forward(self, logits: Any, target: Any) -> Any:
        """The loss against ids (), (N,) or (N, ...), or probabilities shaped like the logits."""
        if target.ndim == logits.ndim:
            target = _classes_last(target)
        return tw.cross_entropy(
            _classes_last(logits),
            target,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}"


class _Nll:
    """-weight[target] * x[..., target], reduced; the classes are on the last axis of x."""

    @staticmethod
    def forward(
        ctx: Context, x: Any, target: Any, weight: Any, reduction: str, ignore_index: int
    ) -> Any:
        x, target = _checked("NLLLoss", "x", x), as_array(target)
        if target.shape != x.shape[:-1]:
            raise ShapeError(
                f"NLLLoss: target must have shape {x.shape[:-1]}, one id for each row of x, "
                f"got {target.shape}"
            )
        if target.dtype not in (np.int32, np.int64):
            raise DtypeError(f"NLLLoss: target must be int32 or int64, got {target.dtype}")
        C = x.shape[-1]
        if weight is not None and weight.shape != (C,):
            raise ShapeError(f"NLLLoss: weight must have shape {(C,)}, got {weight.shape}")
        counts = target != ignore_index
        wrong = target[counts & ((target < 0) | (target >= C))]
        if wrong.size:
            raise ShapeError(f"NLLLoss: a target must be in [0, {C}), got {wrong[0]}")
        ids = np.where(counts, target, 0)[..., None]
        factors = np.where(counts, 1.0 if weight is None else weight[ids[..., 0]], 0.0)
        factors = factors.astype(np.float32)
        divisor = float(factors.sum(dtype=np.float64)) if reduction == "mean" else 1.0
        ctx.save(x, ids, factors, divisor)
        picked = np.take_along_axis(x, ids, -1)[..., 0] if C else np.zeros_like(factors)
        return _reduced(np.where(counts, -picked * factors, 0.0), reduction, divisor)

    @staticmethod
    def backward(ctx: Context, dloss: Any) -> Any:
        x, ids, factors, divisor = ctx.saved
        dx = np.zeros_like(x, np.float32)
        if dx.size:
            scale = dloss / np.float32(divisor or 1.0)  # no target counts: factors are 0
            np.put_along_axis(dx, ids, (-factors * scale)[..., None], -1)
        return dx.astype(x.dtype, copy=False)


_nll: Any = rule(grads=("x",))(_Nll)


class NLLLoss(_Loss):
    """Minus the log-probability of each target; CrossEntropyLoss of a LogSoftmax.

    The classes are on axis 1: log-probabilities (C,), (N, C) or (N, C, ...).

    Args:
        weight: (C,), of each class; "mean" divides by the weights of the targets.
        ignore_index: a target that does not count.
        reduction: "mean", "sum" or "none".
    """

    weight: Any

    def __init__(
        self, weight: Any = None, *, ignore_index: int = -100, reduction: str = "mean"
    ) -> None:
        super().__init__(reduction)
        self._register("weight", weight)
        self.ignore_index = ignore_index

    def forward(self, x: Any, target: Any) -> Any:
        """The loss against ids (), (N,) or (N, ...), int32 or int64.

        Raises:
            ShapeError: a target is no class; the message names it. DtypeError.
        """
        return _nll(_classes_last(x), target, self.weight, self.reduction, self.ignore_index)
