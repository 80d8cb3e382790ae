"""Packs of constant weights."""

from __future__ import annotations

from typing import Any

from tilewright import _core
from tilewright.autograd import Tensor, grad_enabled
from tilewright.device import device_of
from tilewright.recording import current
from tilewright.runtime import active_isa


class TransposedWeight:
    """A weight (out, in) as the right operand of a product, packed while it is constant.

    A pack is made in eval mode under ``no_grad``, and again when the weight has changed (through a
    Tensor's methods, an optimizer or ``load_state_dict``) or another ISA level is active. Copies
    and pickles of it start without one. Threads may share it: what is kept is replaced at once.
    """

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the pack."""
        self._kept: Any = None  # (what it was made for, the array that was packed, the pack)

    def of(self, weight: Tensor, training: bool, prefer: str = "throughput") -> Any:
        """The transpose of the weight: packed as ``tw.pack`` does with ``prefer``, or a view."""
        if training or grad_enabled() or device_of(weight.data):  # no kernel there wants a pack
            return weight.T
        made_for = (weight._version, active_isa(), prefer)
        if (noted := current()) is not None:
            noted.reads(weight, weight._version)
        kept = self._kept
        if kept is None or kept[0] != made_for or not _same_memory(weight.data, kept[1]):
            # The array is kept with its pack: its address stays its own.
            pack = _core.pack(weight.data.T, prefer == "latency")
            kept = self._kept = (made_for, weight.data, pack)
        return kept[2]

    def __reduce__(self) -> Any:
        return TransposedWeight, ()


def _same_memory(a: Any, b: Any) -> bool:
    """Whether two arrays are one, or views of the same elements."""
    return a is b or bool(a.__array_interface__ == b.__array_interface__)
