"""What the bench is held to: goals over the best peer of the same run, and what was reached.

A target is met when the geometric mean over its cases reaches the goal and no case falls below its
floor: as fast as the best peer, of which 5 % counts as noise. All figures come from the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

NOISE = 0.95
OWN = ("tilewright", "f32")  # engines that are no peers
Row = dict[str, Any]


def over_best_peer(row: Row) -> float | None:
    """The best peer's time over ours."""
    ratios = [ratio for engine, ratio in row["ratios"].items() if engine not in OWN]
    return min(ratios) if ratios else None


def best_peer(row: Row) -> str | None:
    """Its name."""
    ratios = {e: ratio for e, ratio in row["ratios"].items() if e not in OWN}
    return min(ratios, key=lambda e: ratios[e]) if ratios else None


def share_of_roof(row: Row) -> float | None:
    """Of the measured limit of what binds the case."""
    return float(row["roof"])


def share_of_bandwidth(row: Row) -> float | None:
    """Of the bandwidth of the memory that the operands fit in, whatever binds the case."""
    return float(row["roof_traffic"])


def speed_of_default(row: Row) -> float | None:
    """Of the default float32 product, as a share of the faster one's."""
    price = row["ratios"].get("f32")
    return 1 / price if price else None


def row_kernel(row: Row) -> float | None:
    """The ratio over 1.3, or the share of bandwidth over 80 %: whichever is nearer its goal."""
    ratio = over_best_peer(row)
    share = share_of_bandwidth(row) or 0.0
    return max(share / ROW_SHARE, ratio / ROW_RATIO if ratio else 0.0)


ROW_RATIO, ROW_SHARE = 1.3, 0.8


class Target(NamedTuple):
    """Goals of a group of cases."""

    goals: tuple[float, float]  # with 1 thread, with more
    value: Callable[[Row], float | None] = over_best_peer
    floor: float | None = NOISE  # of every case; None: the goal itself
    level: str = "amx"  # where the goals hold; elsewhere a ratio must reach 1, others don't count

    def goal(self, isa: str, threads: int) -> float | None:
        """At a level, or None where there is none."""
        if isa == self.level:
            return self.goals[threads > 1]
        return 1.0 if self.value in (over_best_peer, row_kernel) else None


MATMUL = "float32 matmul"
BF16 = "bf16 products, M >= 128"
BF16_ROOF = "bf16 1024 and 2048, share of roof"
INT8_RAW = "int8 raw, M >= 128"
INT8_DYNAMIC = "int8 dynamic with bias, M >= 128"
FEW_ROWS = {
    kind: f"M = 1 and 8, {kind}"
    for kind in ("bf16", "int8", "int4", "float32 latency", "float32 variant")
}
FEW_ROWS_BANDWIDTH = "M = 1 and 8 over 4 MB, share of bandwidth"
FEW_ROWS_DEFAULT = "M = 1 and 8, default float32's speed"
ATTENTION = {"float32": "attention float32", "bfloat16": "attention bf16"}
ATTENTION_GRAD = {"float32": "attention+grad float32", "bfloat16": "attention+grad bf16"}
ROWS = "row kernels, share of 1.3x or 80 %"
BATCHED = "batched small matmul"
SMALL_OUT = "64^3 float32 with out="

TARGETS = {
    MATMUL: Target((1.7, 1.7)),
    BF16: Target((1.3, 1.8)),
    BF16_ROOF: Target((0.45, 0.45), share_of_roof, None),
    INT8_RAW: Target((1.7, 1.7)),
    INT8_DYNAMIC: Target((2.0, 2.0)),
    **{name: Target((1.0, 1.0)) for name in FEW_ROWS.values()},
    FEW_ROWS_BANDWIDTH: Target((0.85, 0.85), share_of_bandwidth, None),
    FEW_ROWS_DEFAULT: Target((0.5, 0.5), speed_of_default, None),
    ATTENTION["float32"]: Target((1.8, 1.8)),
    ATTENTION["bfloat16"]: Target((2.5, 2.5)),
    ATTENTION_GRAD["float32"]: Target((2.0, 2.0)),
    ATTENTION_GRAD["bfloat16"]: Target((4.0, 4.0)),
    ROWS: Target((1.0, 1.0), row_kernel, NOISE / ROW_RATIO),
    BATCHED: Target((1.3, 1.3)),
    SMALL_OUT: Target((1 / 1.1, 1 / 1.1), floor=NOISE / 1.1),
}


class Reached(NamedTuple):
    """What a run's cases made of a target."""

    name: str
    cases: int
    mean: float
    worst: float
    where: str  # the worst case
    goal: float
    floor: float

    @property
    def met(self) -> bool:
        """Mean and worst case both."""
        return self.mean >= self.goal and self.worst >= self.floor


def reached(run: dict[str, Any]) -> list[Reached]:
    """Every target that this run has cases of, and a goal for."""
    found = []
    for name, target in TARGETS.items():
        goal = target.goal(run["isa"], run["threads"])
        values = _values(name, target, run["rows"])
        if goal is None or not values:
            continue
        worst, where = min(values)
        mean = geometric_mean(value for value, _ in values)
        floor = goal if target.floor is None else target.floor
        found.append(Reached(name, len(values), mean, worst, where, goal, floor))
    return found


def _values(name: str, target: Target, rows: Iterable[Row]) -> list[tuple[float, str]]:
    values = []
    for row in rows:
        if name in row.get("targets", ()) and "error" not in row:
            value = target.value(row)
            if value is not None:
                values.append((value, f"{row['op']} {row['shape']}"))
    return values


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def table(run: dict[str, Any]) -> str:
    """The targets of a run, line by line."""
    threads = f"{run['threads']} thread" + "s" * (run["threads"] > 1)
    lines = [f"targets, {run['isa']}, {threads}:"]
    lines.append(f"  {'':42} {'cases':>5} {'mean':>6} {'goal':>6} {'worst':>6}")
    for r in reached(run):
        verdict = "met   " if r.met else "missed"
        lines.append(
            f"  {r.name:42} {r.cases:5d} {r.mean:6.2f} {r.goal:6.2f} {r.worst:6.2f}  {verdict} "
            f" worst: {r.where}"
        )
    failed = [row for row in run["rows"] if "error" in row]
    lines += [f"  no answer: {row['op']} {row['shape']}: {row['error']}" for row in failed]
    return "\n".join(lines)
