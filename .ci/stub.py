"""Write python/tilewright/_core.pyi from the built module; with --check, fail if it is stale.

Run where `tilewright` is importable and the dev extra is installed: `python .ci/stub.py [--check]`.
"""

import pathlib
import re
import subprocess
import sys
import tempfile

STUB = pathlib.Path(__file__).parents[1] / "python" / "tilewright" / "_core.pyi"
REPLACE = {
    r"numpy\.ndarray(\[typing\.Any, numpy\.dtype\[typing\.Any\]\])? \| None": "_Array",
    r"typing\.SupportsFloat \| typing\.SupportsIndex": "float",
    r"typing\.SupportsInt \| typing\.SupportsIndex": "int",
    r"collections\.abc\.Sequence": "Sequence",
    r"(import (collections\.abc|numpy|typing)\n)+": (
        "import typing\nfrom collections.abc import Sequence\n\n"
        "from numpy.typing import NDArray\n\n"
        "# None where the argument may be absent; the op's own checks say where it may.\n"
        "_Array = NDArray[typing.Any] | None\n"
    ),
    r"__all__: list\[str\] = \[.*?\]\n": "",
    r" -> list:": " -> list[typing.Any]:",
    r": list([,)])": r": list[typing.Any]\1",
    r" -> tuple:": " -> tuple[typing.Any, ...]:",
    r" -> dict:": " -> dict[str, typing.Any]:",
    r"def (matmul|empty|empty_like|result_dtype)\([a-z_0-9, *]*\):": (
        r"def \1(*args: typing.Any) -> typing.Any:"
    ),
}


def generate() -> str:
    """Return the stub's text."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pybind11_stubgen", "tilewright._core", "-o", folder]
        subprocess.run([*command, "--exit-code"], check=True, stderr=subprocess.DEVNULL)
        text = (pathlib.Path(folder) / "tilewright" / "_core.pyi").read_text()
    for pattern, text_for in REPLACE.items():
        text = re.sub(pattern, text_for, text, flags=re.DOTALL)
    for command in (["format", "-"], ["check", "--fix", "-q", "--select", "I,PIE,UP", "-"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(STUB)]
        text = subprocess.run(ruff, input=text, text=True, check=True, capture_output=True).stdout
    return text


fresh = generate()
if "--check" not in sys.argv:
    STUB.write_text(fresh)
elif STUB.read_text() != fresh:
    sys.exit(f"{STUB.name} is stale: run `python .ci/stub.py` and commit it")
