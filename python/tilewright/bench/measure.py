"""Timing competitors so that the machine's moods hit all of them alike.

Every round times each engine once, in an order that rotates, so that a slow moment of the machine
costs everybody and a ratio within a row stays fair. Before its sample an engine waits until the
process is quiet (the other engines' worker threads spin on after their work) and
runs untimed for a moment, which wakes its own workers and warms caches: what is timed is the steady
state of calls that follow each other. With `flush` the workers are awake and the caches cold.
"""

from __future__ import annotations

import contextlib
import pathlib
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

SAMPLE_SECONDS = 100e-6  # a timed sample repeats short calls until it lasts about this long
WARM_SECONDS = 10e-3  # parked workers stay awake after 1 ms, the clock of the caches rises in 10
QUIET_SECONDS = 1e-3
QUIET_PATIENCE = 1000  # ONNX Runtime's workers spin for 50 ms, torch's for 8
LONG_SECONDS = 30e-3  # a call that warms what it needs within itself: none goes before it untimed


class Timing(NamedTuple):
    """Seconds a call, over the rounds."""

    min: float
    median: float
    spread: float  # (median - min) / min: how far the machine lifted the usual round above the best
    rounds: int


def summarize(samples: list[float]) -> Timing:
    """Best, median and spread of some samples."""
    best, median = min(samples), statistics.median(samples)
    return Timing(best, median, (median - best) / best, len(samples))


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 20,
    budget: float = 12.0,
    quiet: bool = True,
    flush: Callable[[], Any] | None = None,
) -> dict[str, Timing]:
    """Time every call, round by round.

    Args:
        calls: engine → call.
        rounds: samples of each engine.
        budget: seconds after which no further round starts, once there are five. An engine one
            call of which takes longer has that call as its only sample: a peer's bfloat16 without
            instructions for it would take minutes.
        quiet: wait for the process's other threads to sleep before each sample.
        flush: empties the caches before each sample: cold figures, one call a sample.
    """
    first = {name: _first(call) for name, call in calls.items()}
    repeats = {name: 1 if flush else _repeats(s) for name, s in first.items()}
    samples = {name: [s] if s > budget else [] for name, s in first.items()}
    names = [name for name in calls if not samples[name]]
    start = time.perf_counter()
    for index in range(rounds):
        if index >= 5 and time.perf_counter() - start > budget:
            break
        start_at = index % max(1, len(names))
        for name in names[start_at:] + names[:start_at]:
            call = calls[name]
            if quiet:
                wait_until_quiet()
            if first[name] < LONG_SECONDS:
                _warm(call)
            if flush:
                flush()
            samples[name].append(_sample(call, repeats[name]))
    return {name: summarize(values) for name, values in samples.items()}


def wait_until_quiet() -> None:
    """Sleep until no other thread of this process runs.

    The kernel adds a running thread's time to the process's clock at its ticks, every 4 or 10 ms:
    that clock would call a thread asleep that spins.
    """
    for _ in range(QUIET_PATIENCE):
        time.sleep(QUIET_SECONDS)
        if not _others_run():
            return


def _others_run() -> bool:
    me = str(threading.get_native_id())
    for task in pathlib.Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has just ended
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            if task.name != me and state == "R":
                return True
    return False


def _warm(call: Callable[[], Any]) -> None:
    until = time.perf_counter() + WARM_SECONDS
    call()
    while time.perf_counter() < until:
        call()


def _sample(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _first(call: Callable[[], Any]) -> float:
    """Seconds of a call that is no longer the very first."""
    seconds = _sample(call, 1)
    return seconds if seconds > LONG_SECONDS else min(_sample(call, 1) for _ in range(3))


def _repeats(seconds: float) -> int:
    return max(1, round(SAMPLE_SECONDS / max(seconds, 1e-9)))
