"""What ran, and why: ``explain`` describes one call, ``stats`` counts them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tilewright import _core
from tilewright.runtime import isas


@dataclass(frozen=True)
class KernelCall:
    """One call of a kernel.

    Attributes:
        op: the op or its backward pass, as the C++ library names it.
        kernel: which of the op's kernels.
        isa: the ISA level that it was compiled for.
        shape: of the problem; products are batch x M x N x K.
        threads: that were offered work.
        tasks: that the work was cut into.
        microseconds: that it took, this time.
        details: tile and blocking, by name.
        notes: why something faster was not taken.
    """

    op: str
    kernel: str
    isa: str
    shape: str
    threads: int
    tasks: int
    microseconds: float
    details: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        plural = "s" if self.tasks != 1 else ""
        lines = [
            f"{self.op} {self.shape}",
            f"  kernel   {self.kernel}, level {self.isa}",
            *(f"  {name:<8} {value}" for name, value in self.details.items()),
            f"  threads  {self.threads}, {self.tasks} task{plural}",
            *(f"  why      {note}" for note in self.notes),
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """What ``tw.explain`` returns; print it, or read its fields.

    Attributes:
        op: name of what was called.
        options: precision, threads, isa and batch_invariant in effect.
        calls: the kernels that ran, in their order.
        levels: for each ISA level above the one in effect, why it was not taken.
    """

    op: str
    options: dict[str, Any]
    calls: tuple[KernelCall, ...]
    levels: dict[str, str]

    def __str__(self) -> str:
        lines = [str(call) for call in self.calls]
        if not lines:
            lines = [f"{self.op}: no kernel ran; NumPy did it, or there was nothing to do"]
        lines += [f"  level    not {name}: {why}" for name, why in self.levels.items()]
        return "\n".join(lines)

    __repr__ = __str__


def explain(op: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """Call ``op(*args, **kwargs)`` once and describe the kernels that ran in this thread.

    Args:
        op: an op, or anything that calls ops: a module, a training step.
        *args: passed on; ``out=`` is written as in any call.
        **kwargs: passed on.

    Returns:
        An Explanation: for each kernel its name, ISA level, tile, blocking and threads, and why
        faster ones were not taken. What the call itself returned is dropped.

    Raises:
        Whatever the call raises.

    Example:
        >>> x = np.ones((64, 64), np.float32)
        >>> [call.op for call in explain(tilewright.matmul, x, x).calls]
        ['matmul']
    """
    options = _core.effective_options()
    found = _core.record_calls(lambda: op(*args, **kwargs))
    name = getattr(op, "__name__", type(op).__name__)
    calls = tuple(KernelCall(**call) for call in found)
    return Explanation(name, options, calls, _levels_above(options["isa"]))


def _levels_above(active: str) -> dict[str, str]:
    """Why each level above the active one was not taken."""
    levels = isas()
    above = levels[1 + [level.name for level in levels].index(active) :]
    return {level.name: _why_not(level, active) for level in above}


def _why_not(level: Any, active: str) -> str:
    if not level.compiled:
        return "it was not compiled into this build"
    if not level.supported:
        return "this CPU or its operating system does not support it"
    return f"{active} was asked for, by tw.options, tw.set_isa or TILEWRIGHT_ISA"


@dataclass(frozen=True)
class Stats:
    """What ``tw.stats`` returns.

    Attributes:
        calls: op -> kernel -> number of calls since the start; a kernel is named with its level,
            as in ``gemm_f32@avx2``.
        fallbacks: op -> reason -> how often something slower than usual was done.
    """

    calls: dict[str, dict[str, int]]
    fallbacks: dict[str, dict[str, int]]

    def __str__(self) -> str:
        def lines(table: dict[str, dict[str, int]], mark: str) -> list[str]:
            rows = [(op, what, n) for op, row in table.items() for what, n in row.items()]
            return [f"{op:<24} {n:>10}  {mark}{what}" for op, what, n in rows]

        return "\n".join(lines(self.calls, "") + lines(self.fallbacks, "fallback: "))


def stats() -> Stats:
    """Count the kernel calls of the process so far, by op and kernel, and its fallbacks by reason.

    A call counts when its arguments have passed the checks, whether it then ends or is interrupted.
    """
    return Stats(_grouped(_core.call_counts()), _grouped(_core.fallback_counts()))


def _grouped(rows: list[tuple[str, str, str, int]]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for op, kernel, isa, count in sorted(rows):
        name = f"{kernel}@{isa}" if isa else kernel
        of_op = found.setdefault(op, {})
        of_op[name] = of_op.get(name, 0) + count
    return found
