"""Two JSON files of the bench -> what changed: python bench/compare.py before.json after.json

The ratio is the later best time over the earlier one: above 1 is slower. A row counts as changed
when its best times differ by more than the noise that either run showed (how far its median lay
above its best, at least 5 %) and the medians moved the same way by 5 % or more. Exit status 1 if
any row is slower, 2 if the files have no row in common.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

LEAST_NOISE = 0.05


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args(argv)
    before, after = (rows(json.loads(f.read_text())) for f in (options.before, options.after))
    shared = [key for key in after if key in before]
    if not shared:
        print("no case is in both files")
        return 2
    verdicts = {key: judge(before[key], after[key]) for key in shared}
    columns = ("op", 18), ("shape", 25), ("isa", 11), ("T", 2), ("before ms", 10), ("after ms", 10)
    print(*(f"{name:{width}}" for name, width in columns), " ratio  noise")
    for key, (ratio, noise, verdict) in verdicts.items():
        op, shape, _, isa, threads = key
        old, new = before[key]["min"] * 1e3, after[key]["min"] * 1e3
        print(f"{op:18} {shape:25} {isa:11} {threads:2d} {old:10.4f} {new:10.4f}", end=" ")
        print(f"{ratio:6.2f} {noise:6.0%} {verdict}")
    mean = math.exp(sum(math.log(ratio) for ratio, _, _ in verdicts.values()) / len(verdicts))
    words = [word for *_, word in verdicts.values()]
    counts = {word: words.count(word) for word in ("slower", "faster", "same")}
    print(f"geometric mean {mean:.3f}; " + ", ".join(f"{n} {word}" for word, n in counts.items()))
    for key in set(before) ^ set(after):
        print("only in one file:", *key)
    return 1 if counts["slower"] else 0


def rows(results) -> dict:
    """(op, shape, dtype, isa, threads) -> tilewright's timing."""
    return {
        (row["op"], row["shape"], row["dtype"], run["isa"], run["threads"]): row["engines"][
            "tilewright"
        ]
        for run in results["runs"]
        for row in run["rows"]
        if "error" not in row
    }


def judge(before, after) -> tuple[float, float, str]:
    """Ratio of best times, the noise it is held against, and "slower", "faster" or "same"."""
    ratio = after["min"] / before["min"]
    medians = after["median"] / before["median"]
    noise = max(LEAST_NOISE, before["spread"], after["spread"])
    if ratio > 1 + noise and medians > 1 + LEAST_NOISE:
        return ratio, noise, "slower"
    if 1 / ratio > 1 + noise and 1 / medians > 1 + LEAST_NOISE:
        return ratio, noise, "faster"
    return ratio, noise, "same"


if __name__ == "__main__":
    raise SystemExit(main())
