"""The picture: what each engine reaches, beside the measured limit of the machine."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

# Okabe & Ito's colours: told apart by everyone, and in grey.
COLOURS = {"tilewright": "#0072B2", "numpy": "#E69F00", "torch": "#999999"}
NAMES = {"tilewright": "tilewright", "numpy": "NumPy (OpenBLAS)", "torch": "PyTorch"}
ARITHMETIC = {
    ("matmul", "512x512x512 nn"): "matmul\n512³",
    ("matmul", "1024x1024x1024 nn"): "matmul\n1024³",
    ("matmul", "2048x2048x2048 nn"): "matmul\n2048³",
    ("linear_gelu", "512x768x3072 packed"): "linear + gelu\nM 512",
    ("attention", "8x12x512x64 causal"): "attention\ncausal, T 512",
    ("attention+grad", "8x12x512x64 causal"): "attention\nwith gradients",
}
TRAFFIC = {
    ("layernorm", "4096x768"): "layernorm\n4096×768",
    ("layernorm+grad", "4096x768"): "layernorm\nwith gradients",
    ("softmax", "4096x1024"): "softmax\n4096×1024",
    ("gelu", "4096x3072"): "gelu\n4096×3072",
}


def draw(results: dict[str, Any], file: Path) -> None:
    """Draw the run of most threads (the first level measured) into a PNG.

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
    figure, axes = plt.subplots(
        1,
        2,
        figsize=(11.5, 4.2),
        width_ratios=[len(ARITHMETIC), len(TRAFFIC)],
        layout="constrained",
    )
    _panel(axes[0], run, ARITHMETIC, "gflops", "GFLOP/s", "Bound by arithmetic")
    axes[0].axhline(run["roofline"]["gflops"], color="black", lw=1, ls="--")
    axes[0].annotate(
        f"measured limit: {run['roofline']['gflops']:.0f} GFLOP/s",
        (0.995, run["roofline"]["gflops"]), xycoords=("axes fraction", "data"),
        xytext=(0, 4), textcoords="offset points", ha="right", fontsize=9,
    )  # fmt: skip
    _panel(axes[1], run, TRAFFIC, "gbs", "GB/s", "Bound by memory")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False)
    threads = f"{run['threads']} thread" + "s" * (run["threads"] > 1)
    figure.suptitle(f"float32, {run['isa']}, {threads}: higher is better", x=0.01, ha="left")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _panel(
    axis: Any, run: dict[str, Any], chosen: dict[Any, str], key: str, unit: str, title: str
) -> None:
    rows = [
        row for row in run["rows"] if (row["op"], row["shape"]) in chosen and "error" not in row
    ]
    width = 0.27
    for engine, colour in COLOURS.items():
        places, heights = [], []
        for place, row in enumerate(rows):
            present = [e for e in COLOURS if e in row["engines"]]
            if engine in present:
                ours, theirs = row["engines"]["tilewright"]["min"], row["engines"][engine]["min"]
                places.append(place + (present.index(engine) - (len(present) - 1) / 2) * width)
                heights.append(row[key] * ours / theirs)
        if places:
            bars = axis.bar(places, heights, width * 0.92, color=colour, label=NAMES[engine])
            axis.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
    axis.set_xticks(
        range(len(rows)), [chosen[row["op"], row["shape"]] for row in rows], fontsize=8.5
    )
    axis.set_ylabel(unit)
    axis.set_title(title, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="x", length=0)
    axis.margins(y=0.12)
