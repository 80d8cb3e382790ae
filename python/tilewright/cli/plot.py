"""The loss curve as a PNG; needs matplotlib (the extra ``fit``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

MISSING = "no plot: matplotlib is not installed; python -m pip install 'tilewright[fit]'"

_TRAIN, _VALIDATION, _REFERENCE = "#9db7d5", "#c2410c", "#555555"
_TREND = "#1d4ed8"


def loss_plot(
    path: Path,
    entries: Sequence[dict[str, Any]],
    *,
    title: str,
    references: Sequence[tuple[str, float]] = (),
    final: float | None = None,
) -> bool:
    """Draw training and validation loss over the text read.

    Args:
        path: where the PNG goes.
        entries: a Log's: "step" and "validation".
        title: above the axes.
        references: (name, bits per byte) of horizontal lines.
        final: bits per byte of the finished model on all held-out text.

    Returns:
        False when matplotlib is missing; nothing was drawn then.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [e for e in entries if e["kind"] == "step"]
    validation = [e for e in entries if e["kind"] == "validation"]
    _curves(axes, steps, validation)
    if final is not None and steps:
        _final(axes, steps[-1]["bytes"] / 1e6, final)
    _limits(axes, steps, validation, references)
    _references(axes, references)
    axes.set_xlabel("text read in training (MB)")
    axes.set_ylabel("loss (bits per byte)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.legend(edgecolor="none", framealpha=1, borderpad=0.2, loc="upper right")
    axes.margins(x=0.02)
    figure.savefig(path)
    return True


def _curves(axes: Any, steps: list[dict[str, Any]], validation: list[dict[str, Any]]) -> None:
    x = [e["bytes"] / 1e6 for e in steps]
    y = [e["loss"] for e in steps]
    axes.plot(x, y, color=_TRAIN, linewidth=0.7, label="training, each step")
    axes.plot(x, _smooth(y), color=_TREND, linewidth=1.6, label="training, running mean")
    axes.plot(
        [e["bytes"] / 1e6 for e in validation],
        [e["bits_per_byte"] for e in validation],
        color=_VALIDATION,
        linewidth=1.8,
        marker="o",
        markersize=4,
        label="validation, a sample of the held-out text",
    )


def _final(axes: Any, x: float, bits: float) -> None:
    label = f"all held-out text, at the end: {bits:.2f}"
    axes.plot(x, bits, color=_VALIDATION, marker="D", markersize=7, linestyle="", label=label)


def _limits(
    axes: Any,
    steps: list[dict[str, Any]],
    validation: list[dict[str, Any]],
    references: Sequence[tuple[str, float]],
) -> None:
    """Show where the run ends and what it passes; the fall from 8 bits takes no room."""
    shown = [bits for _, bits in references]
    shown += [e["bits_per_byte"] for e in validation[len(validation) // 4 :]]
    shown += [e["loss"] for e in steps[len(steps) // 4 :]]
    if shown:
        axes.set_ylim(max(0.0, min(shown) - 0.1), max(shown) + 0.6)


def _references(axes: Any, references: Sequence[tuple[str, float]]) -> None:
    """Dashed lines, named to the right of the axes; names that would touch are pushed apart."""
    low, high = axes.get_ylim()
    gap = (high - low) / 22  # the height of a name
    free = low
    for name, bits in sorted(references, key=lambda reference: reference[1]):
        axes.axhline(bits, color=_REFERENCE, linewidth=0.9, linestyle=(0, (5, 4)))
        place = max(bits, free)
        free = place + gap
        axes.text(
            1.01,
            place,
            f"{name}  {bits:.2f}",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=9,
            color=_REFERENCE,
        )


def _smooth(values: Sequence[float], keep: float = 0.95) -> list[float]:
    """Return the running mean whose weights fall by ``keep`` a step."""
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        weight = keep * weight + 1 - keep
        mean += (value - mean) * (1 - keep) / weight
        out.append(mean)
    return out
