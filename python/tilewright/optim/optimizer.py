"""Optimizer: parameters in groups, their options, float32 state beside them, and its saving."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from tilewright.autograd import Tensor
from tilewright.device import Device, as_array, device_of, moved, running_on
from tilewright.errors import FormatError, ShapeError
from tilewright.program import Stale
from tilewright.recording import Recording, current, refuse

_SIZE = "size"  # of a group: saved in place of its parameters
INITIAL_LR = "initial_lr"  # of a group: the rate that schedules start from


class Optimizer:
    """What the optimizers share. A subclass names its options and state, and calls its kernel.

    The parameters come as one iterable of Tensors, or as dicts, each a group with options of its
    own: ``[{"params": decayed}, {"params": rest, "weight_decay": 0.0}]``.

    Attributes:
        param_groups: dicts of the options and ``"params"``, a list of Tensors. An option may be
            changed between steps.
        state: for each parameter, ``{"step": its steps so far, name: float32 array, ...}``. A
            parameter without a gradient takes no step. The arrays are where the parameter is, and
            follow it in its next step.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        self.defaults = defaults
        self.param_groups: list[dict[str, Any]] = []
        self.state: dict[Tensor, dict[str, Any]] = {}
        given = list(params)
        if not given:
            raise ValueError(f"{type(self).__name__}: params is empty")
        for group in given if isinstance(given[0], dict) else [{"params": given}]:
            self.add_param_group(group)

    # What a subclass defines --------------------------------------------------------------------

    def _check(self, options: dict[str, Any]) -> None:
        """Refuse options that make no sense."""
        for name in ("lr", "eps", "weight_decay", "momentum"):
            if not options.get(name, 0.0) >= 0.0:
                self._refuse(name, "must be at least 0", options[name])

    def _slots(self, options: dict[str, Any]) -> tuple[str, ...]:
        """Names of the state arrays that a parameter has under these options."""
        raise NotImplementedError

    def _update(self, *arguments: Any) -> None:
        """Call the kernel: params, grads, the state's arrays by ``_lists``, then ``_numbers``."""
        raise NotImplementedError

    def _numbers(self, options: dict[str, Any], step: int, fresh: bool) -> list[float]:
        """The kernel's numbers for step number ``step``, counted from 1.

        ``fresh`` says that some of the state is all zeros, because this is its first step.
        """
        raise NotImplementedError

    def _lists(self) -> tuple[str, ...]:
        """Names of the state arrays that the kernel takes, in its order."""
        raise NotImplementedError

    def _refuse(self, option: str, rule: str, got: Any) -> None:
        raise ValueError(f"{type(self).__name__}: {option} {rule}, got {got}")

    # Groups -------------------------------------------------------------------------------------

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Add ``{"params": Tensors, option: value, ...}``; options left out are the defaults.

        ``initial_lr`` beside them is for a schedule that goes on (its ``last_epoch``).
        """
        params = group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        unknown = sorted(set(group) - set(self.defaults) - {"params", INITIAL_LR})
        if unknown:
            raise ValueError(
                f"{type(self).__name__}: the options of a group are "
                f"{', '.join(self.defaults)}; got {', '.join(unknown)}"
            )
        for p in params:
            if not isinstance(p, Tensor) or p._node is not None:
                raise TypeError(
                    f"{type(self).__name__}: params must be Tensors that no op made, "
                    f"got {type(p).__name__}"
                )
        if len({*self.state, *params}) != len(self.state) + len(params):
            raise ValueError(f"{type(self).__name__}: a parameter comes twice")
        options = {**self.defaults, **group, "params": params}
        self._check(options)
        self.param_groups.append(options)
        for p in params:
            self.state[p] = {"step": 0, **self._missing(p, options)}

    def _missing(self, p: Tensor, options: dict[str, Any]) -> dict[str, Any]:
        """State arrays that p needs under these options and does not have: zeros."""
        state = self.state.get(p, {})
        slots = (slot for slot in self._slots(options) if slot not in state)
        return {slot: np.zeros_like(p.data, np.float32, order="C") for slot in slots}

    @property
    def params(self) -> list[Tensor]:
        """The parameters of all groups."""
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def lr(self) -> float:
        """The learning rate of the first group; setting it sets that of every group."""
        return float(self.param_groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        refuse("setting the learning rate", "do it outside of the step")
        for group in self.param_groups:
            group["lr"] = value

    # Steps --------------------------------------------------------------------------------------

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            # One call of the kernel is of one step number; an option may need state from now on.
            alike: dict[tuple[int, bool, Device | None], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    state, device = self.state[p], device_of(p.data)
                    missing = self._missing(p, group)
                    state.update(missing)
                    for slot in self._slots(group):
                        state[slot] = moved(state[slot], device)
                    step = state["step"] + 1
                    fresh = step == 1 or bool(missing)
                    alike.setdefault((step, fresh, device), []).append(p)
            for (step, fresh, device), params in alike.items():
                states = [self.state[p] for p in params]
                used = self._slots(group)
                lists = [[s[n] for s in states] if n in used else [] for n in self._lists()]
                data, grads = [p.data for p in params], [p.grad for p in params]
                noted = current()
                if noted is not None:
                    noted.runs_on(device)
                    for p in params:
                        noted.reads(p)
                        noted.gradient(p)
                with running_on(device, type(self).__name__):
                    self._update(data, grads, *lists, *self._numbers(group, step, fresh))
                if noted is not None:
                    self._note(noted, group, params)
                for p, state in zip(params, states, strict=True):
                    state["step"] = step
                    p.mark_written()

    def _note(self, noted: Recording, group: dict[str, Any], params: list[Tensor]) -> None:
        """Tell a recording how the call of the kernel that was just made goes on."""
        states = [self.state[p] for p in params]
        if any(state is other for state in states for other in noted.stepped):
            refuse("a second step of an optimizer", "call the compiled step twice")
        noted.stepped += states
        used = self._slots(group)
        arrays = [[state[slot] for slot in used] for state in states]

        def numbers() -> list[float]:
            step = states[0]["step"]
            for state, known in zip(states, arrays, strict=True):
                same = all(state[slot] is array for slot, array in zip(used, known, strict=True))
                if state["step"] != step or not same:
                    raise Stale
            if self._slots(group) != used:
                raise Stale
            return self._numbers(group, step + 1, step == 0)

        def count() -> None:
            for state in states:
                state["step"] += 1

        noted.varies(numbers)
        noted.does(count)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, or fill them with zeros."""
        noted = current()
        if not set_to_none:
            refuse("filling gradients with zeros", "use zero_grad(set_to_none=True)")
        for p in self.params:
            if noted is not None:
                noted.gradient(p, replaced=True)
            if set_to_none:
                p.grad = None
            elif p.grad is not None:
                p.grad[...] = 0

    # State --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything but the parameters, as arrays for ``tw.save``.

        Returns:
            ``groups.0.lr`` and so on for each option, ``steps`` (n,), and the state arrays
            themselves, not copies: ``m.0`` is parameter 0's, counted through all groups.
        """
        found: dict[str, Any] = {}
        for g, group in enumerate(self.param_groups):
            saved = {name: group[name] for name in self.defaults}
            saved[_SIZE] = len(group["params"])
            found.update({f"groups.{g}.{name}": np.asarray(v) for name, v in saved.items()})
        states = [
            self.state[p] | self._missing(p, group)
            for group in self.param_groups
            for p in group["params"]
        ]
        found["steps"] = np.array([state["step"] for state in states], np.int64)
        for i, state in enumerate(states):
            found.update({f"{slot}.{i}": a for slot, a in state.items() if slot != "step"})
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy a saved state and its options in; nothing is copied if it does not fit.

        Raises:
            FormatError: arrays are missing, left over, or of other groups.
            ShapeError: naming the array that does not fit.
        """
        own = self.state_dict()
        arrays = {name: as_array(array) for name, array in state.items()}
        odd = sorted(set(arrays) ^ set(own))
        if odd:
            raise FormatError(
                f"{type(self).__name__}: the state must have the groups, parameters and options "
                f"of this optimizer; missing or unexpected: {odd[:8]}"
            )
        for name, mine in own.items():
            if arrays[name].shape != mine.shape:
                raise ShapeError(
                    f"{type(self).__name__}: {name} must have shape {mine.shape} to match its "
                    f"parameter, got {arrays[name].shape}"
                )
            if name.endswith(f".{_SIZE}") and arrays[name] != mine:
                raise FormatError(
                    f"{type(self).__name__}: {name[: -len(_SIZE) - 1]} must have {mine} "
                    f"parameters, got {arrays[name]}"
                )
        for g, group in enumerate(self.param_groups):
            for p in group["params"]:
                self.state[p].update(self._missing(p, group))
            for name in self.defaults:
                value = arrays[f"groups.{g}.{name}"].tolist()
                group[name] = tuple(value) if isinstance(value, list) else value
        for i, p in enumerate(self.params):
            mine = self.state[p]
            for slot in mine:
                if slot != "step":
                    array = arrays[f"{slot}.{i}"]
                    np.copyto(mine[slot], moved(array, device_of(mine[slot])))
            mine["step"] = int(arrays["steps"][i])

    def __repr__(self) -> str:
        lines = []
        for g, group in enumerate(self.param_groups):
            options = ", ".join(f"{name}={group[name]}" for name in self.defaults)
            lines.append(f"  ({g}): {len(group['params'])} parameters, {options}\n")
        return f"{type(self).__name__}(\n{''.join(lines)})"


def sign(options: dict[str, Any]) -> float:
    """What the gradient is multiplied by: -1 climbs."""
    return -1.0 if options["maximize"] else 1.0
