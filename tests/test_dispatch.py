"""ISA levels: listed, forced by set_isa and by TILEWRIGHT_ISA, refused with the list of choices."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import harness
import tilewright as tw


def run(code, **environment):
    """A fresh interpreter; returns the completed process."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_levels_are_listed_in_ascending_order():
    levels = tw.isas()
    assert levels[0].name == "generic"
    assert levels[0].supported
    assert sum(level.active for level in levels) == 1
    assert all(level.compiled or not level.active for level in levels)


def test_set_isa_switches(isa):
    assert [level.name for level in tw.isas() if level.active] == [isa]


def test_best_level_is_the_default():
    code = "import tilewright as tw; print([l.name for l in tw.isas() if l.active][0])"
    assert run(code, TILEWRIGHT_ISA="").stdout.strip() == harness.SUPPORTED_ISAS[-1]


def test_environment_forces_a_level(isa):
    code = (
        "import numpy as np, tilewright as tw\n"
        "print([l.name for l in tw.isas() if l.active][0])\n"
        "x = np.arange(6, dtype=np.float32).reshape(2, 3)\n"
        "print(tw.matmul(x, x.T).tolist())"
    )
    done = run(code, TILEWRIGHT_ISA=isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [isa, "[[5.0, 14.0], [14.0, 50.0]]"]


def test_unknown_level_raises_and_lists_the_choices():
    with pytest.raises(tw.UnsupportedError, match="sse9") as caught:
        tw.set_isa("sse9")
    for name in harness.SUPPORTED_ISAS:
        assert name in str(caught.value)
    assert any(level.active for level in tw.isas())


def test_unknown_level_in_the_environment_raises_at_first_use():
    done = run(
        "import numpy as np, tilewright as tw; tw.matmul(*[np.eye(2, dtype='f4')] * 2)",
        TILEWRIGHT_ISA="sse9",
    )
    assert done.returncode != 0
    assert "UnsupportedError" in done.stderr
    for name in (*harness.SUPPORTED_ISAS, "sse9"):
        assert name in done.stderr


def test_levels_agree_within_the_bound_not_by_chance(rng):
    """The levels really run different code: their roundings differ on a long sum."""
    if len(harness.SUPPORTED_ISAS) < 2:
        pytest.skip("one level only")
    a = rng.standard_normal((64, 1000)).astype(np.float32)
    found = {}
    for name in harness.SUPPORTED_ISAS:
        tw.set_isa(name)
        found[name] = tw.matmul(a, a.T)
    tw.set_isa("")
    assert not harness.same_bits(found["generic"], found[harness.SUPPORTED_ISAS[-1]])
