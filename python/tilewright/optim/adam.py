"""Adam and AdamW: csrc/ops/optim.cc (rule) · csrc/simd/optim.cc, csrc/cuda/optim.cu."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tilewright import _core
from tilewright.optim.optimizer import Optimizer, sign


class Adam(Optimizer):
    """Adam; all parameters of a group in one fused kernel call, in place.

        g = grad + weight_decay * p                                       (coupled decay), or
        p -= lr * weight_decay * p                                        (decoupled)
        m = beta1 * m + (1 - beta1) * g        v = beta2 * v + (1 - beta2) * g**2
        p -= lr * m / (1 - beta1**t) / (sqrt(v / (1 - beta2**t)) + eps)

    Args:
        params: Tensors, or dicts of groups (see Optimizer).
        lr: learning rate.
        betas: of the two running means.
        eps: added to the denominator.
        weight_decay: L2 penalty, added to the gradient.
        amsgrad: take the largest v so far in place of v.
        maximize: climb: g = -grad + ....
        decoupled_weight_decay: every weight shrinks by this share of lr instead (AdamW).

    Source: Kingma & Ba 2015; Reddi, Kale & Kumar 2018 (amsgrad).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
    ) -> None:
        options = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        options |= {"amsgrad": amsgrad, "maximize": maximize}
        options |= {"decoupled_weight_decay": decoupled_weight_decay}
        super().__init__(params, options)

    def _check(self, options: dict[str, Any]) -> None:
        super()._check(options)
        if not all(0.0 <= beta < 1.0 for beta in options["betas"]):
            self._refuse("betas", "must be in [0, 1)", options["betas"])

    def _slots(self, options: dict[str, Any]) -> tuple[str, ...]:
        return ("m", "v", "largest") if options["amsgrad"] else ("m", "v")

    def _lists(self) -> tuple[str, ...]:
        return "m", "v", "largest"

    def _numbers(self, options: dict[str, Any], step: int, fresh: bool) -> list[float]:
        names = "lr", "eps", "weight_decay", "decoupled_weight_decay"
        lr, eps, decay, decoupled = (options[name] for name in names)
        return [lr, *options["betas"], eps, decay, step, decoupled, sign(options)]

    def _update(self, *arguments: Any) -> None:
        _core.adam_step(*arguments)


class AdamW(Adam):
    """Adam with decoupled weight decay: p -= lr * weight_decay * p before the step.

    Args:
        params: Tensors, or dicts of groups (see Optimizer).
        lr: learning rate.
        betas: of the two running means.
        eps: added to the denominator.
        weight_decay: share of lr by which every weight shrinks each step.
        amsgrad: take the largest v so far in place of v.
        maximize: climb.

    Source: Loshchilov & Hutter 2019.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            decoupled_weight_decay=True,
        )
