"""What attention hides leaves no trace, in gradients neither; what shapes the scores is a mask."""

import numpy as np
import pytest

import tilewright as tw
from attention_inputs import OPTIONS, arrays, gradients, powers_of_two
from harness import same_bits

pytestmark = pytest.mark.usefixtures("isa")


def test_a_masked_tile_leaves_no_trace():
    q, k, v = arrays(1, 2, 2, 9, 900, 16)
    mask = np.ones(900, bool)
    mask[128:640] = False
    kept = np.concatenate([np.arange(128), np.arange(640, 900)])
    # what the mask hides may as well be anything
    other_k, other_v = k.copy(), v.copy()
    other_k[:, :, 128:640] = 1e30
    other_v[:, :, 128:640] = -1e30
    assert same_bits(tw.attention(q, k, v, mask=mask), tw.attention(q, other_k, other_v, mask=mask))
    want = tw.attention(q, k[:, :, kept], v[:, :, kept])
    np.testing.assert_allclose(tw.attention(q, k, v, mask=mask), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["causal", "bool", "add", "lengths"])
def test_nan_and_inf_in_masked_positions_do_not_leak(kind, bad):
    B, H, T, D = 2, 2, 40, 16
    q, k, v = arrays(B, H, H, T, T, D)
    hidden = np.zeros((T, T), bool)
    kwargs = {}
    if kind == "causal":
        kwargs["causal"] = True
        hidden = ~np.tril(np.ones((T, T), bool))
        at = 21
    elif kind == "lengths":
        kwargs["kv_lengths"] = np.array([30, 30])
        hidden[:, 30:] = True
        at = 33
    else:
        hidden[:, 7] = True
        hidden[5:9, 11] = True
        kwargs["mask"] = (
            ~hidden if kind == "bool" else np.where(hidden, -np.inf, 0).astype(np.float32)
        )
        at = 7 if kind == "bool" else 11
    clean = tw.attention(q, k, v, **kwargs)
    for name in ("k", "v"):
        x = {"k": k.copy(), "v": v.copy()}
        x[name][:, :, at] = bad
        got = tw.attention(q, x["k"], x["v"], **kwargs)
        rows = hidden[:, at]
        assert same_bits(got[:, :, rows], clean[:, :, rows])
        if not rows.all():
            seen = got[:, :, ~rows]
            assert not np.isfinite(seen).all() or (name == "k" and bad != np.nan)


def test_a_fully_masked_row_is_zero():
    q, k, v = arrays(2, 2, 1, 6, 20, 8)
    mask = np.ones((2, 1, 6, 20), bool)
    mask[0, 0, 3] = False
    out, lse = tw.attention(q, k, v, mask=mask, return_lse=True)
    assert not out[0, :, 3].any()
    assert (lse[0, :, 3] == -np.inf).all()
    assert np.isfinite(out).all()
    assert np.isfinite(np.delete(lse[0], 3, axis=1)).all()
    out, lse = tw.attention(q, k, v, kv_lengths=np.array([0, 2]), causal=True, return_lse=True)
    assert not out[0].any()
    assert not out[1, :, :4].any()
    assert (lse[0] == -np.inf).all()
    assert np.isfinite(lse[1, :, 4:]).all()


def test_gradients_of_what_is_masked_are_zero():
    q, k, v = arrays(2, 4, 2, 6, 20, 8)
    dout = np.ones_like(q)
    mask = np.ones((2, 1, 6, 20), bool)
    mask[0, 0, 3] = False
    mask[:, :, :, 7] = False
    dq, dk, dv = gradients(q, k, v, dout, mask=mask)
    assert not dq[0, :, 3].any()
    assert not dk[:, :, 7].any()
    assert not dv[:, :, 7].any()
    assert dq[1].all()
    dq, dk, dv = gradients(q, k, v, dout, kv_lengths=np.array([0, 13]))
    assert not dq[0].any()
    assert not dk[0].any()
    assert not dv[0].any()
    assert not dk[1, :, 13:].any()
    assert not dv[1, :, 13:].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("Tk", [40, 300])
def test_nan_and_inf_in_masked_positions_do_not_leak_into_gradients(bad, Tk):
    q, k, v = arrays(1, 2, 1, 12, Tk, 16)
    dout = arrays(1, 2, 1, 12, 1, 16, seed=1)[0]
    mask = np.ones((12, Tk), bool)
    mask[:, 7] = False  # a key that no row sees
    mask[4] = False  # a row that sees no key
    clean = gradients(q, k, v, dout, mask=mask)
    for at in range(4):
        x = [q.copy(), k.copy(), v.copy(), dout.copy()]
        x[at][:, :, 7 if at in (1, 2) else 4] = bad
        for got, want in zip(gradients(*x, mask=mask), clean, strict=True):
            assert same_bits(got, want)


@pytest.mark.parametrize(("Tq", "Tk"), [(70, 70), (3, 700), (1, 900), (90, 40), (600, 600)])
@pytest.mark.parametrize("window", [(0, 0), (5, 2), (None, 4), (9, -1), (140, 0), (300, 700)])
def test_a_window_is_a_mask_of_which_nothing_is_computed(Tq, Tk, window):
    """The same bits, gradients included: a masked tile leaves no trace, so it can be left out."""
    q, k, v = arrays(1, 2, 1, Tq, Tk, 16)
    dout = arrays(1, 2, 1, Tq, 1, 16, seed=1)[0]
    behind = np.arange(Tq)[:, None] + Tk - Tq - np.arange(Tk)
    left, right = (np.inf if n in (None, -1) else n for n in window)
    mask = (behind <= left) & (behind >= -right)
    for got, want in zip(
        (
            *tw.attention(q, k, v, window=window, return_lse=True),
            *gradients(q, k, v, dout, window=window),
        ),
        (*tw.attention(q, k, v, mask=mask, return_lse=True), *gradients(q, k, v, dout, mask=mask)),
        strict=True,
    ):
        assert same_bits(got, want)
    causal = tw.attention(q, k, v, mask=mask & (behind >= 0))
    assert same_bits(tw.attention(q, k, v, window=window, causal=True), causal)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("Tq", [1, 3, 40])
@pytest.mark.parametrize("options", ["window", "all"])
def test_nan_and_inf_outside_a_window_do_not_leak(options, Tq, bad):
    q, k, v = arrays(1, 2, 1, Tq, 600, 16)
    dout = arrays(1, 2, 1, Tq, 1, 16, seed=1)[0]
    kwargs = OPTIONS[options](2)
    left = kwargs["window"][0]
    clean = (tw.attention(q, k, v, **kwargs), *gradients(q, k, v, dout, **kwargs))
    k[:, :, : 600 - Tq - left] = bad
    v[:, :, : 600 - Tq - left] = bad
    for a, b in zip(
        (tw.attention(q, k, v, **kwargs), *gradients(q, k, v, dout, **kwargs)), clean, strict=True
    ):
        assert same_bits(a, b)
    row = tw.attention(q[:, :, :1], k, v, window=(left + Tq - 1, -1))  # stands Tq - 1 further on
    assert np.isfinite(row).all()


@pytest.mark.parametrize(("Tq", "Tk"), [(70, 70), (2, 700), (150, 300)])
def test_alibi_is_an_additive_mask(Tq, Tk):
    q, k, v = arrays(2, 4, 2, Tq, Tk, 16)
    dout = arrays(2, 4, 1, Tq, 1, 16, seed=1)[0]
    each = np.stack([powers_of_two(4), powers_of_two(4)[::-1]])
    lengths = np.array([Tk, Tk - 7])
    behind = (lengths[:, None] - Tq + np.arange(Tq))[..., None] - np.arange(Tk)
    bias = -each[..., None, None] * abs(behind[:, None]).astype(np.float32)
    alibi = {"alibi_slopes": each, "kv_lengths": lengths, "causal": True}
    added = {"mask": bias, "kv_lengths": lengths, "causal": True}
    for got, want in zip(
        (tw.attention(q, k, v, **alibi), *gradients(q, k, v, dout, **alibi)),
        (tw.attention(q, k, v, **added), *gradients(q, k, v, dout, **added)),
        strict=True,
    ):
        assert same_bits(got, want)
    same = tw.attention(q, k, v, alibi_slopes=powers_of_two(4))
    assert same_bits(same, tw.attention(q, k, v, alibi_slopes=np.stack([powers_of_two(4)] * 2)))


def test_a_large_softcap_changes_little_and_a_small_one_bounds():
    q, k, v = arrays(1, 2, 2, 9, 40, 16)
    plain, lse = tw.attention(q, k, v, return_lse=True)
    assert same_bits(tw.attention(q, k, v, softcap=0), plain)
    np.testing.assert_allclose(tw.attention(q, k, v, softcap=1e4), plain, rtol=1e-4, atol=1e-5)
    _, lse = tw.attention(q * 1e4, k, v, softcap=0.25, return_lse=True)
    assert (abs(lse - np.log(40)) <= 0.25).all()


def test_lse_is_the_logarithm_of_the_sum():
    q, k, v = arrays(1, 2, 2, 7, 600, 16)
    _, lse = tw.attention(q, k, v, return_lse=True)
    scores = q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2) / 4
    np.testing.assert_allclose(lse, np.log(np.exp(scores).sum(-1)), rtol=1e-6)
