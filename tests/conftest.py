"""Fixtures of all tests: ISA level, dtype, generator, threads; the header and the closing table."""

from __future__ import annotations

import gc
import itertools
import operator
import os
import pathlib
import sys
import zlib

import numpy as np
import pytest

import cupy_stand_in
import emulated

# The generic tests on a device: on emulated CUDA, whose extension must be in place before
# tilewright is imported, or on a GPU. Both: on a GPU that CuPy's stand-in makes of the emulator.
if EXTENSION := os.environ.get("TILEWRIGHT_EMULATED"):
    emulated.load(EXTENSION)
    if os.environ.get("TILEWRIGHT_TEST_DEVICE") == "cuda":
        sys.modules["cupy"] = cupy_stand_in.module()

import harness
import on_device
from tilewright import _core
from tilewright.registry import OPS

if os.environ.get("TILEWRIGHT_TEST_DEVICE") == "cuda":
    import on_cuda

    on_device.use(on_cuda.DEVICE, on_cuda.KIND, on_cuda.to_device)
    collect_ignore_glob = ["test_emulated*.py"]
elif EXTENSION:
    on_device.use(emulated.DEVICE, emulated.EmulatedArray, emulated.to_device)
else:
    collect_ignore_glob = ["test_emulated*.py"]
if on_device.device():
    on_device.wrap_ops()


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=1, help="seed of all random test data")
    parser.addoption("--accuracy", default="", help="write the closing table to this Markdown file")
    parser.addoption("--isa", default="", help="only these ISA levels, comma-separated")
    parser.addoption("--full", action="store_true", help="every case in every dtype and layout")


def pytest_configure(config):
    harness.seed = config.getoption("--seed")


def pytest_report_header(config):
    skipped = ", ".join(harness.SKIPPED_ISAS) or "none"
    version, threads = _core.build_info()["version"], _core.get_num_threads()
    return (
        f"tilewright {version} on {cpu_name()}, {threads} threads; levels "
        f"{', '.join(levels(config))} (not on this machine: {skipped}); --seed {harness.seed}"
    )


def cpu_name():
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return "this machine"


def levels(config):
    if on_device.device():
        return ["generic"]  # kernels of the device have no levels
    wanted = [name for name in config.getoption("--isa").split(",") if name]
    unknown = set(wanted) - set(harness.SUPPORTED_ISAS)
    if unknown:
        raise pytest.UsageError(f"--isa: not supported here: {', '.join(sorted(unknown))}")
    return wanted or harness.SUPPORTED_ISAS


@pytest.hookimpl(trylast=True)  # the levels of a case one after another: they share its references
def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", levels(metafunc.config), indirect=True)


# Levels that are another one's but for the kernels of some ops: only what calls them is run there.
PRODUCTS = {"matmul", "int8_matmul", "qmatmul"}
PARTIAL_LEVELS = {
    "avx512_vnni": {"int8_matmul", "qmatmul"},
    "avx512_bf16": {"matmul"},
    "amx": PRODUCTS | {"attention", "attention_varlen"},
    "neon_dot": {"int8_matmul", "qmatmul"},
}
# Files of tests that meet no product, or only those of other tests again.
WITHOUT_PRODUCTS = ("kvcache", "dropout", "optim", "test_quantize", "differential_q")


def concerns_level(item):
    """Whether the test's op has kernels of its own at the test's level."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    ops = PARTIAL_LEVELS.get(parameters.get("isa"))
    if ops is None or item.config.getoption("--isa"):
        return True
    stem, name = item.path.stem, parameters.get("name")
    if any(word in stem for word in WITHOUT_PRODUCTS):
        return False
    if "attention" in stem and "attention" not in ops:
        return False
    if "backward" in stem:  # gradients of products are products
        return name in ops - PRODUCTS
    return name not in OPS or name in ops


def is_turn(item):
    """Whether the test's level is the one that meets this case in this dtype, or in this layout.

    Without --full: every level runs every case in float32, and has its share of the others; levels
    that replace a few kernels run all of theirs, and a device, which is one level, runs a third.
    """
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    isa, variant = (parameters.get(n) for n in ("isa", "how" if "how" in parameters else "dtype"))
    exempt = isa in (None, *PARTIAL_LEVELS) or variant in (None, harness.DTYPES["float32"])
    if exempt or not {"name", "case"} <= parameters.keys() or item.config.getoption("--full"):
        return True
    whole = [level for level in levels(item.config) if level not in PARTIAL_LEVELS]
    key = (parameters["name"], parameters["case"], str(variant))
    turns = 3 if on_device.device() else len(whole)
    return zlib.crc32(repr(key).encode()) % turns == whole.index(isa)


def pytest_collection_modifyitems(config, items):
    wanted = [concerns_level(item) and is_turn(item) for item in items]
    config.hook.pytest_deselected(items=list(itertools.compress(items, map(operator.not_, wanted))))
    items[:] = itertools.compress(items, wanted)
    # Tens of thousands of tests live to the end: no collection of garbage need walk through them.
    gc.collect()
    gc.freeze()


@pytest.fixture
def isa(request):
    """The test runs on this level; the one from before is active again afterwards."""
    before = next(name for name, _, _, active in _core.isa_levels() if active)
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(before)


@pytest.fixture(params=harness.DTYPES)
def dtype(request):
    return harness.DTYPES[request.param]


@pytest.fixture
def rng(request):
    return harness.rng_for(request.node.nodeid)


@pytest.fixture
def threads():
    """A setter of the thread count; restored afterwards."""
    before = _core.get_num_threads()
    yield _core.set_num_threads
    _core.set_num_threads(before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        report.sections.append(("random data", f"--seed {harness.seed}"))
    return report


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # of pytest -n 2, whose table is one
        session.config.workeroutput["worst"] = harness.worst


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for name, found in getattr(node, "workeroutput", {}).get("worst", {}).items():
        harness.worst[name] = max(tuple(found), harness.worst.get(name, (-1.0, "")))


def pytest_terminal_summary(terminalreporter):
    if not harness.worst:
        return
    terminalreporter.section("largest error / bound")
    for name, (ratio, where) in sorted(harness.worst.items()):
        bar = "#" * int(np.clip(np.ceil(ratio * 20), 0, 20))
        terminalreporter.write_line(f"{name:<32} {ratio:7.3f}  {bar:<20}  {where}")
    if path := terminalreporter.config.getoption("--accuracy"):
        write_accuracy(pathlib.Path(path), levels(terminalreporter.config))


def write_accuracy(path, isas):
    """Replace the table of docs/accuracy.md."""
    rows = [
        f"| {name} | {ratio:.3f} | {where} |"
        for name, (ratio, where) in sorted(harness.worst.items())
    ]
    table = [
        f"Measured on {cpu_name()}, levels {', '.join(isas)}, seed {harness.seed}.",
        "",
        "| op and dtype | worst error / bound | where |",
        "|---|--:|---|",
        *rows,
    ]
    above, mark, _ = path.read_text().partition("<!-- table -->\n")
    path.write_text(f"{above}{mark}\n" + "\n".join(table) + "\n")
