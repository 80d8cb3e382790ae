"""Dropout of attention drops what tw.dropout drops from the weights, and from all that follows."""

import numpy as np
import pytest

import tilewright as tw
from attention_inputs import arrays, gradients
from harness import same_bits

pytestmark = pytest.mark.usefixtures("isa")


@pytest.mark.parametrize("Tq", [1, 2, 33, 70])
@pytest.mark.parametrize("heads", [(2, 2), (4, 1)])
def test_dropout_drops_what_the_op_drops_from_the_weights(heads, Tq):
    """With V = 1 the result is the weights themselves."""
    H, Hkv = heads
    q, k, _ = arrays(2, H, Hkv, Tq, 141, 16)
    v = np.broadcast_to(np.eye(141, dtype=np.float32), (2, Hkv, 141, 141))
    weights, lse = tw.attention(q, k, v, causal=Tq == 33, return_lse=True)
    got, got_lse = tw.attention(
        q, k, v, causal=Tq == 33, return_lse=True, dropout_p=0.3, seed=2**63 + 5
    )
    want = tw.dropout(weights, 0.3, seed=2**63 + 5)
    np.testing.assert_array_equal(got == 0, want == 0)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=0)
    assert same_bits(got_lse, lse)


def test_dropout_of_nothing_and_of_everything():
    q, k, v = arrays(1, 2, 1, 40, 300, 16)
    dout = arrays(1, 2, 1, 40, 1, 16, seed=1)[0]
    plain = (tw.attention(q, k, v), *gradients(q, k, v, dout))
    for p in (0, 1e-12):
        kwargs = {"dropout_p": p, "seed": 1}
        found = (tw.attention(q, k, v, **kwargs), *gradients(q, k, v, dout, **kwargs))
        assert all(same_bits(a, b) for a, b in zip(found, plain, strict=True))
    v[:] = np.nan  # what is dropped is not there
    kwargs = {"dropout_p": 1, "seed": 1}
    assert not tw.attention(q, k, v, **kwargs).any()
    assert not any(g.any() for g in gradients(q, k, v, dout, **kwargs))


def test_dropout_any_number_of_threads_and_no_seed():
    q, k, v = arrays(1, 4, 2, 600, 1100, 16)
    dout = arrays(1, 4, 1, 600, 1, 16, seed=1)[0]
    before = tw.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            tw.set_num_threads(n)
            tw.manual_seed(3)
            few_panels = tw.attention(q[:, :, :30], k, v, dropout_p=0.2)
            kwargs = {"dropout_p": 0.2, "seed": 9, "causal": True}
            all_rows = tw.attention(q, k, v, **kwargs)
            results.append([few_panels, all_rows, *gradients(q, k, v, dout, **kwargs)])
    finally:
        tw.set_num_threads(before)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))
    tw.manual_seed(3)
    first, second = (tw.attention(q[:, :, :30], k, v, dropout_p=0.2) for _ in range(2))
    assert same_bits(first, results[0][0])
    assert not same_bits(second, first)


def test_dropout_in_a_window_is_dropout_under_its_mask():
    q, k, v = arrays(1, 2, 1, 150, 400, 16)
    dout = arrays(1, 2, 1, 150, 1, 16, seed=1)[0]
    behind = np.arange(150)[:, None] + 250 - np.arange(400)
    drops = {"dropout_p": 0.4, "seed": 4}
    a, b = ({"window": (30, 2), **drops}, {"mask": (behind <= 30) & (behind >= -2), **drops})
    for got, want in zip(
        (tw.attention(q, k, v, **a), *gradients(q, k, v, dout, **a)),
        (tw.attention(q, k, v, **b), *gradients(q, k, v, dout, **b)),
        strict=True,
    ):
        assert same_bits(got, want)
