"""MultiheadAttention against its formula in float64: masks, layouts, weights, sizes, dropout."""

import math

import numpy as np
import pytest

import tilewright as tw
from harness import agrees, close
from tilewright import nn

B, L, S, E, H = 2, 7, 5, 24, 3


def array(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def made(rng, *args, **kwargs):
    """A layer whose biases are not zero."""
    layer = nn.MultiheadAttention(
        E, H, *args, batch_first=kwargs.pop("batch_first", True), **kwargs
    )
    with tw.no_grad():
        for p in (layer.in_proj_bias, layer.out_proj.bias):
            p[...] = array(rng, *p.shape)
    return layer


def reference(layer, query, key, value, ignored=None, added=None):
    """PyTorch's definition: (y, weights); ignored and added broadcast to (B, H, L, S)."""
    if layer.in_proj_weight is not None:
        w = layer.in_proj_weight.numpy().astype(float).reshape(3, E, E)
    else:
        parts = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
        w = [p.numpy().astype(float) for p in parts]
    b = layer.in_proj_bias.numpy().astype(float).reshape(3, E)

    def heads(x, i, extra=None):
        y = x.astype(float) @ w[i].T + b[i]
        batch = y.shape[0]
        if extra is not None:
            y = np.concatenate([y, np.tile(extra.numpy().astype(float), (batch, 1, 1))], 1)
        if i and layer.add_zero_attn:
            y = np.concatenate([y, np.zeros((batch, 1, E))], 1)
        return y.reshape(batch, -1, H, E // H).transpose(0, 2, 1, 3)

    q, k, v = heads(query, 0), heads(key, 1, layer.bias_k), heads(value, 2, layer.bias_v)
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(E // H)
    more = scores.shape[-1] - key.shape[1]
    if added is not None:
        scores = scores + np.pad(added, [(0, 0)] * (np.ndim(added) - 1) + [(0, more)])
    if ignored is not None:
        ignored = np.pad(ignored, [(0, 0)] * (np.ndim(ignored) - 1) + [(0, more)])
        scores = np.where(ignored, -np.inf, scores)
    top = np.max(scores, -1, keepdims=True)
    p = np.exp(scores - np.where(np.isfinite(top), top, 0))
    p = p / np.maximum(p.sum(-1, keepdims=True), 1e-300)
    y = (p @ v).transpose(0, 2, 1, 3).reshape(query.shape)
    return y @ layer.out_proj.weight.numpy().T.astype(float) + layer.out_proj.bias.numpy(), p


def holds(layer, inputs, ignored=None, added=None, **masks):
    """With and without weights, training and packed: the same values and gradients."""

    def run(weighs):
        return lambda *xs: layer(*(xs * 3)[:3], need_weights=weighs, **masks)[0]

    def definition(*xs):
        return reference(layer, *(xs * 3)[:3], ignored, added)[0]

    for weighs in (False, True):
        agrees(run(weighs), definition, *inputs, tolerance=2e-5)
    y, weights = layer(*(inputs * 3)[:3], average_attn_weights=False, **masks)
    want = reference(layer, *(inputs * 3)[:3], ignored, added)[1]
    close(weights, want)
    mean = layer(*(inputs * 3)[:3], **masks)[1]
    close(mean, want.mean(1))
    layer.eval()
    with tw.no_grad():
        for _ in range(2):
            close(run(False)(*inputs), y.numpy(), 2e-5)
    layer.train()


LATER = np.triu(np.ones((L, L), bool), 1)
PADDING = np.arange(L) >= np.array([[L], [4]])


@pytest.mark.parametrize("inputs", [1, 3])
def test_masks(rng, inputs):
    layer = made(rng)
    xs = tuple(array(rng, B, L, E) for _ in range(inputs))
    holds(layer, xs)
    holds(layer, xs, LATER, is_causal=True)
    holds(layer, xs, LATER, attn_mask=LATER)
    holds(layer, xs, LATER, attn_mask=LATER, is_causal=True)
    holds(layer, xs, PADDING[:, None, None], key_padding_mask=PADDING)
    both = LATER | PADDING[:, None, None]
    holds(layer, xs, both, attn_mask=LATER, key_padding_mask=PADDING)
    holds(layer, xs, both, is_causal=True, key_padding_mask=tw.tensor(PADDING))


def test_float_masks(rng):
    layer, x = made(rng), array(rng, B, L, E)
    bias, pads = array(rng, B * H, L, L), array(rng, B, L)
    shaped = bias.reshape(B, H, L, L)
    holds(layer, (x,), added=shaped, attn_mask=bias)
    holds(layer, (x,), added=bias[0], attn_mask=bias[:1])
    holds(layer, (x,), added=bias[0], attn_mask=bias[0])
    holds(layer, (x,), PADDING[:, None, None], shaped, attn_mask=bias, key_padding_mask=PADDING)
    holds(layer, (x,), LATER, pads[:, None, None], attn_mask=LATER, key_padding_mask=pads)
    holds(
        layer, (x,), None, bias[0] + pads[:, None, None], attn_mask=bias[0], key_padding_mask=pads
    )
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    holds(layer, (x,), LATER, attn_mask=causal)
    holds(layer, (x,), LATER, shaped, attn_mask=bias, is_causal=True)


def test_one_mask_for_each_head(rng):
    layer, x = made(rng), array(rng, B, L, E)
    mask = rng.random((B * H, L, L)) < 0.4
    mask[:, :, 0] = False
    holds(layer, (x,), mask.reshape(B, H, L, L), attn_mask=mask)
    holds(layer, (x,), mask[:1].reshape(1, 1, L, L), attn_mask=mask[:1])


def test_rows_that_see_no_key(rng):
    """Attention 0, so out_proj's bias is left; weights and gradients are 0; nothing is NaN."""
    layer, x = made(rng), array(rng, B, L, E)
    nobody = np.zeros((L, L), bool)
    nobody[2] = True
    everyone_padded = np.array([[True] * L, [False] * L])
    ignored = nobody | everyone_padded[:, None, None]
    x[0] = np.nan  # what is padded does not leak either
    for masks in (
        {"attn_mask": nobody, "key_padding_mask": everyone_padded},
        {"attn_mask": np.where(nobody, np.float32(-np.inf), np.float32(0)),
         "key_padding_mask": everyone_padded},
    ):  # fmt: skip
        for weighs in (False, True):
            t = tw.tensor(x, requires_grad=True)
            q = tw.tensor(array(rng, B, L, E))
            y, weights = layer(q, t, t, need_weights=weighs, **masks)
            bias = layer.out_proj.bias.numpy()
            assert np.array_equal(y.numpy()[0], np.broadcast_to(bias, (L, E)))
            assert np.array_equal(y.numpy()[1, 2], bias)
            assert np.isfinite(y.numpy()).all()
            if weighs:
                assert not weights.numpy()[0].any()
                assert not weights.numpy()[1, 2].any()
            layer.zero_grad()
            y.sum().backward()
            assert not t.grad[0].any()
            assert np.isfinite(t.grad).all()
    x[0] = 0.0
    want = reference(layer, x, x, x, ignored)[0]
    close(layer(x, x, x, attn_mask=nobody, key_padding_mask=everyone_padded)[0], want)


def test_gradients_through_the_weights(rng):
    layer, q, k = made(rng), array(rng, B, L, E), array(rng, B, S, E)
    pads = np.arange(S) >= np.array([[S], [3]])
    agrees(
        lambda q, k: layer(q, k, k, pads)[1],
        lambda q, k: reference(layer, q, k, k, pads[:, None, None])[1].mean(1),
        q,
        k,
    )


@pytest.mark.parametrize("bias", [True, False])
def test_other_sizes_of_keys_and_values(rng, bias):
    layer = nn.MultiheadAttention(E, H, kdim=10, vdim=17, bias=bias, batch_first=True)
    names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    names += ["in_proj_bias", "out_proj.weight", "out_proj.bias"] if bias else ["out_proj.weight"]
    assert list(layer.state_dict()) == names
    if bias:
        inputs = array(rng, B, L, E), array(rng, B, S, 10), array(rng, B, S, 17)
        holds(layer, inputs)
        pads = np.arange(S) >= np.array([[S], [3]])
        holds(layer, inputs, pads[:, None, None], key_padding_mask=pads)
    with pytest.raises(tw.ShapeError, match="key must have 3 axes, the last of 10"):
        layer(*[array(rng, B, L, E)] * 3)


@pytest.mark.parametrize("zeros", [True, False])
def test_added_keys(rng, zeros):
    layer = made(rng, add_bias_kv=True, add_zero_attn=zeros)
    assert layer.bias_k.shape == layer.bias_v.shape == (1, 1, E)
    x = array(rng, B, L, E)
    holds(layer, (x,))
    holds(layer, (x,), LATER, is_causal=True)
    holds(layer, (x,), LATER | PADDING[:, None, None], attn_mask=LATER, key_padding_mask=PADDING)
    bias = array(rng, L, L)
    holds(layer, (x,), added=bias, attn_mask=bias)
    y = layer(x, x, x)[0]
    y.sum().backward()
    assert layer.bias_v.grad.any()


def test_layouts(rng):
    layer, other = made(rng), nn.MultiheadAttention(E, H)
    other.load_state_dict(layer.state_dict())
    q, k = array(rng, B, L, E), array(rng, B, S, E)
    y, weights = layer(q, k, k)
    turned, same = other(q.swapaxes(0, 1), k.swapaxes(0, 1), k.swapaxes(0, 1))
    assert turned.shape == (L, B, E)
    close(turned.numpy().swapaxes(0, 1), y.numpy())
    close(same, weights.numpy())
    pads = np.arange(S) >= 3
    for single in (layer, other):
        alone, w = single(q[0], k[0], k[0], pads)
        assert alone.shape == (L, E)
        assert w.shape == (L, S)
        close(alone, layer(q[:1], k[:1], k[:1], pads[None])[0].numpy()[0])
        heads = single(q[0], k[0], k[0], average_attn_weights=False)[1]
        assert heads.shape == (H, L, S)


def test_dropout(rng):
    """Weights are dropped as tw.dropout does, and y is made of those that are returned."""
    layer, x = made(rng, 0.4), array(rng, B, L, E)
    layer.out_proj.weight.data[...] = np.eye(E)
    tw.manual_seed(3)
    y, weights = layer(x, x, x, average_attn_weights=False)
    tw.manual_seed(3)
    close(layer(x, x, x, need_weights=False)[0], y.numpy())
    _, want = reference(layer, x, x, x)
    w = weights.numpy()
    kept = w != 0
    assert 0.3 < 1 - kept.mean() < 0.5
    close(w[kept], want[kept] / 0.6)
    tw.manual_seed(3)
    drop = tw.dropout(np.ones(w.shape, np.float32), 0.4, seed=tw.random.fresh_seed())
    assert np.array_equal(drop != 0, kept)
    v = (
        x.astype(float) @ layer.in_proj_weight.numpy()[2 * E :].T
        + layer.in_proj_bias.numpy()[2 * E :]
    )
    v = v.reshape(B, L, H, E // H).transpose(0, 2, 1, 3)
    close(y, (w @ v).transpose(0, 2, 1, 3).reshape(B, L, E) + layer.out_proj.bias.numpy())
    y.sum().backward()
    layer.eval()
    close(layer(x, x, x)[0], reference(layer, x, x, x)[0])
    assert nn.MultiheadAttention(E, H, 1.0)(x, x, x)[0].numpy().any() == np.False_


def test_packs_follow_the_weights(rng):
    layer, q, k = made(rng).eval(), array(rng, B, L, E), array(rng, B, S, E)
    with tw.no_grad():
        for change in (None, "write", "replace", "load"):
            if change == "write":
                layer.in_proj_weight[...] = array(rng, 3 * E, E)
            elif change == "replace":
                layer.in_proj_weight.data = array(rng, 3 * E, E)
            elif change == "load":
                layer.load_state_dict(made(rng).state_dict())
            for _ in range(2):
                close(layer(q, q, q, need_weights=False)[0], reference(layer, q, q, q)[0])
                close(layer(q, k, k, need_weights=False)[0], reference(layer, q, k, k)[0])


def test_no_keys_and_no_queries(rng):
    layer, q = made(rng), array(rng, B, L, E)
    y, weights = layer(q, q[:, :0], q[:, :0])
    assert weights.shape == (B, L, 0)
    assert np.array_equal(y.numpy(), np.broadcast_to(layer.out_proj.bias.numpy(), y.shape))
    y, weights = layer(q[:, :0], q, q)
    assert (y.shape, weights.shape) == ((B, 0, E), (B, 0, L))


def test_what_attention_refuses(rng):
    layer, x = made(rng), array(rng, B, L, E)
    for masks, error, match in [
        ({"attn_mask": np.zeros((6, 7), bool)}, tw.ShapeError, "attn_mask must have shape"),
        ({"attn_mask": np.zeros((B, L, L), bool)}, tw.ShapeError, "attn_mask must have shape"),
        ({"key_padding_mask": np.zeros(7, bool)}, tw.ShapeError, "key_padding_mask"),
        ({"attn_mask": np.zeros((L, L))}, tw.DtypeError, "mask"),
        ({"attn_mask": nn.Parameter(array(rng, L, L))}, tw.UnsupportedError, "gradient"),
    ]:
        for weighs in (False, True):
            with pytest.raises(error, match=match):
                layer(x, x, x, need_weights=weighs, **masks)
    with pytest.raises(tw.UnsupportedError, match="is_causal"):
        layer(x, x[:, :5], x[:, :5], is_causal=True)
    with pytest.raises(tw.ShapeError, match="one batch"):
        layer(x, x[:1], x[:1])
    with pytest.raises(tw.ShapeError, match="one length"):
        layer(x, x, x[:, :5])
    with pytest.raises(tw.ShapeError, match="query must have 3 axes"):
        layer(x[..., :5], x, x)
    with pytest.raises(tw.ShapeError, match="value must have 2 axes"):
        layer(x[0], x[0], x)
    with pytest.raises(tw.ShapeError, match="multiple of num_heads"):
        nn.MultiheadAttention(24, 5)
    with pytest.raises(ValueError, match="dropout"):
        nn.MultiheadAttention(24, 3, 1.5)
