"""The C++ library in the installed package: headers, find_package, the example program."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest

import tilewright as tw

ROOT = pathlib.Path(__file__).resolve().parent.parent


def installed():
    try:
        return pathlib.Path(tw.get_include())
    except tw.UnsupportedError:
        pytest.skip("a source tree: no C++ library is installed beside the package")


def test_the_headers_are_the_source_trees():
    folder = installed() / "tilewright"
    names = sorted(p.name for p in folder.iterdir())
    assert "ops.h" in names
    assert "tilewright.h" in names
    for name in names:
        source = ROOT / "csrc/include/tilewright" / name
        assert (folder / name).read_text() == source.read_text(), f"{name}: install again"


def test_without_an_install_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(tw.cpp._core, "__file__", str(tmp_path / "_core.so"))
    for function in (tw.get_include, tw.get_cmake_dir):
        with pytest.raises(tw.UnsupportedError, match=f"{function.__name__}: .*pip install"):
            function()


def test_the_example_builds_against_the_installed_package(tmp_path):
    installed()
    if shutil.which("cmake") is None:
        pytest.skip("no cmake")
    commands = [
        [
            "cmake",
            "-S",
            ROOT / "examples/cpp",
            "-B",
            tmp_path,
            f"-Dtilewright_DIR={tw.get_cmake_dir()}",
        ],
        ["cmake", "--build", tmp_path],
        [tmp_path / "example"],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": right\n") == 9
