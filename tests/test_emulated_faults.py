"""A test of the tests on emulated CUDA: each fault of emulated_faults/ must be seen.

A fault is planted in a copy of csrc, the one source it concerns is compiled as the checked build
compiles it, and the extension is linked again with that object. The tests of the op then run in a
process of their own, which must fail and say why.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

from emulated_faults import FAULTS
from tilewright import _core

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXTENSION = pathlib.Path(os.environ["TILEWRIGHT_EMULATED"]).resolve()
BUILD = EXTENSION.parent

pytestmark = [
    pytest.mark.skipif(not _core.emulator.checked(), reason="findings are the checked build's"),
    pytest.mark.skipif(
        not (BUILD / "compile_commands.json").exists(), reason="not beside its build files"
    ),
]


def run(command):
    """Run it in the build folder, and return what it printed; a failure shows that."""
    done = subprocess.run(command, cwd=BUILD, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def link_command():
    cache = (BUILD / "CMakeCache.txt").read_text(encoding="utf-8")
    (ninja,) = [
        line.partition("=")[2]
        for line in cache.splitlines()
        if line.startswith("CMAKE_MAKE_PROGRAM:")
    ]
    last = run([ninja, "-t", "commands", EXTENSION.name]).splitlines()[-1]
    return [word for word in shlex.split(last) if word not in (":", "&&")]


def compile_command(source):
    for entry in json.loads((BUILD / "compile_commands.json").read_text(encoding="utf-8")):
        if entry["file"] == str(ROOT / "csrc/cuda" / source) and "_checked" in entry["output"]:
            return shlex.split(entry["command"])
    raise LookupError(f"{BUILD} has no command for {source}")


def build(source, csrc, folder, link_command):
    """The extension with this source of another csrc."""
    command = [word.replace(str(ROOT / "csrc"), str(csrc)) for word in compile_command(source)]
    made = folder / f"{source}.o"
    command[command.index("-o") + 1] = str(made)
    command.append("-w")  # a fault may leave a variable unused
    run(["ccache", *command] if shutil.which("ccache") else command)
    extension = folder / EXTENSION.name
    link = list(link_command)
    link[link.index("-o") + 1] = str(extension)
    kernels = next(i for i, word in enumerate(link) if word.endswith("kernels_checked.a"))
    archive = folder / "kernels.a"
    shutil.copy(BUILD / link[kernels], archive)
    run(["ar", "r", archive, made])
    link[kernels] = str(archive)
    run(link)
    return extension


def run_tests(fault, folder, link_command):
    """Plant the fault, and run the tests that must see it: their exit code, and what they print."""
    csrc = folder / "csrc"
    csrc.mkdir()
    for part in (ROOT / "csrc").iterdir():
        (csrc / part.name).symlink_to(part)
    (csrc / "cuda").unlink()
    shutil.copytree(ROOT / "csrc/cuda", csrc / "cuda")
    path = csrc / "cuda" / fault.file
    text = path.read_text(encoding="utf-8")
    assert fault.text in text, f"{fault.file} has no {fault.text!r} now: where does the fault go?"
    path.write_text(text.replace(fault.text, fault.wrong), encoding="utf-8")
    extension = build(fault.source, csrc, folder, link_command)
    tests = [f"tests/test_{name}.py" for name in fault.tests]
    options = ["-q", "-x", "-p", "no:cacheprovider", "--full", "-k", fault.test]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        env={
            **os.environ,
            "TILEWRIGHT_EMULATED": str(extension),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # a third of the time
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def outcomes(request, link_command, tmp_path_factory):
    """What came of each selected fault, as futures: every CPU works on one."""
    tests = [i for i in request.session.items if "outcomes" in getattr(i, "fixturenames", ())]
    pool = concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    yield {
        fault: pool.submit(run_tests, fault, tmp_path_factory.mktemp("fault"), link_command)
        for fault in (t.callspec.params["fault"] for t in tests)
    }
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_seen(fault, outcomes):
    code, printed = outcomes[fault].result()
    assert code == 1, f"no test failed\n{printed}"
    assert fault.shows in printed, f"{fault.shows!r} is not in\n{printed}"
