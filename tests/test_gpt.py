"""GPT: learns, generates with the cache as without it, quantizes, comes back from its file."""

import dataclasses
import json
import math

import numpy as np
import pytest

import tilewright as tw
from tilewright.models import sampling

SMALL = tw.models.GPTConfig(vocab_size=31, context=16, layers=2, heads=2, width=24)


def learned(seed=0, steps=120):
    """A model that knows one short text by heart, and the text."""
    model = tw.models.GPT(SMALL, seed=seed)
    text = np.random.default_rng(seed).integers(0, 31, 17)
    ids, targets = text[None, :-1], text[None, 1:]
    optimizer = tw.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.loss(ids, targets)
        loss.backward()
        tw.optim.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model, text, loss.item()


@pytest.fixture(scope="module")
def trained():
    return learned()


def test_the_first_loss_is_about_that_of_a_uniform_guess(rng):
    model = tw.models.GPT(SMALL, seed=1)
    ids, targets = rng.integers(0, 31, (2, 3, 16))
    assert model.loss(ids, targets).item() == pytest.approx(math.log(31), rel=0.2)
    assert model(ids).shape == (3, 16, 31)


def test_overfits_one_text_and_recites_it(trained):
    model, text, loss = trained
    assert loss < 0.02
    assert list(model.generate(text[:1], 16, temperature=0.0)) == text[1:].tolist()
    assert model.training  # as it was before


def test_training_is_the_same_for_any_thread_count_and_on_repeat(threads):
    states = []
    for n in (1, 2, 2):
        threads(n)
        states.append(learned(steps=5)[0].state_dict())
    for name, value in states[0].items():
        assert value.tobytes() == states[1][name].tobytes() == states[2][name].tobytes(), name


def test_a_seed_decides_the_weights_and_leaves_the_stream_alone():
    tw.manual_seed(0)
    before = tw.random.get_state()
    a, b = tw.models.GPT(SMALL, seed=3), tw.models.GPT(SMALL, seed=3)
    assert tw.random.get_state() == before
    c = tw.models.GPT(SMALL)
    for name, value in a.state_dict().items():
        assert np.array_equal(value, b.state_dict()[name])
    assert not np.array_equal(a.token.weight.numpy(), c.token.weight.numpy())
    ends = a.blocks[0].down.weight.numpy().std()
    assert ends == pytest.approx(1 / math.sqrt(3 * 24) / math.sqrt(4), rel=0.1)


def test_gradients_against_differences_along_random_directions(rng):
    model = tw.models.GPT(SMALL, seed=2)
    ids, targets = rng.integers(0, 31, (2, 3, 9))
    params = list(model.parameters())
    start = [p.numpy().copy() for p in params]
    for p in params:  # larger weights, so that every path matters
        p.data += rng.standard_normal(p.shape).astype(np.float32) * 0.2
    start = [p.numpy().copy() for p in params]
    model.loss(ids, targets).backward()
    for p, at in zip(params, start, strict=True):
        direction = rng.standard_normal(p.shape).astype(np.float32)
        direction /= np.linalg.norm(direction)
        losses = []
        for h in (1e-2, -1e-2):
            p.data[...] = at + h * direction
            with tw.no_grad():
                losses.append(model.loss(ids, targets).item())
        p.data[...] = at
        slope = (losses[0] - losses[1]) / 2e-2
        assert np.vdot(p.grad, direction) == pytest.approx(slope, rel=0.02, abs=3e-4)


@pytest.mark.parametrize("start", [1, 5, 16, 20])
def test_the_cache_changes_nothing(trained, start):
    model, _, _ = trained
    prompt = np.arange(start) % 31
    options = {"temperature": 1.3, "top_k": 20, "top_p": 0.95, "seed": 4}
    got = list(model.generate(prompt, 40, **options))
    assert got == list(without_cache(model, prompt.tolist(), 40, **options))


def without_cache(model, tokens, count, *, temperature, top_k, top_p, seed):
    """The definition: everything that may be seen is read again for every token."""
    context = model.config.context
    rng = tw.random.keyed(seed)
    first = max(0, len(tokens) - context)
    for _ in range(count):
        if len(tokens) - first > context:
            first = len(tokens) - context // 2
        with tw.no_grad():
            logits = model(np.array([tokens[first:]])).numpy()[0, -1]
        tokens.append(sampling.choose(logits, rng, temperature, top_k, top_p))
        yield tokens[-1]


def test_generation_streams_and_is_seeded(trained):
    model, _, _ = trained
    first = next(model.generate([1], 10**9, seed=1))
    assert isinstance(first, int)
    a, b, c = (list(model.generate([1], 30, temperature=2.0, seed=s)) for s in (1, 1, 2))
    assert a == b != c
    tw.manual_seed(8)
    d = list(model.generate([1], 30, temperature=2.0))
    tw.manual_seed(8)
    assert d == list(model.generate([1], 30, temperature=2.0))
    assert list(model.generate([1], 0)) == []


def test_sampling_keeps_what_it_should():
    logits = np.log([0.1, 0.4, 0.3, 0.2])
    p = sampling.probabilities(logits, 1.0, None, None)
    np.testing.assert_allclose(p, [0.1, 0.4, 0.3, 0.2])
    p = sampling.probabilities(logits, 1.0, 2, None)
    np.testing.assert_allclose(p, [0, 4 / 7, 3 / 7, 0])
    p = sampling.probabilities(logits, 1.0, None, 0.6)
    np.testing.assert_allclose(p, [0, 4 / 7, 3 / 7, 0])
    p = sampling.probabilities(logits, 1.0, None, 0.01)
    np.testing.assert_allclose(p, [0, 1, 0, 0])
    p = sampling.probabilities(logits, 0.5, None, None)
    np.testing.assert_allclose(p, np.array([1, 16, 9, 4]) / 30)
    p = sampling.probabilities([0.0, 1e4], 1e-3, None, None)
    np.testing.assert_allclose(p, [0, 1])
    rng = np.random.default_rng(0)
    drawn = [sampling.choose(logits, rng, 1.0, 2, None) for _ in range(2000)]
    assert set(drawn) == {1, 2}
    assert np.mean(np.equal(drawn, 1)) == pytest.approx(4 / 7, abs=0.05)
    assert sampling.choose(logits, rng, 0.0, None, None) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_rank_nothing_are_said(temperature):
    rng = np.random.default_rng(0)
    for wrong in ([1.0, np.nan, 2.0], [0.0, np.inf], [-np.inf, -np.inf]):
        with pytest.raises(ValueError, match="generate: the model's logits must have a finite"):
            sampling.choose(np.float32(wrong), rng, temperature, None, None)
    assert sampling.choose(np.float32([-np.inf, 0.0]), rng, temperature, None, None) == 1


def test_what_generate_refuses_is_said_at_once(trained):
    model, _, _ = trained
    for prompt in ([], [[1]], [0.5]):
        with pytest.raises(tw.ShapeError, match="prompt_ids"):
            model.generate(prompt, 1)
    for options in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            model.generate([1], 1, **options)
    with pytest.raises(tw.ShapeError, match="context 16"):
        model(np.zeros((1, 17), np.int64))


def test_dropout_in_training_only(rng):
    model = tw.models.GPT(dataclasses.replace(SMALL, dropout=0.3), seed=0)
    ids = rng.integers(0, 31, (2, 16))
    tw.manual_seed(1)
    losses = [model.loss(ids, ids) for _ in range(2)]
    assert losses[0].item() != losses[1].item()
    losses[0].backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    assert model.loss(ids, ids).item() == model.loss(ids, ids).item()


# Files and int8 ----------------------------------------------------------------------------------


def test_save_and_load(trained, tmp_path):
    model, text, _ = trained
    model.save(tmp_path / "m")
    back = tw.models.load(tmp_path / "m")
    assert back.config == model.config
    assert not back.training
    for name, value in model.state_dict().items():
        assert back.state_dict()[name].tobytes() == value.tobytes()
    assert list(back.generate(text[:1], 5, temperature=0.0)) == text[1:6].tolist()


def test_quantize_keeps_the_quality_and_comes_back(trained, tmp_path):
    model, text, loss = trained
    small = model.quantize()
    with tw.no_grad():
        assert small.loss(text[None, :-1], text[None, 1:]).item() < loss + 0.05
    assert list(small.generate(text[:1], 16, temperature=0.0)) == text[1:].tolist()
    assert model.blocks[0].qkv.weight.dtype == np.float32  # the original is as it was
    with pytest.raises(ValueError, match="already"):
        small.quantize()
    small.save(tmp_path / "q")
    model.save(tmp_path / "m")
    assert (tmp_path / "q").stat().st_size < 0.5 * (tmp_path / "m").stat().st_size
    back = tw.models.load(tmp_path / "q")
    assert back.quantized
    ids = np.arange(10)[None]
    with tw.no_grad():
        assert back(ids).numpy().tobytes() == small(ids).numpy().tobytes()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 32])
def test_four_bits_keep_the_quality_and_come_back(trained, tmp_path, group_size, symmetric):
    model, text, loss = trained
    small = model.quantize(bits=4, group_size=group_size, symmetric=symmetric)
    with tw.no_grad():
        found = small.loss(text[None, :-1], text[None, 1:]).item()
    assert found < loss + (0.2 if group_size else 0.5)
    small.save(tmp_path / "q4")
    model.quantize().save(tmp_path / "q8")
    assert (tmp_path / "q4").stat().st_size < (tmp_path / "q8").stat().st_size
    back = tw.models.load(tmp_path / "q4")
    assert back.quantized == small.quantized
    ids = np.arange(10)[None]
    with tw.no_grad():
        assert back(ids).numpy().tobytes() == small(ids).numpy().tobytes()


@pytest.mark.parametrize(
    "text", ["[", "[1]", "3", '{"bits": 4}', '{"bits": true}', '{"more": 1}', '{"group_size": 0}',
             '{"symmetric": 1}', '{"bits": [8]}']
)  # fmt: skip
def test_hostile_quantization(trained, tmp_path, text):
    trained[0].quantize().save(tmp_path / "q")
    with pytest.raises(tw.FormatError, match="quantized"):
        tw.models.load(damaged(tmp_path / "q", quantized=text))


def damaged(path, arrays=None, **metadata):
    """The model's file with other arrays or metadata."""
    kept = {**tw.load_metadata(path), **metadata}
    tw.save(tw.load(path) if arrays is None else arrays, path, metadata=kept)
    return path


def config_with(**values):
    return json.dumps({**dataclasses.asdict(SMALL), **values})


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ({"format": "other"}, tw.FormatError, "format"),
        ({"config": "{]"}, tw.FormatError, "config"),
        ({"config": "[" * 100_000}, tw.FormatError, "config"),
        ({"config": "[1]"}, tw.FormatError, "config"),
        ({"config": config_with(more=1)}, tw.FormatError, "config"),
        ({"config": config_with(heads=5)}, tw.FormatError, "heads"),
        ({"config": config_with(heads=2.0)}, tw.FormatError, "heads"),
        ({"config": config_with(width=10**9)}, tw.ShapeError, r"token\.weight"),
        ({"config": config_with(context=10**12)}, tw.ShapeError, r"position\.weight"),
        ({"config": config_with(layers=10**9)}, tw.FormatError, "layers"),
        ({"weights": "int8"}, tw.FormatError, r"blocks\.0\.qkv\.scale"),
    ],
)
def test_a_config_that_contradicts_the_tensors(trained, tmp_path, metadata, error, message):
    trained[0].save(tmp_path / "m")
    with pytest.raises(error, match=message):
        tw.models.load(damaged(tmp_path / "m", **metadata))


def test_a_small_file_gets_no_large_model(tmp_path):
    """Two thin tables would bear out a width whose blocks take terabytes."""
    width = 1 << 18
    arrays = {"token.weight": np.zeros((1, width), np.int8), "blocks.0": np.zeros(1, np.int8)}
    arrays["position.weight"] = arrays["token.weight"]
    config = {"vocab_size": 1, "context": 1, "layers": 1, "heads": 1, "width": width}
    metadata = {"format": "tilewright.gpt/1", "config": json.dumps(config)}
    tw.save(arrays, tmp_path / "m", metadata=metadata)
    with pytest.raises(tw.FormatError, match=r"m: a config of 1 layers and width 262144"):
        tw.models.load(tmp_path / "m")


def test_a_file_of_another_model_names_the_tensor(trained, tmp_path):
    path = tmp_path / "m"
    trained[0].save(path)
    whole = tw.load(path)
    wrong = {**whole, "blocks.1.up.bias": np.zeros(7, np.float32)}
    with pytest.raises(tw.ShapeError, match=r"blocks\.1\.up\.bias must have shape \(96,\)"):
        tw.models.load(damaged(path, wrong))
    without = {k: v for k, v in whole.items() if k != "ln.weight"}
    with pytest.raises(tw.FormatError, match=r"missing: ln\.weight"):
        tw.models.load(damaged(path, without))
    tw.save(whole, path)  # no metadata
    with pytest.raises(tw.FormatError, match="must be a model"):
        tw.models.load(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": 0}, "layers"),
        ({"width": 30, "heads": 4}, "heads must divide"),
        ({"dropout": -0.1}, "dropout"),
        ({"context": True}, "context"),
    ],
)
def test_what_makes_no_config(values, message):
    with pytest.raises(ValueError, match=message):
        tw.models.GPTConfig(**values)
