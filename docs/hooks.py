"""Pages that mkdocs builds from the installed package: what the docstrings say is said once.

    reference/*.md   every public name, from its docstring      environment.md   from core/env.cc
    cxx.md, benches.md, tests.md     READMEs of those folders   cpp-guide.md     examples/cpp/

The site thus shows the code that is installed where it is built: `pip install '.[docs]'`, then
`mkdocs build --strict`.
"""

from __future__ import annotations

import inspect
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from mkdocs.structure.files import File, Files

import tilewright as tw
from tilewright import _core
from tilewright.registry import OPS

ROOT = pathlib.Path(__file__).parents[1]
SECTION = re.compile(
    r"(Args|Arguments|Attributes|Returns|Raises|Yields|Example|Examples|Source):(.*)"
)
LISTS = ("Args", "Arguments", "Attributes")


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages (an event of mkdocs)."""
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def pages() -> dict[str, str]:
    """Return path → Markdown."""
    knobs = ("options", "set_options", "set_matmul_precision", "set_num_threads", "get_num_threads")
    knobs += ("set_isa", "isas", "pack", "compile", "explain", "stats", "memory_stats", "trim")
    knobs += ("get_include", "get_cmake_dir")
    arrays = ("tensor", "Tensor", "concatenate", "stack", "split", "where", "no_grad")
    arrays += ("manual_seed", "save", "load", "load_metadata", "QuantizedArray", "KVCache")
    random = ("get_state", "set_state")
    errors = ("ShapeError", "DtypeError", "DeviceError", "UnsupportedError", "FormatError")
    return {
        "reference/ops.md": page(
            "Ops",
            "Every op takes NumPy arrays, anything with `__dlpack__`, or `tw.Tensor`, in any "
            "strides, and answers in kind.",
            members(tw, sorted(OPS), "tw."),
        ),
        "reference/arrays.md": page(
            "Arrays, files, caches",
            "",
            members(tw, [*arrays, *errors], "tw.") + members(tw.random, random, "random."),
        ),
        "reference/knobs.md": page("Knobs and counters", "", members(tw, knobs, "tw.")),
        "reference/nn.md": page(
            "tilewright.nn", inspect.getdoc(tw.nn) or "", members(tw.nn, public(tw.nn), "nn.")
        ),
        "reference/optim.md": page(
            "tilewright.optim",
            inspect.getdoc(tw.optim) or "",
            members(tw.optim, public(tw.optim), "optim."),
        ),
        "reference/models.md": page(
            "tilewright.models",
            inspect.getdoc(tw.models) or "",
            members(tw.models, public(tw.models), "models."),
        ),
        "environment.md": environment(),
        "add-an-op.md": add_an_op(),
        "cxx.md": included("csrc/README.md"),
        "benches.md": included("bench/README.md"),
        "tests.md": included("tests/README.md"),
        "cpp-guide.md": cpp_guide(),
    }


def public(module: Any) -> list[str]:
    """Names of classes and functions that a package offers."""
    names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    return sorted((n for n in names if callable(getattr(module, n))), key=str.lower)


def members(owner: Any, names: Iterable[str], prefix: str) -> list[tuple[str, Any]]:
    """Pair those names that exist with what they name."""
    return [(prefix + name, getattr(owner, name)) for name in names if hasattr(owner, name)]


def page(title: str, introduction: str, entries: list[tuple[str, Any]]) -> str:
    """Put a page together: a heading, then an entry for each name."""
    parts = [f"# {title}", markdown(introduction)]
    for name, what in entries:
        parts += [f"## {name.rpartition('.')[2]}", f"```python\n{signature(name, what)}\n```"]
        parts.append(markdown(inspect.getdoc(what) or ""))
    return "\n\n".join(parts) + "\n"


def signature(name: str, what: Any) -> str:
    """Write a call as users type it: without annotations, wrapped when long."""
    try:
        parameters = list(inspect.signature(what).parameters.values())
    except (TypeError, ValueError):
        return name
    bare = inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters])
    text = f"{name}{bare}"
    if len(text) <= 88:
        return text
    return f"{name}(\n    " + ",\n    ".join(str(bare)[1:-1].split(", ")) + ",\n)"


def markdown(docstring: str) -> str:
    """Turn a Google-style docstring into Markdown: sections, and argument lists as bullets."""
    lines, section = [], ""
    for line in docstring.splitlines():
        if head := SECTION.fullmatch(line):
            section = head[1]
            lines += ["", f"**{section}**{':' if head[2] else ''}{head[2]}", ""]
        elif section in LISTS and (entry := re.fullmatch(r" {4}(\*{0,2}[\w, ]+): (.*)", line)):
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        elif section and line.startswith("    ") and section not in ("Example", "Examples"):
            lines.append("  " * (section in LISTS) + line.strip())
        else:
            section = section if not line.strip() or section in ("Example", "Examples") else ""
            lines.append(line)
    return re.sub(r"``(.+?)``", r"`\1`", "\n".join(lines))


def environment() -> str:
    """Tabulate the environment variables, as the library itself explains them."""
    rows = [f"| `{name}` | {meaning} |" for name, _, meaning in _core.environment()]
    head = ["# Environment variables", "", "Read once, when first needed.", ""]
    return "\n".join([*head, "| variable | meaning |", "|---|---|", *rows]) + "\n"


def add_an_op() -> str:
    """Take the recipe from csrc/README.md, and show a small op in full."""
    recipe = re.search(r"## How to add an op\n(.*?)\n## ", included("csrc/README.md"), re.DOTALL)
    assert recipe
    source = (ROOT / "python/tilewright/ops/embedding.py").read_text()
    return f"""# How to add an op
{recipe[1]}
No test and no bench is edited: they walk the registry. A new test must fail where the op is wrong;
`tests/test_seeded_faults.py` shows how that is checked.

## A small op in full

```python
{source}```
"""


def cpp_guide() -> str:
    """Show the example project, which is built against an installed tilewright in CI."""
    cmake, main, ops = (
        (ROOT / path).read_text()
        for path in (
            "examples/cpp/CMakeLists.txt",
            "examples/cpp/main.cc",
            "csrc/include/tilewright/ops.h",
        )
    )
    return f"""# Use it from C++

The library knows nothing of Python: views over memory that you own go in, as plain structs, and
answers are written where you say. Errors are exceptions that name the op, the argument, what is
required and what came. A program of its own, `examples/cpp/`:

```cmake
{cmake}```

```cpp
{main}```

## Every op: tilewright/ops.h

```cpp
{ops}```
"""


def included(path: str) -> str:
    """Take over a file of the repository; its links into the tree become plain text."""
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]+\)", r"\1", (ROOT / path).read_text())
