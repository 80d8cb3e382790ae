"""Attention of contents that bfloat16 terms can't hold: they go to float32, row by row.

Heads of 32 and more take matrix units where a level has them (csrc/cpu/attention_products.h).
"""

import ml_dtypes
import numpy as np
import pytest

import harness
import tilewright as tw
import tolerance
from attention_inputs import arrays, gradients
from harness import same_bits

pytestmark = pytest.mark.usefixtures("isa")
B, H, HKV, T, D = 1, 2, 1, 150, 40
BF16 = np.dtype(ml_dtypes.bfloat16)
# Heads of whole tiles in bfloat16 are packed as they are.
TYPES = pytest.mark.parametrize(("dtype", "D"), [(np.float32, D), (BF16, D), (BF16, 64)])


def check(q, k, v, **kwargs):
    """Attention is within its bound, but for what is below the smallest normal number."""
    got = tw.attention(q, k, v, **kwargs)
    (want,) = harness.evaluate("attention", {"q": q, "k": k, "v": v, **kwargs})[:1]
    allowed = tolerance.bound(want, got.dtype) + T * 2.0**-123
    harness.assert_within("attention", got, want.value, allowed, kwargs)
    return got


@TYPES
@pytest.mark.parametrize("power", [-126, -110, -77, -76, -75, -40, 40, 58, 59, 60, 90, 126])
def test_any_exponent_of_a_row_of_keys_or_queries(power, dtype, D):
    q, k, v = arrays(B, H, HKV, T, T, D, dtype)
    for large, other in ((k[:, :, 3:90:7], q), (q[:, :, 5:140:9], k)):
        kept, kept_other = large.copy(), other.copy()
        large *= large.dtype.type(2.0**power)
        other *= large.dtype.type(
            2.0 ** np.clip(-power, -100, 100)
        )  # usual scores where it is scaled
        check(q, k, v, scale=1.0)
        large[...], other[...] = kept, kept_other


@pytest.mark.parametrize("power", [-120, -100, -77, -70, 70, 100, 120])
def test_any_exponents_whose_products_are_usual(power):
    q, k, v = arrays(B, H, HKV, T, T, D)
    check(q * np.float32(2.0**power), k * np.float32(2.0**-power), v)


@pytest.mark.parametrize("power", [-140, -126, -100, -77, -76, 58, 59, 60, 100, 119])
@pytest.mark.parametrize("where", ["all", "an element", "a key"])
@TYPES
def test_any_exponent_of_values(power, where, dtype, D):
    q, k, v = arrays(B, H, HKV, T, T, D, dtype)
    index = {"all": np.s_[:], "an element": np.s_[:, :, 77, 5], "a key": np.s_[:, :, 130]}[where]
    v[index] *= v.dtype.type(2.0**power)
    check(q, k, v)
    check(q, k, v, causal=True)


@TYPES
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0**127, 2.0**-120])
def test_what_a_row_does_not_see_leaves_its_bits_alone(bad, dtype, D):
    q, k, v = arrays(B, H, HKV, T, T, D, dtype)
    want, lse = tw.attention(q, k, v, causal=True, return_lse=True)
    row = 70
    k[:, :, row + 1 :: 3] = bad
    v[:, :, row + 1 :: 2, 1::3] = bad
    q[:, :, row + 1 :: 5] = bad
    got, got_lse = tw.attention(q, k, v, causal=True, return_lse=True)
    assert same_bits(*(np.ascontiguousarray(x[:, :, : row + 1]) for x in (got, want)))
    assert same_bits(*(np.ascontiguousarray(x[:, :, : row + 1]) for x in (got_lse, lse)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_reaches_the_rows_that_see_it(bad):
    q, k, v = arrays(B, H, HKV, T, T, D)
    v[:, :, 60, 7] = bad
    got = tw.attention(q, k, v, causal=True)
    assert np.isfinite(got[:, :, :60]).all()
    np.testing.assert_array_equal(got[:, :, 60:, 7], np.float32(bad))
    assert np.isfinite(np.delete(got, 7, axis=3)).all()


GRADIENT_POWERS = pytest.mark.parametrize("power", [-118, -100, -80, -60, 60, 80])
GRADIENT_INPUTS = pytest.mark.parametrize("which", ["dout", "q", "k", "v"])


@GRADIENT_POWERS
@GRADIENT_INPUTS
def test_any_exponent_of_what_gradients_are_made_of(which, power):
    q, k, v = arrays(B, H, HKV, T, T, D)
    dout = arrays(B, H, 1, T, 1, D, seed=1)[0]
    want = [g.astype(np.float64) for g in gradients(q, k, v, dout, scale=1.0)]
    inputs = {"q": q, "k": k, "v": v, "dout": dout}
    # A power of two changes no mantissa: scores stay, and gradients are those of before, scaled.
    scale = 2.0**-power if which in ("q", "k") else 1.0
    inputs[which] *= np.float32(2.0**power)
    got = gradients(q, k, v, dout, scale=scale)
    powers = {
        "dout": (power, power, power),
        "q": (-power, 0, 0),
        "k": (0, -power, 0),
        "v": (power, power, 0),
    }[which]
    for g, w, p in zip(got, want, powers, strict=True):
        assert np.abs(np.ldexp(g.astype(np.float64), -p) - w).max() <= 1e-5 * np.abs(w).max()


def check_gradients(q, k, v, dout, scale):
    """Gradients in bfloat16 are those of the formula."""
    want = tolerance.attention_gradients(q, k, v, dout, scale)
    got = gradients(q, k, v, dout, scale=scale)
    for name, g, (w, allowed) in zip(("dq", "dk", "dv"), got, want, strict=True):
        harness.assert_within("attention", g.astype(np.float64), w, allowed, name)


@GRADIENT_POWERS
@GRADIENT_INPUTS
@pytest.mark.parametrize("D", [D, 64])
def test_any_exponent_of_what_gradients_in_bfloat16_are_made_of(which, power, D):
    q, k, v = arrays(B, H, HKV, T, T, D, BF16)
    dout = arrays(B, H, 1, T, 1, D, BF16, seed=1)[0]
    {"q": q, "k": k, "v": v, "dout": dout}[which][...] *= BF16.type(2.0**power)
    check_gradients(q, k, v, dout, 2.0**-power if which in ("q", "k") else 1.0)


@pytest.mark.parametrize("rows", [31, 33, 150])
def test_gradients_in_bfloat16_are_the_formula_s(rows):
    q, k, v = (x[:, :, :rows] for x in arrays(B, H, H, T, T, 64, BF16))
    check_gradients(q, k, v, arrays(B, H, 1, rows, 1, 64, BF16, seed=1)[0], 0.125)


@pytest.mark.parametrize("keys", [1, 31, 129])
@pytest.mark.parametrize(("dtype", "D"), [(np.float32, D), (BF16, 64)])
def test_what_stands_behind_an_odd_last_key_weighs_nothing(keys, dtype, D):
    """Such a score is 0, and e^(0 - lse) infinite, where scores are far below zero."""
    q, k, v = arrays(B, H, HKV, T, keys, D, dtype)
    q[..., 0], k[..., 0] = 16, -16
    dout = arrays(B, H, 1, T, 1, D, dtype, seed=1)[0]
    dout[:, :, ::2] = 0  # 0 times infinity
    dq, dk, dv = gradients(q, k, v, dout, scale=1.0)
    assert not dq[:, :, ::2].any()
    assert all(np.isfinite(g.astype(np.float32)).all() for g in (dq, dk, dv))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_gradients_of_rows_that_see_nothing_bad_keep_their_bits(bad):
    q, k, v = arrays(B, H, HKV, T, T, D)
    dout = arrays(B, H, 1, T, 1, D, seed=1)[0]
    want = gradients(q, k, v, dout, causal=True)[0]
    k[:, :, 100:], v[:, :, 100:] = bad, bad
    got = gradients(q, k, v, dout, causal=True)[0]
    assert same_bits(*(np.ascontiguousarray(x[:, :, :100]) for x in (got, want)))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_latency_has_the_bits_of_a_cache(dtype):
    q, k, v = arrays(B, H, HKV, T, T, 64, dtype)
    cache = tw.KVCache(1, B, HKV, 64, T, dtype=np.dtype(dtype).name)
    cache.append(0, k, v)
    want = tw.attention(q, cache.layer(0), causal=True)
    assert same_bits(tw.attention(q, k, v, causal=True, prefer="latency"), want)
    with pytest.raises(tw.UnsupportedError, match="prefer must be 'throughput' or 'latency'"):
        tw.attention(q, k, v, prefer="speed")
