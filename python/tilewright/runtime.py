"""What calls run under, for a context or the process: ISA level, threads, precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tilewright import _core
from tilewright.recording import refuse

_AROUND = "put it around the call of the compiled step"


class IsaLevel(NamedTuple):
    """One row of ``isas()``."""

    name: str
    compiled: bool
    supported: bool
    active: bool


def isas() -> list[IsaLevel]:
    """Every ISA level in ascending order: compiled in, supported by this CPU, active."""
    return [IsaLevel(*row) for row in _core.isa_levels()]


def active_isa() -> str:
    """Name of the ISA level that a kernel called here runs at."""
    return _core.active_isa()


@contextmanager
def options(
    *,
    precision: str | None = None,
    threads: int | None = None,
    isa: str | None = None,
    batch_invariant: bool | None = None,
) -> Iterator[None]:
    """Run the calls inside the block under other options than the process's.

    They belong to the context, as ``contextvars`` do: blocks nest, asyncio tasks inherit those that
    they were made under, other threads see nothing of them. What is left out stays as it is.

    Args:
        precision: of float32 products: "highest" (the bound of plain float32), "high" (off by about
            2^-17 of the sum of absolute terms) or "medium" (2^-9). They differ at the level
            ``amx``, where each is about twice as fast as the one before.
        threads: that a kernel may use. Results never depend on it.
        isa: an ISA level; "" is the best that the CPU supports.
        batch_invariant: False permits that a row's bits depend on the number of rows: up to 8 rows
            of float32 take the float32 kernel at the level ``amx``, which is faster for them.

    Raises:
        ShapeError, UnsupportedError: an impossible value; the message lists what is possible.

    Example:
        >>> with options(threads=1, isa="generic"):
        ...     get_num_threads(), active_isa()
        (1, 'generic')
    """
    refuse("tw.options", _AROUND)
    token = _core.enter_options(threads, isa, precision, batch_invariant)
    try:
        yield
    finally:
        _core.leave_options(token)


def set_options(
    *,
    precision: str | None = None,
    threads: int | None = None,
    isa: str | None = None,
    batch_invariant: bool | None = None,
) -> None:
    """Set the process's defaults, for every call outside of a block of ``options``.

    Arguments and errors are those of ``options``; nothing is set when one of them is impossible.
    """
    refuse("tw.set_options", _AROUND)
    _core.set_options(threads, isa, precision, batch_invariant)


def set_matmul_precision(p: str) -> None:
    """Set the process's precision of float32 products: ``set_options(precision=p)``."""
    set_options(precision=p)


def set_isa(name: str) -> None:
    """Set the process's ISA level; "" is the best that the CPU supports.

    Raises:
        UnsupportedError: unknown or unsupported here; the message lists the choices.
    """
    refuse("tw.set_isa", _AROUND)
    _core.set_isa(name)


def get_num_threads() -> int:
    """Threads that a kernel called here uses.

    Those of ``options`` or ``set_num_threads``, else the least of affinity, cgroup quota,
    OMP_NUM_THREADS and TILEWRIGHT_NUM_THREADS.
    """
    return int(_core.get_num_threads())


def set_num_threads(n: int) -> None:
    """Set the process's number of threads. Results never depend on it."""
    _core.set_num_threads(n)


class MemoryStats(NamedTuple):
    """Memory of large results (1 MiB and more), in bytes."""

    in_use: int
    peak: int
    kept: int
    reused: int


def memory_stats() -> MemoryStats:
    """What large results take: in use, the most so far, kept for later; and blocks used again.

    A large result's memory is kept when the array goes, for the next one; what is in use and kept
    stays below twice the most that was ever in use.
    """
    return MemoryStats(*_core.memory_stats())


def trim() -> None:
    """Give the memory that is kept for later results back to the system."""
    _core.trim()
