"""Writes the table of elementary functions in accuracy.md from what tests/cpp/test_accuracy prints.

    (RUN; RUN_UNDER_QEMU) | python docs/functions.py docs/accuracy.md

Of a level that two machines have, it shows the worse one.
"""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Iterable

LINE = re.compile(r" {8}(\S.*?) +(\w+) +([\d.]+) ulp, claimed ([\d.]+), at \S+")
BEGIN, END = "<!-- functions -->\n", "<!-- end of functions -->\n"
LEVELS = ("generic", "avx2", "avx512", "neon")


def table(lines: Iterable[str]) -> str:
    """Return the Markdown table: function x level, the largest error seen in ulp and the claim."""
    worst: dict[tuple[str, str], tuple[float, float]] = {}
    for line in lines:
        if found := LINE.fullmatch(line.rstrip("\n")):
            name, level, ulp, claim = found.groups()
            new = (float(ulp), float(claim))
            worst[name, level] = max(worst.get((name, level), new), new)
    levels = [level for level in LEVELS if any(level == of for _, of in worst)]
    rows = [f"| function | {' | '.join(levels)} |", "|---|" + "--:|" * len(levels)]
    for name in dict.fromkeys(name for name, _ in worst):
        cells = [worst.get((name, level)) for level in levels]
        rows.append(
            f"| {name} | " + " | ".join(f"{c[0]:.2f} ≤ {c[1]}" if c else "" for c in cells) + " |"
        )
    return "\n".join(rows) + "\n"


def main() -> None:
    """Replace what stands between the marks."""
    path = pathlib.Path(sys.argv[1])
    above, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, below = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{path}: the marks are missing")
    text = f"{above}{begin}\n{table(sys.stdin)}\n{end}{below}"
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
