"""A test of the tests: known faults, put into a copy of the kernels, must exceed the bounds.

The library without Python is compiled once, for the level `generic` alone; each fault changes one
text in one source, recompiles that source and links again. What is run and how it is judged are
the op's own cases and the harness of the other tests.
"""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import re
import shutil

import numpy as np
import pytest

import harness
import slopes
from fault_library import COMPILER, compile_source, link
from faults import FAULTS

ROOT = pathlib.Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A copy of csrc and its objects by source; the driver is one of them."""
    folder = tmp_path_factory.mktemp("faults")
    tree = folder / "csrc"
    shutil.copytree(ROOT / "csrc", tree)
    shutil.copy(ROOT / "tests/cpp/fault_driver.cc", tree / "fault_driver.cc")
    layers = ("core", "cpu", "ops", "simd")
    sources = [str(p.relative_to(tree)) for layer in layers for p in (tree / layer).glob("*.cc")]
    sources.append("fault_driver.cc")
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        made = pool.map(lambda s: compile_source(s, tree, folder), sources)
        return tree, dict(zip(sources, made, strict=True))


def cases_of(name, dtype):
    """Small cases that the driver can run: no 1-D operands, no empty arrays."""
    least_axes = {"matmul": 1, "int8_matmul": 1, "attention": 3}.get(name, 0)
    for case in harness.OPS[name].cases:
        arguments = harness.inputs(name, case, dtype)
        arrays = [v for v in arguments.values() if isinstance(v, np.ndarray)]
        if all(0 < v.size < 1e5 for v in arrays) and min(v.ndim for v in arrays[:2]) > least_axes:
            yield case, arguments


def check_results(library, name, case, arguments, dtype):
    got = getattr(library, name)(**arguments)
    harness.check(name, got, harness.reference(name, case, dtype), f"case={case}")


def check_gradients(library, name, case, arguments, dtype):
    """As test_backward.py does, which this is a test of."""
    dys = [dy.astype(dtype) for dy in slopes.output_gradients(name, case, dtype)]
    found = getattr(library, f"{name}_backward")(arguments, *dys)
    for which in slopes.differentiable(harness.OPS[name], arguments):
        got, want = found[which].astype(np.float64), slopes.slope(name, case, dtype, which)
        slopes.compare(name, got, want, dtype, f"d{which} case={case}")


def failing_cases(library, op, dtype):
    """The cases whose results, or gradients, are out of bounds."""
    name = op.removesuffix("_backward")
    check = check_results if name == op else check_gradients
    kept, failed, seen = dict(harness.worst), [], 0
    for case, arguments in cases_of(name, dtype):
        seen += 1
        try:
            check(library, name, case, arguments, dtype)
        except (AssertionError, pytest.fail.Exception):
            failed.append(case)
    harness.worst.clear()
    harness.worst.update(kept)  # faults don't belong into the closing table
    assert seen > 3, f"only {seen} cases of {name} were run"
    return failed


def test_without_a_fault_nothing_fails(build, tmp_path):
    _, objects = build
    library = link(objects.values(), tmp_path / "right.so")
    for fault in FAULTS:
        assert not failing_cases(library, fault.op, harness.DTYPES[fault.dtype]), fault.op


def build_with(fault, build, folder):
    """The library with this fault in it."""
    original, objects = build
    tree = folder / "csrc"
    shutil.copytree(original, tree)
    path = tree / fault.file
    text = path.read_text(encoding="utf-8")
    found = len(re.findall(re.escape(fault.text), text))
    assert found, f"{fault.file} no longer has {fault.text!r}: give this fault its new place"
    path.write_text(text.replace(fault.text, fault.wrong), encoding="utf-8")
    changed = compile_source(fault.source, tree, folder)
    others = [o for s, o in objects.items() if s != fault.source]
    return link([*others, changed], folder / "wrong.so")


@pytest.fixture(scope="module")
def faulty(build, request, tmp_path_factory):
    """A library for each fault that will be asked for, on their way on all cores."""
    asking = [item for item in request.session.items if "faulty" in item.fixturenames]
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield {
            fault.name: pool.submit(build_with, fault, build, tmp_path_factory.mktemp("fault"))
            for fault in (item.callspec.params["fault"] for item in asking)
        }


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_caught(fault, faulty):
    failed = failing_cases(faulty[fault.name].result(), fault.op, harness.DTYPES[fault.dtype])
    assert failed, f"{fault.name}: every case is still within its bound"
