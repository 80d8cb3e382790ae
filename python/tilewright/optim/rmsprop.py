"""RMSprop: csrc/ops/optim.cc (rule) · csrc/simd/optim.cc, csrc/cuda/optim.cu."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tilewright import _core
from tilewright.optim.optimizer import Optimizer, sign


class RMSprop(Optimizer):
    """RMSprop; all parameters of a group in one fused kernel call, in place.

        g = grad + weight_decay * p                             maximize: g = -grad + ...
        s = alpha * s + (1 - alpha) * g**2                      centered: w = s - a**2, where
        d = g / (sqrt(w) + eps)         w = s                     a = alpha * a + (1 - alpha) * g
        p -= lr * d                                             momentum: u = momentum * u + d,
                                                                          p -= lr * u

    PyTorch's, but for one thing: where rounding makes the centered w negative (a gradient that
    stays the same long enough), it counts as 0; PyTorch's parameter becomes NaN.

    Args:
        params: Tensors, or dicts of groups (see Optimizer).
        lr: learning rate.
        alpha: of the running means.
        eps: added to the denominator.
        weight_decay: L2 penalty, added to the gradient.
        momentum: 0 keeps no velocity.
        centered: divide by the deviation of the gradient, not by its root mean square.
        maximize: climb.

    Source: Tieleman & Hinton 2012, lecture 6.5; Graves 2013 (centered).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        options = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        options |= {"momentum": momentum, "centered": centered, "maximize": maximize}
        super().__init__(params, options)

    def _check(self, options: dict[str, Any]) -> None:
        super()._check(options)
        if not 0.0 <= options["alpha"] < 1.0:
            self._refuse("alpha", "must be in [0, 1)", options["alpha"])

    def _slots(self, options: dict[str, Any]) -> tuple[str, ...]:
        mean = ("mean",) if options["centered"] else ()
        return ("square", *mean, "velocity") if options["momentum"] else ("square", *mean)

    def _lists(self) -> tuple[str, ...]:
        return "square", "mean", "velocity"

    def _numbers(self, options: dict[str, Any], step: int, fresh: bool) -> list[float]:
        names = "lr", "alpha", "eps", "weight_decay", "momentum"
        return [*(options[name] for name in names), sign(options)]

    def _update(self, *arguments: Any) -> None:
        _core.rmsprop_step(*arguments)
