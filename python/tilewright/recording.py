"""What is noted beside the kernel calls while ``tw.compile`` records a step in this thread.

Python's part of a step is not run again when its program is: so whatever a step reads or changes
in Python is either noted here, to be checked or done at each replay, or refused.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tilewright.errors import UnsupportedError

if TYPE_CHECKING:
    from tilewright.autograd import Tensor
    from tilewright.device import Device

_state = threading.local()
_count_lock = threading.Lock()
_count = 0  # recordings of all threads: while there is none, nobody asks further


class Recording:
    """One call of a step.

    Attributes:
        core: the kernel calls.
        varying: (kernel call, what returns its numbers for the next replay).
        effects: (kernel calls so far, what is to be done after them).
        draws: how many seeds were drawn.
        stepped: the optimizers' states that have taken their step.
        caches: (a KVCache's core, the tokens that its sequences had before).
        device: where the arrays are; None is the CPU.
    """

    def __init__(self, core: Any) -> None:
        self.core = core
        self.varying: list[tuple[int, Callable[[], list[float]]]] = []
        self.effects: list[tuple[int, Callable[[], None]]] = []
        self.draws = 0
        self.stepped: list[Any] = []
        self.caches: list[tuple[Any, list[int]]] = []
        self.device: Device | None = None
        self._tensors: dict[int, tuple[Any, Any, int | None]] = {}
        self._modules: dict[int, tuple[Any, bool]] = {}
        self._gradients: dict[Tensor, tuple[Any, ...]] = {}
        self._written: list[tuple[int, Any]] = []

    def __enter__(self) -> Recording:
        global _count
        with _count_lock:
            _count += 1
        _state.now = self
        self.core.start()
        return self

    def __exit__(self, *error: object) -> None:
        global _count
        self.core.stop()
        _state.now = None
        with _count_lock:
            _count -= 1

    def runs_on(self, device: Device | None) -> None:
        """The next kernel call is one of a device, None is the CPU.

        Raises:
            UnsupportedError: an earlier one is another device's.
        """
        if self.core.size == 0:
            self.device = device
        elif device is not self.device:
            places = " and ".join("the CPU" if d is None else d.name for d in (self.device, device))
            refuse(f"a step on {places}", "let each have a step of its own")

    # What a replay relies on --------------------------------------------------------------------

    def reads(self, tensor: Tensor, version: int | None = None) -> None:
        """The array of ``tensor`` is used: it must be the same one, if given of this version."""
        key = id(tensor)
        if key not in self._tensors or version is not None:
            self._tensors[key] = weakref.ref(tensor), weakref.ref(tensor.data), version

    def enters(self, module: Any) -> None:
        """A module is called, in training or in eval mode."""
        self._modules[id(module)] = module, module.training

    def gradient(self, leaf: Tensor, *, replaced: bool = False) -> None:
        """``leaf.grad`` is read, or replaced whatever it was."""
        self._gradients.setdefault(leaf, () if replaced else (leaf.grad,))

    def tensors(self) -> list[tuple[Tensor, Any, int | None]]:
        """(Tensor, its array, version or None) of those that outlived the step."""
        alive = ((tensor(), array(), version) for tensor, array, version in self._tensors.values())
        return [(t, a, v) for t, a, v in alive if t is not None and a is not None and t.data is a]

    def modules(self) -> list[tuple[Any, bool]]:
        """(module, whether it was in training mode)."""
        return list(self._modules.values())

    def gradients(self) -> list[tuple[Tensor, tuple[Any, ...], Any]]:
        """(leaf, the gradient it must have before, if any, the one it has after)."""
        return [(leaf, before, leaf.grad) for leaf, before in self._gradients.items()]

    # What a replay does -------------------------------------------------------------------------

    def varies(self, numbers: Callable[[], list[float]]) -> None:
        """The numbers of the last kernel call are asked for at each replay."""
        index = self.core.size - 1
        self.core.vary(index)
        self.varying.append((index, numbers))

    def does(self, effect: Callable[[], None]) -> None:
        """Something in Python is to be done at each replay, after the kernel calls so far."""
        self.effects.append((self.core.size, effect))

    def writes(self, tensor: Tensor) -> None:
        """The tensor was written in place."""
        self._written.append((self.core.size, weakref.ref(tensor)))

    def written(self) -> list[tuple[int, Tensor]]:
        """(kernel calls so far, Tensor) of those that outlived the step."""
        alive = ((after, tensor()) for after, tensor in self._written)
        return [(after, tensor) for after, tensor in alive if tensor is not None]

    def drew(self, seed: int) -> None:
        """A seed was drawn: each replay draws another one."""
        self.core.seed(seed)
        self.draws += 1


def current() -> Recording | None:
    """The recording of this thread."""
    return getattr(_state, "now", None) if _count else None


def refuse(what: str, instead: str) -> None:
    """Raise where this thread records: a replay would not do ``what``.

    Raises:
        UnsupportedError: saying what to do instead.
    """
    if current() is not None:
        raise UnsupportedError(f"compile: {what} is not part of a program; {instead}")
