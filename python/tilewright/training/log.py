"""The log of a run: one JSON object a line, written as things happen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Log:
    """Appends entries {"kind": ..., "step": ..., ...} to a file.

    A run that continues from an earlier checkpoint first forgets what came after it (``rewind``).
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one entry."""
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")

    def entries(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Return what was written, of one kind or all; a line that a crash cut off is none."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            whole = isinstance(entry, dict) and type(entry.get("step")) is int and "kind" in entry
            if whole and kind in (None, entry["kind"]):
                found.append(entry)
        return found

    def rewind(self, step: int) -> None:
        """Drop every entry after ``step``."""
        kept = [entry for entry in self.entries() if entry["step"] <= step]
        aside = self.path.with_name(self.path.name + ".new")
        aside.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        aside.replace(self.path)
