"""A GPT on a device: it generates, in float32 and quantized, and trains as on the CPU.

Collected only where TILEWRIGHT_EMULATED names an emulated extension (README.md).
"""

from __future__ import annotations

import numpy as np
import pytest

import emulated
import on_device
import tilewright as tw
from tilewright.models import GPT, GPTConfig
from tilewright.training import Checkpoint, Settings, Trainer, save_checkpoint


@pytest.fixture(autouse=True)
def _ops_are_the_users():
    with on_device.left_alone():
        yield


CONFIG = GPTConfig(vocab_size=40, context=12, layers=2, heads=2, width=32)
PROMPT = [3, 1, 4, 1, 5]


def model_pair():
    """The same model on the CPU and on the device."""
    pair = GPT(CONFIG, seed=0), GPT(CONFIG, seed=0)
    return pair[0], pair[1].to("emulated")


def test_logits_are_the_cpus(rng):
    here, there = model_pair()
    ids = rng.integers(0, 40, (2, 12))
    with tw.no_grad():
        want, got = here(ids).numpy(), there(emulated.to_device(ids))
    assert got.device == "emulated"
    np.testing.assert_allclose(got.numpy(), want, atol=2e-6)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_tokens_are_the_cpus(bits):
    """Past the end of the context, where the cache begins anew."""
    here, there = model_pair()
    if bits:
        there = there.quantize(bits=bits) if bits == 8 else here.quantize(bits=4).to("emulated")
        here = here.quantize(bits=bits)
    want = list(here.generate(PROMPT, 12, temperature=0))
    assert list(there.generate(PROMPT, 12, temperature=0)) == want
    drawn = {"temperature": 1.5, "top_k": 20, "seed": 1}
    assert list(there.generate(PROMPT, 9, **drawn)) == list(here.generate(PROMPT, 9, **drawn))


def test_state_comes_from_any_memory():
    here, there = model_pair()
    other = GPT(CONFIG, seed=1)
    there.load_state_dict(other.state_dict())
    here.load_state_dict(there.state_dict())
    for name, array in other.state_dict().items():
        np.testing.assert_array_equal(here.state_dict()[name], array)
        np.testing.assert_array_equal(there.state_dict()[name].get(), array)


def test_a_training_step_has_the_cpus_loss_and_gradients(rng):
    here, there = model_pair()
    ids, targets = rng.integers(0, 40, (2, 2, 12))
    loss = here.loss(ids, targets)
    loss.backward()
    moved = there.loss(emulated.to_device(ids), emulated.to_device(targets))
    moved.backward()
    assert abs(moved.item() - loss.item()) < 1e-6
    for (name, a), b in zip(here.named_parameters(), there.parameters(), strict=True):
        np.testing.assert_allclose(b.grad.get(), a.grad, atol=1e-6, err_msg=name)


def trainer(device, steps=6):
    text = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 20, np.uint8)
    settings = Settings(steps=steps, batch=4, learning_rate=1e-2)
    model = GPT(GPTConfig(context=16, layers=2, heads=2, width=32), seed=0).to(device)
    return Trainer(model, text, settings)


def test_a_run_has_the_cpus_loss_curve():
    want = [step.loss for step in trainer("cpu").run()]
    got = [step.loss for step in trainer("emulated").run()]
    assert want[-1] < want[0] - 0.5
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_run_goes_on_with_the_same_bits(tmp_path):
    whole, begun = trainer("emulated"), trainer("emulated")
    losses = [step.loss for step in whole.run()]
    for _ in range(3):
        begun.advance()
    save_checkpoint(tmp_path / "checkpoint", begun, {})
    goes_on = Checkpoint(tmp_path / "checkpoint").trainer(begun.batches.text, None, "emulated")
    assert [step.loss for step in goes_on.run()] == losses[3:]
    for (name, a), b in zip(
        whole.model.named_parameters(), goes_on.model.parameters(), strict=True
    ):
        assert a.numpy().tobytes() == b.numpy().tobytes(), name
