"""The picture: a roofline of the run, every case below the measured limits of the machine.

Across: operations for each byte that must move; up: operations a second. A case lies below the
slope of the memory that its data fits in and below the level of its dtype's arithmetic (Williams,
Waterman & Patterson, "Roofline", 2009). Filled marks are ours, hollow ones the best peer's.
"""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

from tilewright.bench.targets import over_best_peer

# Okabe & Ito's colours: told apart by everyone, and in grey.
COLOURS = {"float32": "#0072B2", "bfloat16": "#D55E00", "int8": "#009E73"}
ROOFS = {
    "float32": ("gflops", "float32"),
    "bfloat16": ("bf16_gflops", "bfloat16"),
    "int8": ("int8_gops", "int8"),
}
FAMILIES = {  # mark -> name, ops
    "o": ("products", {"matmul", "linear", "linear_gelu", "int8_matmul", "qmatmul", "weight_only"}),
    "s": ("attention", {"attention", "attention+grad", "decode", "attention_varlen"}),
}
REST = "^", "row kernels"


def draw(results: dict[str, Any], file: Path) -> None:
    """Draw the run of most threads into a PNG or SVG, as the file's suffix says.

    Raises:
        SystemExit: matplotlib is missing.
    """
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install 'tilewright[bench]'") from None
    matplotlib.use("Agg")
    plt = importlib.import_module("matplotlib.pyplot")
    run = max(results["runs"], key=lambda r: r["threads"])
    figure, axis = plt.subplots(figsize=(9.5, 6.0), layout="constrained")
    rows = [row for row in run["rows"] if "error" not in row and row["gflops"] > 0]
    intensity = [row["gflops"] / row["gbs"] for row in rows] or [1.0]
    left, right = min(intensity) / 6, max(intensity) * 3  # room for the names on the left
    axis.set(xscale="log", yscale="log", xlim=(left, right))
    _draw_roofs(axis, run["roofline"], left, right)
    for row in rows:
        _draw_case(axis, row)
    lowest = min([row["gflops"] / max(1.0, over_best_peer(row) or 1.0) for row in rows] or [1.0])
    axis.set_ylim(bottom=lowest / 2)
    axis.set_xlabel("operations for each byte that must move")
    axis.set_ylabel("GFLOP/s  (int8: GOP/s)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(handles=_legend(matplotlib), loc="lower right", frameon=False, fontsize=9)
    threads = f"{run['threads']} thread" + "s" * (run["threads"] > 1)
    figure.suptitle(f"{run['isa']}, {threads}: measured limits and cases", x=0.01, ha="left")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _draw_roofs(axis: Any, roof: dict[str, Any], left: float, right: float) -> None:
    """The level of each dtype's arithmetic, and the slopes of the memories up to the highest."""
    levels = {dtype: roof.get(key, 0.0) for dtype, (key, _) in ROOFS.items()}
    top = max(levels.values())
    slopes = {name: m["gbs"] for name, m in roof.get("memory", {}).items()}
    for gbs, names in _alike(slopes):
        ridge = top / gbs
        axis.plot([left, ridge], [left * gbs, top], color="0.65", lw=1, zorder=1)
        axis.text(
            1.15 * left, 1.3 * left * gbs, f"{', '.join(names)} {gbs:.0f} GB/s", fontsize=8,
            color="0.35", rotation=math.degrees(math.atan(gbs)), rotation_mode="anchor",
            transform_rotates_text=True,
        )  # fmt: skip
    fastest = max(slopes.values(), default=top)
    for dtype, rate in levels.items():
        if rate:
            axis.plot([rate / fastest, right], [rate, rate], color=COLOURS[dtype], lw=1.2, ls="--")
            axis.annotate(
                f"{ROOFS[dtype][1]}: {rate:.0f}", (right, rate), xytext=(0, 3), ha="right",
                textcoords="offset points", fontsize=9, color=COLOURS[dtype],
            )  # fmt: skip
    axis.set_ylim(top=top * 2)


def _alike(slopes: dict[str, float]) -> list[tuple[float, list[str]]]:
    """Bandwidths that a picture can tell apart, and whose they are."""
    found: list[tuple[float, list[str]]] = []
    for name, gbs in slopes.items():
        if found and 0.8 < gbs / found[-1][0] < 1.25:
            found[-1][1].append(name)
        else:
            found.append((gbs, [name]))
    return found


def _draw_case(axis: Any, row: dict[str, Any]) -> None:
    """Ours, and below or above it on a thin line the fastest peer."""
    x, ours = row["gflops"] / row["gbs"], row["gflops"]
    colour = COLOURS[row["arithmetic"]]
    mark = next((m for m, (_, ops) in FAMILIES.items() if row["op"] in ops), REST[0])
    ratio = over_best_peer(row)
    if ratio:
        theirs = ours / ratio
        axis.plot([x, x], [ours, theirs], color=colour, lw=0.7, alpha=0.6, zorder=2)
        axis.plot(x, theirs, mark, color=colour, mfc="white", ms=5, mew=0.9, zorder=3)
    axis.plot(x, ours, mark, color=colour, ms=6, mec="white", mew=0.4, zorder=4)


def _legend(matplotlib: Any) -> list[Any]:
    line = matplotlib.lines.Line2D
    marks = {mark: name for mark, (name, _) in FAMILIES.items()} | dict([REST])
    entries = [line([], [], color=c, lw=0, marker="o", label=d) for d, c in COLOURS.items()]
    entries += [line([], [], color="0.3", lw=0, marker=m, label=n) for m, n in marks.items()]
    return [*entries, line([], [], color="0.3", lw=0, marker="o", mfc="white", label="best peer")]
