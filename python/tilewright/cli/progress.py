"""What a training run shows: a rich bar on a terminal, else a plain line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Protocol

from tilewright.training import Step

_EVERY = 5.0  # seconds between plain lines
_SMOOTH = 0.95  # of the loss that is shown: a running mean over about twenty steps


class Progress(Protocol):
    """A context manager that is told of every step."""

    def __enter__(self) -> Progress: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def update(self, step: Step, bytes_seen: int) -> None:
        """Show a step; ``bytes_seen`` counts from the beginning of this process."""

    def note(self, text: str) -> None:
        """Print a line beside the bar."""


def progress() -> Progress:
    """Return the bar if this is a terminal and rich is installed, else the plain lines."""
    if sys.stdout.isatty():
        try:
            import rich  # noqa: F401  (asked for here, used by _Bar)
        except ImportError:
            return _Lines()
        return _Bar()
    return _Lines()


class _Meter:
    """Smoothed loss, speed and time left; shared by both displays."""

    def __init__(self) -> None:
        self.loss = 0.0
        self._weight = 0.0
        self._first: tuple[float, float] | None = None

    def add(self, step: Step, bytes_seen: int) -> tuple[float, float, float]:
        """Return (loss, bytes a second, seconds left)."""
        self._weight = _SMOOTH * self._weight + 1 - _SMOOTH
        self.loss += (step.loss - self.loss) * (1 - _SMOOTH) / self._weight
        if (
            self._first is None
        ):  # the first step warms up; the clock of the estimate starts after it
            self._first = (step.seconds, step.progress)
            self._seen = bytes_seen
            return self.loss, 0.0, 0.0
        seconds, done = step.seconds - self._first[0], step.progress - self._first[1]
        left = seconds * (1 - step.progress) / done if done > 0 else 0.0
        return self.loss, (bytes_seen - self._seen) / max(seconds, 1e-9), left


class _Lines:
    """One line every few seconds."""

    def __init__(self) -> None:
        self._meter = _Meter()
        self._last = -_EVERY

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, step: Step, bytes_seen: int) -> None:
        loss, speed, left = self._meter.add(step, bytes_seen)
        now = time.monotonic()
        if (now - self._last < _EVERY and step.progress < 1) or speed == 0:
            return
        self._last = now
        print(
            f"step {step.number:>6}  {100 * step.progress:5.1f} %  loss {loss:.3f} bits/byte  "
            f"{speed:>8,.0f} tokens/s  {clock(left)} left",
            flush=True,
        )

    def note(self, text: str) -> None:
        print(text, flush=True)


class _Bar:
    """A rich progress bar."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._meter = _Meter()
        self._bar = RichProgress(
            TextColumn("step {task.fields[step]:>6}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("loss {task.fields[loss]:.3f} bits/byte"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TextColumn("{task.fields[left]} left"),
        )
        self._task: Any = None

    def __enter__(self) -> _Bar:
        self._bar.start()
        self._task = self._bar.add_task("train", total=1.0, step=0, loss=0.0, speed=0.0, left="-")
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, step: Step, bytes_seen: int) -> None:
        loss, speed, left = self._meter.add(step, bytes_seen)
        self._bar.update(
            self._task,
            completed=step.progress,
            step=step.number,
            loss=loss,
            speed=speed,
            left=clock(left),
        )

    def note(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False)


def clock(seconds: float) -> str:
    """Return a time such as 0:07 or 1:02:33."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
