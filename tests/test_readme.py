"""The README tells the truth: its Python blocks run, and print what is shown below them."""

from __future__ import annotations

import doctest
import os
import pathlib
import re
import subprocess
import sys

import pytest

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\s*^```text\n(.*?)^```)?", re.MULTILINE | re.DOTALL)


def blocks():
    text = README.read_text(encoding="utf-8") + "\n"
    return [pytest.param(*m.groups(), id=f"block{i}") for i, m in enumerate(BLOCK.finditer(text))]


@pytest.mark.parametrize(("code", "shown"), blocks())
def test_block_prints_what_is_shown(code, shown, tmp_path):
    """Spaces don't count, and ``...`` in the shown text stands for anything."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": import_path()},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    if shown is not None and not doctest.OutputChecker().check_output(shown, done.stdout, flags):
        pytest.fail(f"shown:\n{shown}\nprinted:\n{done.stdout}", pytrace=False)


def import_path():
    """Absolute, since the block runs in a folder of its own."""
    return os.pathsep.join(str(pathlib.Path(p).resolve()) for p in sys.path if p)


def commands():
    """The lines of the shell blocks that are marked by a comment above them."""
    text = README.read_text(encoding="utf-8")
    return dict(re.findall(r"<!-- (\w+) -->\n+```sh\n(.*?)\n```", text, re.DOTALL))


def test_the_two_commands_are_one_line_each():
    found = commands()
    assert {"demo", "tests"} <= set(found)
    assert all("\n" not in line for line in found.values())


def test_links_inside_the_repository_exist():
    text = README.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    missing = [t for t in targets if not (README.parent / t).exists()]
    assert not missing, missing
