"""Learning-rate schedules: each is a function of the step and the rate that a group started with.

    LinearLR(optimizer, ...)            sets the rate of step 0 at once
    optimizer.step(); schedule.step()   once a step (or an epoch): sets the rate of the next

Names and meanings are PyTorch's. Every schedule but ReduceLROnPlateau says what the rate of any
step is (``lr_at``); so a chain of schedules is a chain of functions, and a rate that was changed by
hand is set again at the next step.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tilewright.errors import FormatError
from tilewright.optim.optimizer import INITIAL_LR, Optimizer
from tilewright.recording import refuse


class LRScheduler:
    """What the schedules share.

    Args:
        optimizer: whose groups' rates are set.
        last_epoch: -1, or the step after which to go on: the rate is that of ``last_epoch + 1``,
            and each group must say what it started with, as ``initial_lr``.

    Attributes:
        last_epoch: steps taken.
    """

    _numbers: tuple[str, ...] = ()  # names of the attributes that are saved

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1) -> None:
        self.optimizer = optimizer
        self._require(
            last_epoch == -1 or all(INITIAL_LR in group for group in optimizer.param_groups),
            f"last_epoch {last_epoch} needs {INITIAL_LR!r} in every group of the optimizer",
        )
        self.last_epoch = last_epoch + 1
        self._set()

    def lr_at(self, step: int, base: float) -> float:
        """The rate of a step, counted from 0, of a group that started with ``base``."""
        raise NotImplementedError

    def _rate(self, group: int, step: int, base: float) -> float:
        """The rate of group number ``group``; only LambdaLR's depends on the number."""
        return self.lr_at(step, base)

    def step(self) -> None:
        """Set the optimizer's rates for its next step."""
        refuse("a schedule's step", "call it outside of the step")
        self.last_epoch += 1
        self._set()

    def _set(self) -> None:
        for i, group in enumerate(self.optimizer.param_groups):
            base = group.setdefault(INITIAL_LR, group["lr"])
            group["lr"] = self._rate(i, self.last_epoch, base)

    @property
    def base_lrs(self) -> list[float]:
        """The rate that each group started with."""
        return [group.get(INITIAL_LR, group["lr"]) for group in self.optimizer.param_groups]

    def get_last_lr(self) -> list[float]:
        """The rate of each group now."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The state as numbers and lists of them: for JSON, or for ``tw.save``."""
        names = ("last_epoch", "base_lrs", *self._numbers)
        return {name: _plain(getattr(self, name)) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was called: sets the rates, too.

        Raises:
            FormatError: numbers are missing or left over, or there are other groups.
        """
        numbers = {name: _plain(value) for name, value in state.items()}
        odd = sorted(set(numbers) ^ set(self.state_dict()))
        if odd:
            raise FormatError(f"{type(self).__name__}: missing or unexpected in the state: {odd}")
        groups, bases = self.optimizer.param_groups, numbers.pop("base_lrs")
        if len(bases) != len(groups):
            raise FormatError(
                f"{type(self).__name__}: the state must be of {len(groups)} groups, "
                f"got {len(bases)}"
            )
        for group, base in zip(groups, bases, strict=True):
            group[INITIAL_LR] = base
        self._load(numbers)
        self._set()

    def _load(self, numbers: dict[str, Any]) -> None:
        for name, value in numbers.items():
            setattr(self, name, value)

    def _require(self, ok: bool, rule: str) -> None:
        if not ok:
            raise ValueError(f"{type(self).__name__}: {rule}")


def _plain(value: Any) -> Any:
    """Numbers of NumPy as Python's."""
    return np.asarray(value).tolist()


class LambdaLR(LRScheduler):
    """lr = base * factor(step), by one function or a list with one for each group.

    The functions are not saved. ``lr_at`` is of the first group.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr_lambda: Callable[[int], float] | Sequence[Callable[[int], float]],
        last_epoch: int = -1,
    ) -> None:
        self.lr_lambda = lr_lambda
        groups = len(optimizer.param_groups)
        self._require(
            callable(lr_lambda) or len(lr_lambda) == groups,
            f"lr_lambda must be a function or a list of {groups}, one for each group",
        )
        super().__init__(optimizer, last_epoch)

    def lr_at(self, step: int, base: float) -> float:
        return self._rate(0, step, base)

    def _rate(self, group: int, step: int, base: float) -> float:
        factor = self.lr_lambda if callable(self.lr_lambda) else self.lr_lambda[group]
        return base * factor(step)


class ConstantLR(LRScheduler):
    """lr = base * factor for the first ``total_iters`` steps, then base."""

    _numbers = ("factor", "total_iters")

    def __init__(
        self,
        optimizer: Optimizer,
        factor: float = 1.0 / 3.0,
        total_iters: int = 5,
        last_epoch: int = -1,
    ) -> None:
        self.factor, self.total_iters = factor, total_iters
        self._require(0.0 <= factor <= 1.0, f"factor must be in [0, 1], got {factor}")
        super().__init__(optimizer, last_epoch)

    def lr_at(self, step: int, base: float) -> float:
        return base * self.factor if step < self.total_iters else base


class LinearLR(LRScheduler):
    """lr = base * a factor that goes from start to end in ``total_iters`` steps: a warm-up."""

    _numbers = ("start_factor", "end_factor", "total_iters")

    def __init__(
        self,
        optimizer: Optimizer,
        start_factor: float = 1.0 / 3.0,
        end_factor: float = 1.0,
        total_iters: int = 5,
        last_epoch: int = -1,
    ) -> None:
        self.start_factor, self.end_factor = start_factor, end_factor
        self.total_iters = total_iters
        self._require(0 < start_factor <= 1, f"start_factor must be in (0, 1], got {start_factor}")
        self._require(0 <= end_factor <= 1, f"end_factor must be in [0, 1], got {end_factor}")
        super().__init__(optimizer, last_epoch)

    def lr_at(self, step: int, base: float) -> float:
        share = min(step, self.total_iters) / self.total_iters if self.total_iters else 1.0
        return base * (self.start_factor + (self.end_factor - self.start_factor) * share)


class PolynomialLR(LRScheduler):
    """lr = base * (1 - step / total_iters) ** power, then 0."""

    _numbers = ("total_iters", "power")

    def __init__(
        self, optimizer: Optimizer, total_iters: int = 5, power: float = 1.0, last_epoch: int = -1
    ) -> None:
        self.total_iters, self.power = total_iters, power
        self._require(total_iters > 0, f"total_iters must be above 0, got {total_iters}")
        super().__init__(optimizer, last_epoch)

    def lr_at(self, step: int, base: float) -> float:
        share = min(step, self.total_iters) / self.total_iters
        return float(base * (1.0 - share) ** self.power)


class StepLR(LRScheduler):
    """lr = base * gamma ** (step // step_size)."""

    _numbers = ("step_size", "gamma")

    def __init__(
        self, optimizer: Optimizer, step_size: int, gamma: float = 0.1, last_epoch: int = -1
    ) -> None:
        self.step_size, self.gamma = step_size, gamma
        self._require(step_size > 0, f"step_size must be above 0, got {step_size}")
        super().__init__(optimizer, last_epoch)

    def lr_at(self, step: int, base: float) -> float:
        return float(base * self.gamma ** (step // self.step_size))


class MultiStepLR(LRScheduler):
    """lr = base * gamma ** (how many milestones the step has reached)."""

    _numbers = ("milestones", "gamma")

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Sequence[int],
        gamma: float = 0.1,
        last_epoch: int = -1,
    ) -> None:
        self.milestones, self.gamma = sorted(milestones), gamma
        super().__init__(optimizer, last_epoch)

    def lr_at(self, step: int, base: float) -> float:
        return float(base * self.gamma ** bisect.bisect_right(self.milestones, step))


class ExponentialLR(LRScheduler):
    """lr = base * gamma ** step."""

    _numbers = ("gamma",)

    def __init__(self, optimizer: Optimizer, gamma: float, last_epoch: int = -1) -> None:
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def lr_at(self, step: int, base: float) -> float:
        return float(base * self.gamma**step)


class CosineAnnealingLR(LRScheduler):
    """lr = eta_min + (base - eta_min) * (1 + cos(pi * step / T_max)) / 2: up again after T_max.

    Source: Loshchilov & Hutter, "SGDR", 2017.
    """

    _numbers = ("T_max", "eta_min")

    def __init__(
        self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0, last_epoch: int = -1
    ) -> None:
        self.T_max, self.eta_min = T_max, eta_min
        self._require(T_max > 0, f"T_max must be above 0, got {T_max}")
        super().__init__(optimizer, last_epoch)

    def lr_at(self, step: int, base: float) -> float:
        return _cosine(step / self.T_max, base, self.eta_min)


class CosineAnnealingWarmRestarts(LRScheduler):
    """Half a cosine from base to ``eta_min`` over T_0 steps, again over T_0 * T_mult, ...

    Source: Loshchilov & Hutter, "SGDR", 2017.
    """

    _numbers = ("T_0", "T_mult", "eta_min")

    def __init__(
        self,
        optimizer: Optimizer,
        T_0: int,
        T_mult: int = 1,
        eta_min: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        self.T_0, self.T_mult, self.eta_min = T_0, T_mult, eta_min
        self._require(
            T_0 > 0 and T_mult >= 1, f"T_0 and T_mult must be at least 1, got {T_0, T_mult}"
        )
        super().__init__(optimizer, last_epoch)

    def lr_at(self, step: int, base: float) -> float:
        period = self.T_0
        while self.T_mult > 1 and step >= period:
            step, period = step - period, period * self.T_mult
        return _cosine(step % period / period, base, self.eta_min)


class CosineSchedule(LRScheduler):
    """Linear warm-up to the base rate, then half a cosine down to a share of it, which stays.

        step <  warmup_steps    lr = base * (step + 1) / warmup_steps
        step >= warmup_steps    lr = base * (r + (1 - r) * (1 + cos(pi * t)) / 2)
                                t = (step - warmup_steps) / (total_steps - warmup_steps), at most 1

    What language models are trained with; PyTorch has it not in one piece.
    """

    _numbers = ("total_steps", "warmup_steps", "min_lr_ratio")

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int = 0,
        min_lr_ratio: float = 0.1,
        last_epoch: int = -1,
    ) -> None:
        self.total_steps, self.warmup_steps = total_steps, warmup_steps
        self.min_lr_ratio = min_lr_ratio
        self._require(
            0 <= warmup_steps <= total_steps,
            f"warmup_steps must be in [0, total_steps = {total_steps}], got {warmup_steps}",
        )
        super().__init__(optimizer, last_epoch)

    def lr_at(self, step: int, base: float) -> float:
        if step < self.warmup_steps:
            return base * (step + 1) / self.warmup_steps
        t = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return _cosine(t, base, base * self.min_lr_ratio)


def _cosine(t: float, top: float, bottom: float) -> float:
    return bottom + (top - bottom) * 0.5 * (1.0 + math.cos(math.pi * t))


# Schedules of schedules ---------------------------------------------------------------------------


class _Combined(LRScheduler):
    def __init__(
        self, optimizer: Optimizer, schedulers: Sequence[LRScheduler], last_epoch: int = -1
    ) -> None:
        self.schedulers = list(schedulers)
        self._require(bool(self.schedulers), "needs at least one scheduler")
        self._require(
            all(isinstance(s, LRScheduler) for s in self.schedulers),
            "schedulers must say their rate of any step; ReduceLROnPlateau can't",
        )
        self._require(
            all(s.optimizer is optimizer for s in self.schedulers),
            "schedulers must be of one optimizer",
        )
        super().__init__(optimizer, last_epoch)

    def lr_at(self, step: int, base: float) -> float:
        return self._rate(0, step, base)

    def _set(self) -> None:
        super()._set()
        for schedule in self.schedulers:
            schedule.last_epoch = self.last_epoch

    def state_dict(self) -> dict[str, Any]:
        found = super().state_dict()
        for i, schedule in enumerate(self.schedulers):
            found |= {f"{i}.{name}": value for name, value in schedule.state_dict().items()}
        return found

    def _load(self, numbers: dict[str, Any]) -> None:
        super()._load({name: v for name, v in numbers.items() if not name[0].isdigit()})
        for i, schedule in enumerate(self.schedulers):
            own = (*schedule.state_dict(),)
            schedule.load_state_dict({name: numbers[f"{i}.{name}"] for name in own})


class SequentialLR(_Combined):
    """One schedule after the other: number i from milestones[i - 1] on, each from its own step 0.

    A warm-up before a cosine is ``SequentialLR(o, [LinearLR(o, 0.1, 1.0, 100),
    CosineAnnealingLR(o, 900)], milestones=[100])``.
    """

    _numbers = ("milestones",)

    def __init__(
        self,
        optimizer: Optimizer,
        schedulers: Sequence[LRScheduler],
        milestones: Sequence[int],
        last_epoch: int = -1,
    ) -> None:
        self.milestones = list(milestones)
        self._require(
            len(self.milestones) == len(schedulers) - 1,
            f"needs one milestone between each two schedulers, got {len(self.milestones)} "
            f"for {len(schedulers)}",
        )
        super().__init__(optimizer, schedulers, last_epoch)

    def _rate(self, group: int, step: int, base: float) -> float:
        index = bisect.bisect_right(self.milestones, step)
        start = self.milestones[index - 1] if index else 0
        return self.schedulers[index]._rate(group, step - start, base)


class ChainedScheduler(_Combined):
    """All schedules at once: each takes the rate of the one before as its base.

    For schedules that multiply the base, and a cosine that ends at 0, PyTorch's; it has another
    rule for a cosine that ends above.
    """

    def __init__(
        self, schedulers: Sequence[LRScheduler], optimizer: Optimizer | None = None
    ) -> None:
        if not schedulers:
            raise ValueError("ChainedScheduler: needs at least one scheduler")
        super().__init__(optimizer or schedulers[0].optimizer, schedulers)

    def _rate(self, group: int, step: int, base: float) -> float:
        for schedule in self.schedulers:
            base = schedule._rate(group, step, base)
        return base


# By a measured number ---------------------------------------------------------------------------


class ReduceLROnPlateau:
    """Multiply the rate by ``factor`` when a number has not improved for more than patience steps.

    Args:
        optimizer: whose groups' rates are set.
        mode: "min" (a loss) or "max" (an accuracy).
        factor: below 1.
        patience: steps without improvement that are let pass.
        threshold: what counts as an improvement.
        threshold_mode: "rel" (a share of the best) or "abs".
        cooldown: steps after a reduction in which nothing is counted.
        min_lr: a rate below which none is reduced; one, or one for each group.
        eps: a smaller change is left out.

    Attributes:
        best: the best number so far.
        num_bad_epochs: steps since.
    """

    _numbers = ("last_epoch", "best", "num_bad_epochs", "cooldown_counter")

    def __init__(
        self,
        optimizer: Optimizer,
        mode: str = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
        min_lr: float | Sequence[float] = 0.0,
        eps: float = 1e-8,
    ) -> None:
        if mode not in ("min", "max") or threshold_mode not in ("rel", "abs"):
            raise ValueError(
                'ReduceLROnPlateau: mode must be "min" or "max", threshold_mode "rel" or "abs", '
                f"got {mode!r} and {threshold_mode!r}"
            )
        if not factor < 1.0:
            raise ValueError(f"ReduceLROnPlateau: factor must be below 1, got {factor}")
        self.optimizer, self.mode, self.factor, self.patience = optimizer, mode, factor, patience
        self.threshold, self.threshold_mode = threshold, threshold_mode
        self.cooldown, self.min_lr, self.eps = cooldown, min_lr, eps
        self.last_epoch = self.num_bad_epochs = self.cooldown_counter = 0
        self.best = math.inf if mode == "min" else -math.inf

    def step(self, metrics: Any) -> None:
        """Take the number of this step, and reduce the rates if it is time to."""
        refuse("a schedule's step", "call it outside of the step")
        value = float(metrics)
        self.last_epoch += 1
        if self._improves(value):
            self.best, self.num_bad_epochs = value, 0
        else:
            self.num_bad_epochs += 1
        if self.cooldown_counter > 0:
            self.cooldown_counter -= 1
            self.num_bad_epochs = 0
        if self.num_bad_epochs > self.patience:
            self._reduce()
            self.cooldown_counter, self.num_bad_epochs = self.cooldown, 0

    def _improves(self, value: float) -> bool:
        sign = 1.0 if self.mode == "min" else -1.0
        if self.threshold_mode == "abs":
            return sign * value < sign * self.best - self.threshold
        return sign * value < sign * self.best * (1.0 - sign * self.threshold)

    def _reduce(self) -> None:
        groups = self.optimizer.param_groups
        floors = self.min_lr if isinstance(self.min_lr, Sequence) else [self.min_lr] * len(groups)
        for group, floor in zip(groups, floors, strict=True):
            lr = max(group["lr"] * self.factor, floor)
            if group["lr"] - lr > self.eps:
                group["lr"] = lr

    def get_last_lr(self) -> list[float]:
        """The rate of each group now."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The state as numbers: for JSON, or for ``tw.save``."""
        return {**{name: getattr(self, name) for name in self._numbers}, "lrs": self.get_last_lr()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was called: sets the rates, too."""
        numbers = {name: _plain(value) for name, value in state.items()}
        groups = self.optimizer.param_groups
        if set(numbers) != {*self._numbers, "lrs"} or len(numbers["lrs"]) != len(groups):
            raise FormatError(
                f"ReduceLROnPlateau: the state must have {', '.join(self._numbers)} and the lrs "
                f"of {len(groups)} groups, got {sorted(numbers)}"
            )
        for group, lr in zip(groups, numbers.pop("lrs"), strict=True):
            group["lr"] = lr
        for name, value in numbers.items():
            setattr(self, name, value)
