"""The training loop: what a step depends on, evaluation, checkpoints."""

import dataclasses
import json
import math

import numpy as np
import pytest

import tilewright as tw
from tilewright.training import (
    Checkpoint,
    Diverged,
    Document,
    Settings,
    Trainer,
    bits_per_byte,
    join,
    sample,
    save_checkpoint,
    windows,
)

TEXT = join([Document("a", b"the quick brown fox jumps over the lazy dog. " * 40)])


def make(steps=12, dropout=0.0, **settings):
    config = tw.models.GPTConfig(context=16, layers=1, heads=2, width=16, dropout=dropout)
    model = tw.models.GPT(config, seed=1)
    return Trainer(model, TEXT, Settings(steps=steps, batch=4, **settings))


def train(trainer, steps=None):
    for step in trainer.run():
        if step.number == steps:
            break
    return trainer


def assert_same(a, b):
    """Bit by bit: parameters, optimizer state, position."""
    assert a.step == b.step
    ours, theirs = a.model.state_dict(), b.model.state_dict()
    assert set(ours) == set(theirs)
    ours.update(a.optimizer.state_dict())
    theirs.update(b.optimizer.state_dict())
    for name, value in ours.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(theirs[name]), err_msg=name)


def test_it_learns():
    trainer = make(steps=60, learning_rate=1e-2)
    losses = [step.loss for step in trainer.run()]
    assert losses[0] == pytest.approx(8.0, abs=0.5)  # log2(256): nothing is known
    assert losses[-1] < 4.0


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, dropout):
    straight = train(make(dropout=dropout))
    stopped = train(make(dropout=dropout), steps=5)
    save_checkpoint(tmp_path / "c.safetensors", stopped, {"files": ["x"]})
    tw.manual_seed(99)  # what else happens in the process doesn't matter
    checkpoint = Checkpoint(tmp_path / "c.safetensors")
    assert (checkpoint.step, checkpoint.corpus) == (5, {"files": ["x"]})
    resumed = checkpoint.trainer(TEXT)
    assert_same(stopped, resumed)
    assert resumed.settings == straight.settings
    assert_same(straight, train(resumed))


def test_a_run_does_not_depend_on_threads_and_leaves_the_global_seed_alone():
    tw.manual_seed(7)
    expected = tw.random.generator().random()
    tw.manual_seed(7)
    one = train(make(steps=4, dropout=0.2))
    assert tw.random.generator().random() == expected
    threads = tw.get_num_threads()
    try:
        tw.set_num_threads(3)
        assert_same(one, train(make(steps=4, dropout=0.2)))
    finally:
        tw.set_num_threads(threads)


def test_the_rate_warms_up_and_falls():
    settings = Settings(steps=100, learning_rate=2.0, warmup=0.1, final_rate=0.05)
    rates = [settings.rate(progress) for progress in np.linspace(0, 1, 101)]
    assert 0 < rates[0] < 0.1
    assert [rates[5], rates[10]] == pytest.approx([1.0, 2.0])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)


def test_a_time_budget_ends_by_the_clock():
    settings = Settings(seconds=0.2, batch=4)
    trainer = Trainer(make().model, TEXT, settings)
    steps = list(trainer.run())
    assert 0.2 <= trainer.seconds < 5.0
    assert steps[-1].progress == 1.0
    assert [s.progress for s in steps] == sorted(s.progress for s in steps)


@pytest.mark.parametrize(
    "wrong",
    [{}, {"steps": 1, "seconds": 1.0}, {"steps": 1, "batch": 0}, {"steps": 1, "clip": -1.0}],
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="above zero"):
        Settings(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"batch": 1.5}, {"batch": 1 << 17}, {"seed": -1}, {"seed": True}, {"clip": math.nan},
     {"warmup": "a"}, {"steps": "9"}],
)  # fmt: skip
def test_settings_of_a_wrong_kind_are_named(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must be"):
        Settings(**{"steps": 1, **wrong})


def test_a_loss_that_is_no_number_stops_before_the_parameters_change():
    trainer = train(make(), steps=2)
    parameter = trainer.parameters[0]
    parameter.data[...] = np.nan
    before = [np.array(p.data) for p in trainer.parameters[1:]]
    with pytest.raises(Diverged, match="step 3: the loss is nan"):
        trainer.advance()
    for expected, parameter in zip(before, trainer.parameters[1:], strict=True):
        np.testing.assert_array_equal(expected, parameter.data)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 100])
def test_windows_count_every_byte_once_with_its_own_past(length):
    text = np.random.default_rng(length).integers(1, 256, length, dtype=np.uint8).tobytes()
    found = windows([Document("a", text), Document("b", b"xyz")], context=8)
    counted = found.targets[found.targets != -100]
    assert counted.tolist() == [*text, *b"xyz"]
    whole = b"\0" + text
    for ids, targets in zip(found.ids[:-1], found.targets[:-1], strict=True):
        places = np.flatnonzero(targets != -100)
        for place in places:  # what the model reads before a target is what stands before it
            seen = bytes(ids[: place + 1].tolist())
            assert (seen + bytes([targets[place]])) in whole
        assert len(places) <= 4 or ids[0] == 0  # half a window, after the first


def test_bits_per_byte_is_the_mean_over_all_bytes():
    trainer = train(make(steps=8))
    model, documents = trainer.model, [Document("a", b"the lazy dog. " * 3), Document("b", b"fox")]
    found = windows(documents, 16)
    bits = bits_per_byte(model, found, batch=2)
    assert model.training
    model.eval()
    total, count = 0.0, 0
    with tw.no_grad():
        for ids, targets in zip(found.ids, found.targets, strict=True):
            logits = np.asarray(model(ids[None]).data, np.float64)[0]
            top = logits.max(-1, keepdims=True)
            logp = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
            for place in np.flatnonzero(targets != -100):
                total -= logp[place, targets[place]] / math.log(2)
                count += 1
    assert count == 45
    assert bits == pytest.approx(total / count, rel=1e-5)


def test_a_sample_of_windows_is_spread():
    found = windows([Document("a", bytes(range(1, 251)))], context=4)
    few = sample(found, 10)
    assert len(few.ids) <= 10
    assert few.ids[-1, 0] > 200
    assert len(sample(found, 10_000).ids) == len(found.ids)


def test_other_files_are_no_checkpoints(tmp_path):
    trainer = make()
    path = tmp_path / "c.safetensors"
    trainer.model.save(path)
    with pytest.raises(tw.FormatError, match=r"c\.safetensors: not a checkpoint"):
        Checkpoint(path)
    tw.save({}, path, metadata={"run": '{"format": 2}'})
    with pytest.raises(tw.FormatError, match="checkpoint format 2"):
        Checkpoint(path)
    save_checkpoint(path, trainer, {})
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(tw.FormatError):
        Checkpoint(path)


def test_truncated_at_every_byte_of_the_header(tmp_path):
    save_checkpoint(tmp_path / "whole", make(), {})
    content = (tmp_path / "whole").read_bytes()
    cut = tmp_path / "cut"
    for n in range(8 + int.from_bytes(content[:8], "little") + 1):
        cut.write_bytes(content[:n])
        with pytest.raises(tw.FormatError, match="cut: "):
            Checkpoint(cut)


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (DEEP, tw.FormatError, "recursion"),
        ("{]", tw.FormatError, "not a checkpoint"),
        ("[1]", tw.FormatError, "not a checkpoint"),
        ({"step": math.inf}, tw.FormatError, "step must be"),
        ({"step": -1}, tw.FormatError, "step must be"),
        ({"step": 10**400}, tw.FormatError, "step must be"),
        ({"step": True}, tw.FormatError, "step must be"),
        ({"seconds": math.nan}, tw.FormatError, "seconds must be"),
        ({"seconds": 10**400}, tw.FormatError, "seconds must be"),
        ({"seconds": "1"}, tw.FormatError, "seconds must be"),
        ({"settings": {"steps": 1, "batch": 2**40}}, tw.FormatError, "batch must be at most"),
        ({"settings": {"steps": 1, "clip": "1"}}, tw.FormatError, "clip must be a number"),
        ({"settings": {"steps": 1, "more": 1}}, tw.FormatError, "more"),
        ({"settings": []}, tw.FormatError, "not a checkpoint"),
        ({"config": None}, tw.FormatError, "no GPTConfig"),
        ({"config": {"layers": 10**8}}, tw.FormatError, "100000000 layers"),
        ({"config": {"context": 10**12}}, tw.ShapeError, r"position\.weight must have shape"),
        ({"config": {"width": 10**8}}, tw.ShapeError, r"token\.weight must have shape"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_hostile_checkpoints(tmp_path, change, error, message):
    """What the metadata claims is believed only as far as the tensors bear it out."""
    path = tmp_path / "c"
    trainer = make()
    save_checkpoint(path, trainer, {})
    run = json.loads(tw.load_metadata(path)["run"])
    if isinstance(change, dict):
        if isinstance(change.get("config"), dict):
            change = {"config": dataclasses.asdict(trainer.model.config) | change["config"]}
        change = json.dumps(run | change)
    tw.save(tw.load(path), path, metadata={"run": change})
    with pytest.raises(error, match=message) as caught:
        Checkpoint(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("model/blocks.0.up.bias", np.zeros(7, np.float32), tw.ShapeError),
        ("model/blocks.0.up.bias", np.zeros(64, np.int8), tw.DtypeError),
        ("model/blocks.0.more", np.zeros(1, np.float32), tw.FormatError),
        ("optimizer/more", np.zeros(1, np.float32), tw.FormatError),
        ("optimizer/m.0", np.zeros(3, np.float32), tw.ShapeError),
        ("optimizer/steps", np.inf, tw.FormatError),
    ],
)
def test_tensors_that_do_not_fit_are_named_with_their_file(tmp_path, name, value, error):
    path = tmp_path / "c"
    save_checkpoint(path, make(), {})
    tensors, metadata = tw.load(path), tw.load_metadata(path)
    if name == "optimizer/steps":
        value = np.full(tensors[name].shape, value)
    tw.save({**tensors, name: value}, path, metadata=metadata)
    checkpoint = Checkpoint(path)
    with pytest.raises(error, match=name.partition("/")[2].split(".")[-1]) as caught:
        checkpoint.trainer(TEXT)
    assert str(caught.value).startswith(str(path))


def test_quantized_tensors_make_no_checkpoint(tmp_path):
    path = tmp_path / "c"
    save_checkpoint(path, make(), {})
    tensors = tw.load(path)
    tensors["model/x"] = tw.quantize(np.ones((2, 2), np.float32), axis=0)
    tw.save(tensors, path, metadata=tw.load_metadata(path))
    with pytest.raises(tw.FormatError, match="'model/x' is int8"):
        Checkpoint(path)
