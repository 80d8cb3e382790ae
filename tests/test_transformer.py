"""Transformer layers and stacks against their definition in float64, copies and state included."""

import copy
import math
import pickle

import ml_dtypes
import numpy as np
import pytest

import tilewright as tw
from harness import agrees, close
from tilewright import nn

C, H, F, B, T, S = 12, 3, 20, 2, 6, 5


def array(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


# The definition, of parameters by name ------------------------------------------------------------


def norm(x, p, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * p[f"{name}.weight"] + p.get(f"{name}.bias", 0.0)


def linear(x, p, name):
    return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0.0)


def attention(q, kv, p, name, ignored=None):
    w, b = p[f"{name}.in_proj_weight"], p.get(f"{name}.in_proj_bias", np.zeros(3 * C))
    q, k, v = (
        (x @ w[i * C : (i + 1) * C].T + b[i * C : (i + 1) * C])
        .reshape(B, -1, H, C // H)
        .transpose(0, 2, 1, 3)
        for i, x in enumerate((q, kv, kv))
    )
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(C // H)
    if ignored is not None:
        scores = np.where(ignored, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    y = (weights @ v).transpose(0, 2, 1, 3).reshape(B, -1, C)
    return linear(y, p, f"{name}.out_proj")


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": gelu,
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def encoder_layer(x, p, first, act, ignored=None):
    def attend(x):
        return attention(x, x, p, "self_attn", ignored)

    def feed(x):
        return linear(act(linear(x, p, "linear1")), p, "linear2")

    return residual(x, p, first, attend, feed)


def decoder_layer(x, memory, p, first, act, ignored=None, memory_ignored=None):
    def attend(x):
        return attention(x, x, p, "self_attn", ignored)

    def look(x):
        return attention(x, memory, p, "multihead_attn", memory_ignored)

    def feed(x):
        return linear(act(linear(x, p, "linear1")), p, "linear2")

    return residual(x, p, first, attend, look, feed)


def residual(x, p, first, *branches):
    for i, branch in enumerate(branches, 1):
        x = x + branch(norm(x, p, f"norm{i}")) if first else norm(x + branch(x), p, f"norm{i}")
    return x


# ------------------------------------------------------------------------------------------------


def shaken(module, rng):
    """The module with no parameter at a special value."""
    with tw.no_grad():
        for p in module.parameters():
            p[...] = p.numpy() + 0.3 * array(rng, *p.shape)
    return module


def holds(module, definition, *inputs, **masks):
    """Values, and gradients by inputs and every parameter; then in eval mode, packed."""
    names = [name for name, _ in module.named_parameters()]
    start = [p.numpy().copy() for p in module.parameters()]

    def run(*tensors):
        for name, tensor in zip(names, tensors[len(inputs) :], strict=True):
            prefix, _, last = name.rpartition(".")
            setattr(module.get_submodule(prefix), last, tensor)
        return module(*tensors[: len(inputs)], **masks)

    def defined(*arrays):
        return definition(
            *arrays[: len(inputs)], dict(zip(names, arrays[len(inputs) :], strict=True))
        )

    agrees(run, defined, *inputs, *start, tolerance=3e-5, directions=1)
    training = module.training
    module.eval()
    with tw.no_grad():
        close(
            module(*inputs, **masks), defined(*[a.astype(float) for a in (*inputs, *start)]), 3e-5
        )
    module.train(training)


LATER = np.triu(np.ones((T, T), bool), 1)
PADDED = np.arange(T) >= np.array([[T], [4]])
PADDED_MEMORY = np.arange(S) >= np.array([[S], [2]])


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_encoder_layer(rng, first, activation, bias):
    layer = nn.TransformerEncoderLayer(
        C, H, F, 0.0, activation, batch_first=True, norm_first=first, bias=bias
    )
    shaken(layer, rng)
    act = ACTIVATIONS[activation]
    x = array(rng, B, T, C)
    holds(layer, lambda x, p: encoder_layer(x, p, first, act), x)
    masks = {"src_mask": LATER, "src_key_padding_mask": PADDED}
    ignored = LATER | PADDED[:, None, None]
    holds(layer, lambda x, p: encoder_layer(x, p, first, act, ignored), x, **masks)
    holds(layer, lambda x, p: encoder_layer(x, p, first, act, LATER), x, is_causal=True)


@pytest.mark.parametrize("first", [False, True])
def test_decoder_layer(rng, first):
    layer = nn.TransformerDecoderLayer(C, H, F, 0.0, batch_first=True, norm_first=first)
    shaken(layer, rng)
    act = ACTIVATIONS["relu"]
    x, memory = array(rng, B, T, C), array(rng, B, S, C)
    holds(layer, lambda x, m, p: decoder_layer(x, m, p, first, act), x, memory)
    masks = {
        "tgt_is_causal": True,
        "tgt_key_padding_mask": PADDED,
        "memory_key_padding_mask": PADDED_MEMORY,
        "memory_mask": np.zeros((T, S), bool),
    }
    ignored = LATER | PADDED[:, None, None], PADDED_MEMORY[:, None, None]
    holds(layer, lambda x, m, p: decoder_layer(x, m, p, first, act, *ignored), x, memory, **masks)


def test_layouts_and_functions_as_activations(rng):
    options = {"dim_feedforward": F, "dropout": 0.0}
    layer = nn.TransformerEncoderLayer(C, H, batch_first=True, activation="gelu", **options)
    turned = nn.TransformerEncoderLayer(C, H, activation=nn.GELU(), **options)
    op = nn.TransformerEncoderLayer(C, H, batch_first=True, activation=tw.gelu, **options)
    x = array(rng, B, T, C)
    want = layer(x).numpy()
    for other in (turned, op, pickle.loads(pickle.dumps(op)), copy.deepcopy(op)):
        other.load_state_dict(layer.state_dict())
        y = other(x if other is not turned else x.swapaxes(0, 1)).numpy()
        close(y if other is not turned else y.swapaxes(0, 1), want)
    with pytest.raises(ValueError, match="activation must be"):
        nn.TransformerEncoderLayer(C, H, activation="none")


@pytest.mark.parametrize("first", [False, True])
def test_dropout_in_its_four_places(rng, first):
    """All dropped: the stream passes through. Some: the mean over draws is what eval gives."""
    layer = nn.TransformerEncoderLayer(C, H, F, 1.0, batch_first=True, norm_first=first)
    x = array(rng, B, T, C)
    passed = x if first else layer.norm2(layer.norm1(x)).numpy()
    close(layer(x), passed)
    layer = nn.TransformerDecoderLayer(C, H, F, 0.2, batch_first=True, norm_first=first)
    drops = [name for name, m in layer.named_modules() if isinstance(m, nn.Dropout)]
    assert sorted(drops) == ["dropout", "dropout1", "dropout2", "dropout3"]
    assert all(m.p == 0.2 for m in layer.modules() if isinstance(m, nn.Dropout))
    assert layer.self_attn.dropout == layer.multihead_attn.dropout == 0.2
    tw.manual_seed(1)
    a = layer(x, x).numpy()
    assert not np.array_equal(a, layer(x, x).numpy())
    tw.manual_seed(1)
    assert np.array_equal(a, layer(x, x).numpy())
    if first:
        mean = np.mean([layer(x, x).numpy() for _ in range(400)], axis=0)
        layer.eval()
        close(mean, layer(x, x).numpy(), 0.1)


def test_stacks(rng):
    layer = nn.TransformerEncoderLayer(C, H, F, 0.0, batch_first=True, norm_first=True)
    stack = nn.TransformerEncoder(layer, 2, nn.LayerNorm(C))
    first, second = stack.layers
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert np.array_equal(a.numpy(), b.numpy())
        assert not np.shares_memory(a.numpy(), b.numpy())
    shaken(stack, rng)

    def definition(x, p):
        for i in range(2):
            own = {n[len("layers.0.") :]: v for n, v in p.items() if n.startswith(f"layers.{i}.")}
            x = encoder_layer(x, own, True, ACTIVATIONS["relu"], LATER)
        return norm(x, p, "norm")

    holds(stack, definition, array(rng, B, T, C), mask=LATER)
    close(stack(x := array(rng, B, T, C), is_causal=True), stack(x, LATER).numpy())


@pytest.mark.parametrize("first", [False, True])
def test_transformer(rng, first):
    model = nn.Transformer(
        C, H, 1, 2, F, 0.0, "gelu", layer_norm_eps=1e-5, batch_first=True, norm_first=first
    )
    for name, p in model.named_parameters():
        if p.ndim == 2:
            assert np.abs(p.numpy()).max() <= math.sqrt(6 / sum(p.shape)), name
    shaken(model, rng)

    def definition(src, tgt, p):
        def own(prefix):
            return {n[len(prefix) :]: v for n, v in p.items() if n.startswith(prefix)}

        masks = (PADDED_MEMORY[:, None, None],)
        src = encoder_layer(src, own("encoder.layers.0."), first, gelu, *masks)
        memory = norm(src, p, "encoder.norm")
        for i in range(2):
            tgt = decoder_layer(
                tgt, memory, own(f"decoder.layers.{i}."), first, gelu, LATER, *masks
            )
        return norm(tgt, p, "decoder.norm")

    holds(
        model,
        definition,
        array(rng, B, S, C),
        array(rng, B, T, C),
        src_key_padding_mask=PADDED_MEMORY,
        memory_key_padding_mask=PADDED_MEMORY,
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(T),
    )


def test_padding_does_not_leak(rng):
    """Rows of a padded batch are those of the sequences alone, whatever the padding holds."""
    layer = nn.TransformerEncoderLayer(C, H, F, batch_first=True, norm_first=True).eval()
    stack = nn.TransformerEncoder(layer, 2).eval()
    x = array(rng, B, T, C)
    x[1, 4:] = np.nan
    with tw.no_grad():
        y = stack(x, src_key_padding_mask=PADDED).numpy()
        for options in ((None, False, False), (None, True, True)):  # PyTorch's: change nothing
            other = nn.TransformerEncoder(layer, 2, *options).eval()
            again = other(x, src_key_padding_mask=PADDED).numpy()
            assert np.array_equal(again, y, equal_nan=True)
        alone = stack(x[1:, :4]).numpy()
    assert np.array_equal(y[1, :4], alone[0])
    assert np.isfinite(y[0]).all()


def test_bfloat16_stays_bfloat16(rng):
    model = nn.Transformer(C, H, 1, 1, F, 0.1, batch_first=True).to(ml_dtypes.bfloat16)
    x = array(rng, B, T, C).astype(ml_dtypes.bfloat16)
    y = model(x, x)
    assert y.dtype == ml_dtypes.bfloat16
    y.sum().backward()
    assert all(p.grad.dtype == ml_dtypes.bfloat16 for p in model.parameters())


# Positions ----------------------------------------------------------------------------------------


def test_sinusoidal_encoding(rng):
    layer = nn.SinusoidalPositionalEncoding(8, base=100.0, batch_first=True)
    t, i = np.arange(9)[:, None], np.arange(4)
    angles = t / 100.0 ** (2 * i / 8)
    want = np.stack([np.sin(angles), np.cos(angles)], -1).reshape(9, 8)
    close(layer.table(9), want, 1e-6)
    x = array(rng, 2, 5, 8)
    close(layer(x), x + want[:5], 1e-6)
    close(layer(x, offset=4), x + want[4:9], 1e-6)
    close(layer(x[0]), x[0] + want[:5], 1e-6)
    turned = nn.SinusoidalPositionalEncoding(8, base=100.0)
    close(turned(x.swapaxes(0, 1)), (x + want[:5]).swapaxes(0, 1), 1e-6)
    assert not layer.state_dict()
    agrees(layer, lambda x: x + want[:5], x)
    assert not nn.SinusoidalPositionalEncoding(8, dropout=1.0)(x).any()
    for wrong in (x[..., :4], x[0, 0]):
        with pytest.raises(tw.ShapeError, match="2 or 3 axes"):
            layer(wrong)
    with pytest.raises(tw.ShapeError, match="even"):
        nn.SinusoidalPositionalEncoding(7)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embedding(rng, interleaved):
    layer = nn.RotaryEmbedding(6, base=100.0, interleaved=interleaved)

    def rotated(x, positions):
        """x (..., T, D) as complex numbers, times e^(i angle)."""
        angles = np.asarray(positions)[..., None] / 100.0 ** (2 * np.arange(3) / 6)
        real, imaginary = (
            (x[..., 0:6:2], x[..., 1:6:2]) if interleaved else (x[..., :3], x[..., 3:6])
        )
        z = (real + 1j * imaginary) * np.exp(1j * angles)
        both = np.stack([z.real, z.imag], -1 if interleaved else -2)
        return np.concatenate([both.reshape(*x.shape[:-1], 6), x[..., 6:]], -1)

    x = array(rng, 2, 3, 5, 8)
    agrees(layer, lambda x: rotated(x, np.arange(5)), x)
    close(layer(x, offset=7), rotated(x.astype(float), np.arange(7, 12)))
    each = np.array([2, 40])[:, None] + np.arange(5)
    close(layer(x, offset=np.array([2, 40])), rotated(x.astype(float), each[:, None]))
    close(layer(x[0, 0]), rotated(x[0, 0].astype(float), np.arange(5)))
    assert not layer.state_dict()
    q, k = array(rng, 1, 1, 1, 6), array(rng, 1, 1, 1, 6)
    scores = [
        float(np.sum(np.asarray(layer(q, offset=t + 3)) * np.asarray(layer(k, offset=t))))
        for t in (0, 11, 500)
    ]
    close(scores, [scores[0]] * 3, 1e-4)  # only the distance counts
    with pytest.raises(tw.ShapeError, match="even"):
        nn.RotaryEmbedding(7)
