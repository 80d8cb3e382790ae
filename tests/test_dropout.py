"""Dropout: which elements are kept follows from the seed and their number alone."""

from __future__ import annotations

import numpy as np
import pytest

import harness
import tilewright as tw

SEED = 0x299F31D0A4093822


def test_the_words_are_the_published_ones():
    """Random123's known answer for counter 0 and key 0; the kernels have the others, too (cpp)."""
    assert tw.random.words(0, np.arange(4)).tolist() == [
        0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8,
    ]  # fmt: skip


@pytest.mark.parametrize("shape", [(6000,), (60, 100), (3, 20, 100), (6000, 1), (1, 6000)])
def test_the_shape_does_not_matter(shape, isa, threads, dtype):
    x = np.ones(6000, dtype)
    kept = tw.random.words(SEED, np.arange(6000)) >= round(0.3 * 2**32)
    for count in (1, 2, 3):
        threads(count)
        y = tw.dropout(x.reshape(shape), 0.3, seed=SEED)
        assert np.array_equal(y.ravel() != 0, kept)
        assert set(y.ravel()[kept].tolist()) == {float(dtype.type(1 / 0.7))}


def test_strides_do_not_matter(isa, rng):
    x = rng.standard_normal((7, 30, 40)).astype(np.float32)
    want = tw.dropout(x, 0.5, seed=SEED)
    for axes in ((2, 0, 1), (1, 2, 0)):
        view = np.ascontiguousarray(x.transpose(axes)).transpose(np.argsort(axes))
        assert not view.flags.c_contiguous
        assert harness.same_bits(tw.dropout(view, 0.5, seed=SEED), want)
    y = np.empty_like(x)
    assert tw.dropout(x, 0.5, seed=SEED, out=y) is y
    assert harness.same_bits(y, want)


def test_seeds_differ_and_the_share_is_p(isa):
    x = np.ones(100_000, np.float32)
    for p in (0.1, 0.5, 0.9):
        kept = [tw.dropout(x, p, seed=seed) != 0 for seed in (0, 1, 2**32, 2**64 - 1)]
        for k in kept:  # six standard deviations
            assert abs(k.mean() - (1 - p)) < 6 * np.sqrt(p * (1 - p) / x.size)
        for i, k in enumerate(kept):
            for other in kept[:i]:
                agree = p * p + (1 - p) ** 2
                assert abs((k == other).mean() - agree) < 6 * np.sqrt(agree * (1 - agree) / x.size)


def test_nothing_and_everything(isa, dtype):
    x = np.array([1.5, np.nan, np.inf, -np.inf, -0.0, 3], dtype)
    assert harness.same_bits(tw.dropout(x, 0.0, seed=1), x)
    assert harness.same_bits(tw.dropout(x, 1.0, seed=1), np.zeros(6, dtype))


def test_the_gradient_is_dropped_where_the_value_was(isa):
    x = tw.tensor(np.ones((50, 40), np.float32), requires_grad=True)
    y = tw.dropout(x, 0.4, seed=9)
    y.sum().backward()
    assert harness.same_bits(x.grad, y.data)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_p_must_be_a_probability(p):
    with pytest.raises(tw.ShapeError, match=r"dropout: p must be in \[0, 1\]"):
        tw.dropout(np.ones(3, np.float32), p, seed=1)


@pytest.mark.parametrize(
    ("seed", "error"), [(-1, tw.ShapeError), (2**64, tw.ShapeError), (1.5, tw.DtypeError)]
)
def test_bad_seeds(seed, error):
    with pytest.raises(error, match="dropout: seed must be"):
        tw.dropout(np.ones(3, np.float32), 0.5, seed=seed)
