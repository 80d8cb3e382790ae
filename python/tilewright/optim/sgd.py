"""SGD: csrc/ops/optim.cc (rule) · csrc/simd/optim.cc, csrc/cuda/optim.cu."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tilewright import _core
from tilewright.optim.optimizer import Optimizer, sign


class SGD(Optimizer):
    """Stochastic gradient descent; all parameters of a group in one fused kernel call, in place.

        g = grad + weight_decay * p                             maximize: g = -grad + ...
        u = momentum * u + (1 - dampening) * g                  u = g at the first step
        p -= lr * u                                             nesterov: lr * (g + momentum * u)

    Args:
        params: Tensors, or dicts of groups (see Optimizer).
        lr: learning rate.
        momentum: 0 keeps no velocity.
        dampening: share of the gradient that the velocity does not take.
        weight_decay: L2 penalty, added to the gradient.
        nesterov: look ahead; needs a momentum and no dampening.
        maximize: climb.

    Source: Sutskever et al. 2013.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "dampening": dampening}
        options |= {"weight_decay": weight_decay, "nesterov": nesterov, "maximize": maximize}
        super().__init__(params, options)

    def _check(self, options: dict[str, Any]) -> None:
        super()._check(options)
        if options["nesterov"] and not (options["momentum"] > 0.0 and options["dampening"] == 0.0):
            raise ValueError("SGD: nesterov needs a momentum above 0 and no dampening")

    def _slots(self, options: dict[str, Any]) -> tuple[str, ...]:
        return ("velocity",) if options["momentum"] else ()

    def _lists(self) -> tuple[str, ...]:
        return ("velocity",)

    def _numbers(self, options: dict[str, Any], step: int, fresh: bool) -> list[float]:
        lr, momentum, decay = (options[name] for name in ("lr", "momentum", "weight_decay"))
        dampening = 0.0 if fresh else options["dampening"]
        return [lr, momentum, decay, options["nesterov"], dampening, sign(options)]

    def _update(self, *arguments: Any) -> None:
        _core.sgd_step(*arguments)
