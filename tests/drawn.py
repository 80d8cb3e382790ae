"""What the differential tests share: how many examples, which seed, sizes and memory layouts.

TILEWRIGHT_TEST_EXAMPLES: examples of a test (few here, thousands in .ci/nightly). They follow from
--seed, which the header of a run prints; hypothesis shrinks what fails and prints how to repeat it.
"""

from __future__ import annotations

import os

import hypothesis
import numpy as np
from hypothesis import strategies as st

import harness

EXAMPLES = int(os.environ.get("TILEWRIGHT_TEST_EXAMPLES", "12"))

# Around the widths and heights of tiles, vectors and blocks.
SIZES = st.one_of(
    st.integers(0, 9),
    st.sampled_from([13, 14, 15, 16, 17, 28, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257]),
    st.integers(10, 600),
)
DTYPES = st.sampled_from(list(harness.DTYPES.values()))


def settings(examples=EXAMPLES, **others):
    """The settings of all of them."""
    return hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck),
        **others,
    )


def run(check, examples=EXAMPLES):
    """Run ``check(data)`` on so many examples of what it draws."""
    given = hypothesis.given(st.data())(check)
    settings(examples)(hypothesis.seed(harness.seed)(given))()


def relaid(draw, x):
    """The same values, axes in any order in memory, with steps of either sign."""
    if x.ndim == 0:
        return x
    order = draw(st.permutations(range(x.ndim)))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3, -1, -2])) for _ in order]
    start = draw(st.integers(0, 3))
    room = [n * abs(s) for n, s in zip((x.shape[i] for i in order), steps, strict=True)]
    memory = np.zeros(int(np.prod(room)) + start, x.dtype)[start:].reshape(room)
    view = memory[tuple(slice(None, None, s) for s in steps)]
    view = view[tuple(slice(0, x.shape[i]) for i in order)].transpose(np.argsort(order))
    view[...] = x
    return view
