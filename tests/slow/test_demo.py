"""The demo as a newcomer runs it: 90 s of training on this Python's own source."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

INT8_LOSS = 0.01  # bits per byte; 0.0007 measured


@pytest.mark.slow
def test_the_demo_beats_order_1_and_int8_keeps_it(tmp_path):
    out = tmp_path / "demo"
    done = subprocess.run(
        [sys.executable, "-m", "tilewright", "demo", "--seconds=90", f"--out={out}"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    print(done.stdout)
    found = report["float32"]["bits_per_byte"]
    assert found < report["baselines"]["order 1"]
    assert report["int8"]["bits_per_byte"] < found + INT8_LOSS
    assert report["int8"]["bytes"] < 0.4 * report["float32"]["bytes"]
    assert report["training"]["seconds"] == pytest.approx(90, abs=5)
