"""Attention and Transformer layers against PyTorch: values, gradients, masks, training."""

import warnings

import numpy as np
import pytest

import tilewright as tw

torch = pytest.importorskip("torch", reason="torch is not installed: parity is not checked")
pytestmark = pytest.mark.slow

B, L, S, E, H, F = 3, 9, 7, 24, 3, 40


def array(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def same(ours, theirs, tolerance=5e-5):
    theirs = theirs.detach().numpy()
    scale = max(1.0, float(np.abs(theirs).max(initial=0.0)))
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=tolerance, atol=tolerance * scale)


def adopt(rng, ours, theirs):
    """Random parameters for theirs, the same for ours: a torch state dict loads."""
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(p + 0.2 * torch.tensor(array(rng, *p.shape)))
    ours.load_state_dict(theirs.state_dict())


def in_torch(value):
    return torch.tensor(value) if isinstance(value, np.ndarray) else value


def compare(rng, ours, theirs, inputs, **masks):
    """Outputs (a tuple may come), gradients by inputs and parameters.

    An array that comes several times is one Tensor, as in self-attention.
    """
    kept = {id(x): (tw.tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True))
            for x in inputs}  # fmt: skip
    a, b = ([kept[id(x)][i] for x in inputs] for i in (0, 1))
    with warnings.catch_warnings():  # of masks of two kinds
        warnings.simplefilter("ignore")
        found = ours(*a, **masks), theirs(*b, **{n: in_torch(v) for n, v in masks.items()})
    ya, yb = ([y for y in (f if isinstance(f, tuple) else (f,)) if y is not None] for f in found)
    ours.zero_grad()
    theirs.zero_grad()
    loss, other = 0.0, 0.0
    assert len(ya) == len(yb)
    for y, z in zip(ya, yb, strict=True):
        same(y, z)
        dy = array(rng, *y.shape)
        loss, other = (y * dy).sum() + loss, (z * torch.tensor(dy)).sum() + other
    loss.backward()
    other.backward()
    for x, z in kept.values():
        same(x.grad, z.grad)
    theirs_by_name = dict(theirs.named_parameters())
    assert [n for n, _ in ours.named_parameters()] == list(theirs_by_name)
    for name, p in ours.named_parameters():
        same(p.grad, theirs_by_name[name].grad)


def masks_of(rng, kind, Q=L, K=L):
    later = np.triu(np.ones((Q, K), bool), 1)
    padding = np.arange(K) >= np.array([[K], [K - 3], [K - 4]])
    bias = array(rng, Q, K)
    by_head = rng.random((B * H, Q, K)) < 0.3
    by_head[:, :, 0] = False
    return {
        "none": {},
        "attn": {"attn_mask": later},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": later, "key_padding_mask": padding},
        "float": {"attn_mask": bias},
        "float causal": {"attn_mask": np.where(later, np.float32(-np.inf), np.float32(0))},
        "float and padding": {"attn_mask": bias, "key_padding_mask": padding},
        "bool and float padding": {"attn_mask": later, "key_padding_mask": array(rng, B, K)},
        "both float": {"attn_mask": bias, "key_padding_mask": array(rng, B, K)},
        "heads": {"attn_mask": by_head},
        "heads and padding": {"attn_mask": by_head, "key_padding_mask": padding},
        "heads float": {"attn_mask": array(rng, B * H, Q, K)},
        "hint": {"attn_mask": later, "is_causal": True},
    }[kind]


KINDS = [
    "none",
    "attn",
    "padding",
    "both",
    "float",
    "float causal",
    "float and padding",
    "bool and float padding",
    "both float",
    "heads",
    "heads and padding",
    "heads float",
    "hint",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [None, "mean", "each"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(rng, kind, weights, batch_first):
    ours, theirs = (
        nn.MultiheadAttention(E, H, batch_first=batch_first) for nn in (tw.nn, torch.nn)
    )
    adopt(rng, ours, theirs)
    masks = masks_of(rng, kind)
    masks |= {"need_weights": weights is not None, "average_attn_weights": weights == "mean"}
    shape = (B, L, E) if batch_first else (L, B, E)
    x, k, v = (array(rng, *shape) for _ in range(3))
    compare(rng, ours, theirs, [x, x, x], **masks)
    compare(rng, ours, theirs, [x, k, k], **masks)
    compare(rng, ours, theirs, [x, k, v], **masks)


@pytest.mark.parametrize(
    "options",
    [
        {"kdim": 10, "vdim": 17},
        {"kdim": 10},
        {"vdim": 17, "bias": False},
        {"bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True, "kdim": 10},
    ],
    ids=str,
)
@pytest.mark.parametrize("need_weights", [True, False])
def test_other_sizes_and_added_keys(rng, options, need_weights):
    ours, theirs = (nn.MultiheadAttention(E, H, **options) for nn in (tw.nn, torch.nn))
    adopt(rng, ours, theirs)
    inputs = [array(rng, L, B, E), array(rng, S, B, ours.kdim), array(rng, S, B, ours.vdim)]
    compare(rng, ours, theirs, inputs, need_weights=need_weights)
    for kind in ("both", "float and padding"):
        masks = masks_of(rng, kind, L, S)
        compare(rng, ours, theirs, inputs, need_weights=need_weights, **masks)
    single = [x[:, 0] for x in inputs]
    compare(rng, ours, theirs, single, need_weights=need_weights)


def test_rows_that_see_no_key(rng):
    """Ours: attention 0, hence the bias. PyTorch: NaN with weights, 0 without."""
    ours, theirs = (nn.MultiheadAttention(E, H, batch_first=True) for nn in (tw.nn, torch.nn))
    adopt(rng, ours, theirs)
    x = array(rng, B, L, E)
    nobody = np.zeros((L, L), bool)
    nobody[2] = True
    t = torch.tensor(x)
    for weighs in (True, False):
        y, weights = ours(x, x, x, attn_mask=nobody, need_weights=weighs)
        z, _ = theirs(t, t, t, attn_mask=torch.tensor(nobody), need_weights=weighs)
        z = z.detach().numpy()
        rest = np.arange(L) != 2
        np.testing.assert_allclose(y.numpy()[:, rest], z[:, rest], rtol=5e-5, atol=5e-5)
        assert np.array_equal(y.numpy()[:, 2], np.tile(ours.out_proj.bias.numpy(), (B, 1)))
        assert np.isnan(z[:, 2]).all() == weighs
        if weighs:
            assert not weights.numpy()[:, 2].any()


# Layers and stacks --------------------------------------------------------------------------------

LAYERS = [
    {},
    {"norm_first": True},
    {"batch_first": True, "activation": "gelu"},
    {"batch_first": True, "norm_first": True, "bias": False},
    {"activation": torch.nn.functional.silu, "layer_norm_eps": 0.1},
]


def pair(name, **options):
    theirs = getattr(torch.nn, name)(E, H, dim_feedforward=F, dropout=0.0, **options)
    if not isinstance(options.get("activation", ""), str):
        options["activation"] = tw.silu
    return getattr(tw.nn, name)(E, H, dim_feedforward=F, dropout=0.0, **options), theirs


def shaped(rng, T, options):
    return array(rng, *((B, T, E) if options.get("batch_first") else (T, B, E)))


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_encoder_layer(rng, options):
    ours, theirs = pair("TransformerEncoderLayer", **options)
    adopt(rng, ours, theirs)
    for kind in ("none", "both", "float and padding", "hint"):
        masks = {
            n.replace("attn_mask", "src_mask").replace("key_padding", "src_key_padding"): v
            for n, v in masks_of(rng, kind).items()
        }
        compare(rng, ours, theirs, [shaped(rng, L, options)], **masks)


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_decoder_layer(rng, options):
    ours, theirs = pair("TransformerDecoderLayer", **options)
    adopt(rng, ours, theirs)
    for kind in ("none", "both", "float and padding"):
        own, memory = masks_of(rng, kind), masks_of(rng, kind, L, S)
        masks = {f"tgt_{n.replace('attn_', '')}": v for n, v in own.items()}
        masks |= {f"memory_{n.replace('attn_', '')}": v for n, v in memory.items()}
        inputs = [shaped(rng, L, options), shaped(rng, S, options)]
        compare(rng, ours, theirs, inputs, **masks)


@pytest.mark.parametrize("options", LAYERS[:4], ids=str)
def test_stacks(rng, options):
    ours, theirs = pair("TransformerEncoderLayer", **options)
    stack = {"enable_nested_tensor": False, "mask_check": False}
    ours = tw.nn.TransformerEncoder(ours, 2, tw.nn.LayerNorm(E), **stack)
    theirs = torch.nn.TransformerEncoder(theirs, 2, torch.nn.LayerNorm(E), **stack)
    adopt(rng, ours, theirs)
    padding = masks_of(rng, "padding")["key_padding_mask"]
    later = np.triu(np.ones((L, L), bool), 1)
    x, memory = shaped(rng, L, options), shaped(rng, L, options)
    compare(rng, ours, theirs, [x], mask=later, src_key_padding_mask=padding)
    ours, theirs = pair("TransformerDecoderLayer", **options)
    ours, theirs = tw.nn.TransformerDecoder(ours, 2), torch.nn.TransformerDecoder(theirs, 2)
    adopt(rng, ours, theirs)
    compare(rng, ours, theirs, [x, memory], tgt_mask=later, memory_key_padding_mask=padding)


@pytest.mark.parametrize("options", LAYERS[:4], ids=str)
def test_a_transformer_trains_alike(rng, options):
    """20 steps of Adam on an encoder and decoder, from PyTorch's state dict."""
    sizes = {"num_encoder_layers": 2, "num_decoder_layers": 2}
    with warnings.catch_warnings():  # of nested tensors
        warnings.simplefilter("ignore")
        ours, theirs = pair("Transformer", **sizes, **options)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    ours.load_state_dict({name: t.numpy() for name, t in theirs.state_dict().items()})
    later = np.triu(np.ones((L, L), bool), 1)
    padding = masks_of(rng, "padding", K=S)["key_padding_mask"]
    masks = {"tgt_mask": later, "src_key_padding_mask": padding}
    masks |= {"memory_key_padding_mask": padding}
    src, tgt, goal = (shaped(rng, n, options) for n in (S, L, L))
    # A gradient near 0 has a random sign in Adam's first steps; a large eps keeps the two together.
    a = tw.optim.Adam(ours.parameters(), lr=1e-3, eps=1e-3)
    b = torch.optim.Adam(theirs.parameters(), lr=1e-3, eps=1e-3)
    with_torch = {n: torch.tensor(v) for n, v in masks.items()}
    losses = []
    for _ in range(20):
        loss = tw.nn.MSELoss()(ours(src, tgt, **masks), goal)
        other = torch.nn.functional.mse_loss(
            theirs(torch.tensor(src), torch.tensor(tgt), **with_torch), torch.tensor(goal)
        )
        assert loss.item() == pytest.approx(other.item(), rel=1e-4)
        losses.append(loss.item())
        for optimizer, value in ((a, loss), (b, other)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    assert losses[-1] < losses[0]
    theirs_by_name = theirs.state_dict()
    for name, p in ours.state_dict().items():
        same(p, theirs_by_name[name], 1e-3)


def test_default_weights_have_the_same_spread(rng):
    tw.manual_seed(0)
    torch.manual_seed(0)
    with warnings.catch_warnings():  # of nested tensors
        warnings.simplefilter("ignore")
        models = tw.nn.Transformer(64, 4, 1, 1, 128), torch.nn.Transformer(64, 4, 1, 1, 128)
    ours, theirs = (dict(model.named_parameters()) for model in models)
    assert list(ours) == list(theirs)
    for name, p in ours.items():
        q = theirs[name].detach().numpy()
        assert p.shape == q.shape
        if p.ndim == 2:
            assert p.numpy().std() == pytest.approx(q.std(), rel=0.05), name
        else:
            assert abs(p.numpy()).max() == pytest.approx(abs(q).max(), rel=0.2), name
    extra = (
        tw.nn.MultiheadAttention(64, 4, add_bias_kv=True),
        torch.nn.MultiheadAttention(64, 4, add_bias_kv=True),
    )
    for name, p in extra[0].named_parameters():
        q = dict(extra[1].named_parameters())[name].detach().numpy()
        assert p.numpy().std() == pytest.approx(q.std(), rel=0.35), name
