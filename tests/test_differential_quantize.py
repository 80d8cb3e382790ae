"""quantize and dequantize against their formula, bit for bit, on arrays that nobody chose."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st

import drawn
import harness
import tilewright as tw
from test_quantize import assert_formula

# What decides a scale: zeros and one number alone, the ends of float32, and what is no number.
SPECIAL = [0.0, -0.0, 1.0, 0.5, 1e-45, -1e-38, 3e38, -3e38, np.inf, -np.inf, np.nan]


@st.composite
def arrays(draw, axes):
    """Numbers of several magnitudes in any float dtype and layout, some of them special."""
    shape = [draw(drawn.SIZES) if i == 0 else draw(st.integers(0, 40)) for i in range(axes)]
    shape = draw(st.permutations(shape))
    rng = harness.rng_for("quantize", draw(st.integers(0, 9)))
    x = rng.standard_normal(shape) * 10.0 ** draw(st.integers(-6, 6)) + draw(st.integers(-2, 2))
    for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=3)):
        x[rng.random(shape) < draw(st.sampled_from([0.01, 0.3]))] = value
    with np.errstate(over="ignore"):
        return drawn.relaid(draw, x.astype(draw(drawn.DTYPES)))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_any_array_is_its_formula(bits, symmetric, isa):
    def check(data):
        axes = data.draw(st.integers(1, 3))
        kept = [None, *range(axes)] if bits == 8 or axes > 1 else [None]
        axis = data.draw(st.sampled_from(kept), label="axis")
        grouped = axes == (1 if axis is None else 2)
        sizes = st.none() | st.sampled_from([1, 2, 7, 8, 31, 32, 64, 1000])
        group_size = data.draw(sizes if grouped else st.none(), label="group_size")
        x = data.draw(arrays(axes), label="x")
        q = assert_formula(x, bits, symmetric, axis, group_size)
        np.testing.assert_array_equal(tw.dequantize(q.T), tw.dequantize(q).T)

    drawn.run(check, 4 * drawn.EXAMPLES)
