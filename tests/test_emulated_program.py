"""tw.compile on a device: a replay launches the step's kernels in order, and has their bits.

Collected only where TILEWRIGHT_EMULATED names an emulated extension (README.md).
"""

from __future__ import annotations

import gc

import numpy as np
import pytest

import emulated
import harness
import on_device
import tilewright as tw
from programs import counts, same
from tilewright import _core
from tilewright.device import running_on
from tilewright.models import GPT, GPTConfig
from tilewright.registry import OPS
from tilewright.training import Settings, Trainer

F32 = np.float32
there = emulated.to_device


@pytest.fixture(autouse=True)
def _ops_are_the_users():
    with on_device.left_alone():
        yield


def host(value):
    value = value.data if type(value) is tw.Tensor else value
    return value.get() if type(value) is emulated.EmulatedArray else np.asarray(value)


class Classifier:
    """A small MLP on the device and its training step, twice alike for one seed."""

    def __init__(self, optimizer=tw.optim.Adam, clip=None, dropout=0.0, **options):
        tw.manual_seed(5)
        layers = [tw.nn.Linear(64, 48), tw.nn.ReLU(), tw.nn.Dropout(dropout), tw.nn.Linear(48, 10)]
        self.model = tw.nn.Sequential(*layers).to("emulated").train()
        self.optimizer = optimizer(list(self.model.parameters()), **{"lr": 1e-2, **options})
        self.clip = clip

    def step(self, x, y):
        self.optimizer.zero_grad()
        loss = tw.cross_entropy(self.model(x), y)
        loss.backward()
        norm = None
        if self.clip is not None:
            norm = tw.optim.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return loss, norm

    def state(self):
        own = [(p.data, p.grad) for p in self.model.parameters()]
        saved = self.optimizer.state_dict()
        return [host(a) for pair in own for a in pair] + [host(saved[k]) for k in sorted(saved)]


def batch(i, rows=24):
    rng = np.random.default_rng(i)
    return there(rng.standard_normal((rows, 64), F32)), there(rng.integers(0, 10, rows))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (tw.optim.Adam, {}),
        (tw.optim.AdamW, {"weight_decay": 0.1}),
        (tw.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (tw.optim.RMSprop, {"centered": True, "momentum": 0.5}),
        (tw.optim.Adam, {"clip": 0.05}),
        (tw.optim.Adam, {"clip": 1e3}),
        (tw.optim.Adam, {"dropout": 0.3}),
    ],
)
def test_training(kind, options):
    eager, compiled = Classifier(kind, **options), Classifier(kind, **options)
    step = tw.compile(compiled.step)
    tw.manual_seed(1)
    want = [[host(v) for v in eager.step(*batch(i))] for i in range(6)]
    tw.manual_seed(1)
    before = counts()
    found = [step(*batch(i)) for i in range(6)]
    assert list(counts() - before) == [2, 0, 4]
    for i, ((loss, norm), got) in enumerate(zip(want, found, strict=True)):
        assert got[0].device == "emulated"
        assert harness.same_bits(loss, host(got[0])), i
        assert norm == host(got[1]), i  # Python's float, or None
    assert same(eager.state(), compiled.state())


RECORDABLE = [
    p
    for p in harness.typed_cases()
    if p.values[0] in on_device.KERNELS and p.values[0] not in ("quantize", "dequantize", "qmatmul")
]


@pytest.mark.parametrize(("name", "case", "dtype"), RECORDABLE)
def test_every_op(name, case, dtype):
    """Forward; inputs move about between calls, and results of earlier calls stay as they were."""
    op = OPS[name]
    arguments = harness.inputs(name, case, dtype)

    def moved(given):
        return {n: there(v.copy()) if is_array(v) else v for n, v in given.items()}

    def is_array(v):
        return isinstance(v, np.ndarray)

    step = tw.compile(lambda **given: op(**given))
    kept = []
    changed = {
        n: v[::-1].copy() if harness.is_float(v) and v.ndim else v for n, v in arguments.items()
    }
    for given in (arguments, arguments, arguments, changed, changed):
        want = [host(v) for v in harness.as_tuple(op(**moved(given)))]
        got = harness.as_tuple(step(**moved(given)))
        kept.append((got, want))
    for got, want in kept:
        assert same([host(v) for v in got], want)


def test_gradients_add_up_without_zero_grad():
    """And one tensor that is used twice; the first gradient is copied, the others added."""
    weight = tw.tensor(
        np.arange(12, dtype=F32).reshape(3, 4), device="emulated", requires_grad=True
    )

    def step(x):
        y = tw.relu(x @ weight) + tw.gelu(x @ weight)
        tw.mse(y, x @ weight).backward()

    x = there(np.random.default_rng(0).standard_normal((5, 3), F32))
    wants = []
    for _ in range(5):
        step(x)
        wants.append(host(weight.grad))
    weight.grad = None
    compiled = tw.compile(step)
    for want in wants:
        compiled(x)
        assert harness.same_bits(host(weight.grad), want)


def test_temporaries_share_one_arena_on_the_device():
    def step(x):
        for _ in range(8):
            x = tw.relu(x)
        return x

    compiled = tw.compile(step)
    x = there(np.ones((64, 64), F32))
    for _ in range(3):
        compiled(x)
    (program,) = compiled._programs.values()
    assert program._core.arena_bytes == 2 * x.nbytes
    assert type(program._core.gpu_arena) is emulated.EmulatedArray
    gc.collect()
    before = _core.emulator.allocated_bytes()
    kept = [compiled(x) for _ in range(3)]
    grown = _core.emulator.allocated_bytes() - before
    assert 0 <= grown - len(kept) * x.nbytes < x.nbytes  # the results alone


def test_memory_of_a_program_is_given_back():
    gc.collect()
    before = _core.emulator.allocated_bytes()
    compiled = tw.compile(lambda x: tw.softmax(tw.relu(x)))
    for i in range(4):
        compiled(there(np.full((8, 8), i, F32)))
    del compiled
    gc.collect()
    assert _core.emulator.allocated_bytes() == before


def test_another_stream_is_another_recording(monkeypatch):
    """What still runs on the one would meet the program's memory on the other."""
    compiled = tw.compile(tw.relu)
    x = there(np.ones(8, F32))
    for _ in range(3):
        compiled(x)
    monkeypatch.setattr(emulated.EmulatedDevice, "stream", lambda self: 64)
    before = counts()
    for _ in range(3):
        assert host(compiled(x)).sum() == 8
    assert list(counts() - before) == [1, 1, 1]


def four_times(step, x):
    for _ in range(4):
        step(x)


def test_what_is_refused():
    x, y = np.ones((4, 4), F32), there(np.ones((4, 4), F32))
    with pytest.raises(tw.UnsupportedError, match=r"a step on the CPU and emulated.*of its own"):
        tw.compile(lambda a, b: (tw.relu(a), tw.relu(b)))(x, y)
    doubled = tw.compile(lambda a: tw.relu(a * 2))
    with pytest.raises(tw.UnsupportedError, match=r"can't be replayed: .*outside of the registry"):
        four_times(doubled, y)


def test_a_write_by_other_means_is_caught():
    total = there(np.zeros(4, F32))

    def step(x):
        y = tw.relu(x)
        total[...] = total + y
        return tw.relu(total)

    compiled = tw.compile(step)
    with pytest.raises(tw.UnsupportedError, match="by other means"):
        four_times(compiled, there(np.full(4, 3, F32)))


def test_a_replaced_array_is_recorded_again():
    model = tw.nn.Linear(8, 4).to("emulated").eval()
    compiled = tw.compile(model)
    x = there(np.ones((2, 8), F32))
    with tw.no_grad():
        for _ in range(3):
            compiled(x)
        model.weight.data = there(np.zeros(model.weight.shape, F32))
        before = counts()
        got = compiled(x)
        assert list(counts() - before) == [0, 1, 0]
    assert harness.same_bits(host(got), np.broadcast_to(host(model.bias), (2, 4)))


CONFIG = GPTConfig(vocab_size=40, context=16, layers=2, heads=2, width=32)


def test_decoding_is_replayed():
    model = GPT(CONFIG, seed=0)
    want = list(model.generate([3, 1, 4], 12, temperature=0))
    moved = GPT(CONFIG, seed=0).to("emulated")
    before = counts()
    assert list(moved.generate([3, 1, 4], 12, temperature=0)) == want
    made, _, replayed = counts() - before
    assert made == 2
    assert replayed >= 8


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_trainer_is_replayed(dropout):
    text = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 20, np.uint8)

    def losses(precompiled):
        settings = Settings(steps=6, batch=4, learning_rate=1e-2)
        tw.manual_seed(4)
        config = GPTConfig(256, context=12, layers=1, heads=2, width=32, dropout=dropout)
        model = GPT(config, seed=0)
        trainer = Trainer(model.to("emulated"), text, settings)
        if not precompiled:
            trainer._differentiate, trainer._update = trainer._gradients, trainer.optimizer.step
        return [step.loss for step in trainer.run()]

    before = counts()
    replayed = losses(True)
    assert (counts() - before)[2] >= 6
    assert replayed == losses(False)


# --- graphs ---------------------------------------------------------------------------------------


def graphs():
    return sum(n for k, n in tw.stats().calls.get("program", {}).items() if k.startswith("graph"))


def launches(step, *given):
    _core.emulator.take_counters()
    result = step(*given)
    return result, _core.emulator.take_counters()["launches"]


def test_what_stays_the_same_becomes_a_graph():
    """Of the fourth call on: the third was the first run, and the one after it is captured."""
    model = tw.nn.Sequential(tw.nn.Linear(8, 16), tw.nn.GELU(), tw.nn.LayerNorm(16)).to("emulated")
    compiled = tw.compile(model.eval())
    rng = np.random.default_rng(0)
    x = there(rng.standard_normal((5, 8), F32))
    with tw.no_grad():
        want, eager = launches(model, x)
        before = graphs()
        for i in range(6):
            got, made = launches(compiled, x)
            assert harness.same_bits(host(got), host(want)), i
            assert made == (2 * eager if i == 1 else eager)  # the proof runs too
        assert graphs() - before == 3
        calls = tw.stats().calls["layernorm"].copy()
        x[...] = there(rng.standard_normal((5, 8), F32))  # a graph reads what is there now
        assert harness.same_bits(host(compiled(x)), host(model(x)))
        assert graphs() - before == 4
        assert sum(tw.stats().calls["layernorm"].values()) == sum(calls.values()) + 1  # the model's


def test_another_address_or_number_is_launched_call_by_call():
    w = tw.tensor(np.ones((4, 4), F32), device="emulated", requires_grad=True)
    sgd = tw.optim.SGD([w], lr=0.5)

    @tw.compile
    def train(x):
        sgd.zero_grad()
        tw.mse(x @ w, x).backward()
        sgd.step()

    x, y = (there(np.random.default_rng(i).standard_normal((3, 4), F32)) for i in range(2))
    want = tw.tensor(np.ones((4, 4), F32), device="emulated", requires_grad=True)
    plain = tw.optim.SGD([want], lr=0.5)
    made = []
    for i, given in enumerate((x, x, x, x, x, y, y, x, y, x, x, x)):
        if i == 10:
            sgd.lr = plain.lr = 0.25
        before = graphs()
        train(given)
        made.append(graphs() - before)
        plain.zero_grad()
        tw.mse(given @ want, given).backward()
        plain.step()
        assert harness.same_bits(host(w), host(want)), i
    assert made == [0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 0, 1]


def test_what_is_explained_is_launched_call_by_call():
    compiled = tw.compile(tw.relu)
    x = there(np.ones((3, 5), F32))
    for _ in range(5):
        compiled(x)
    assert [call.op for call in tw.explain(compiled, x).calls] == ["program", "relu"]


def test_a_seed_is_drawn_for_each_replay():
    drop = tw.nn.Dropout(0.5).train()
    compiled = tw.compile(lambda x: drop(x))
    x = there(np.ones(400, F32))
    found = [host(compiled(x)).tobytes() for _ in range(6)]
    assert len(set(found)) == 6


def test_memory_of_a_graph_is_given_back():
    """Workspaces of its kernels, which are the graph's."""

    def use():
        w = tw.tensor(np.ones((70, 8), F32), device="emulated", requires_grad=True)
        gamma = tw.tensor(np.ones(8, F32), device="emulated", requires_grad=True)
        dy = there(np.ones((70, 8), F32))
        compiled = tw.compile(lambda: tw.layernorm(w, gamma, gamma).backward(dy))
        for _ in range(5):
            w.grad = gamma.grad = None
            compiled()

    gc.collect()
    before, made = _core.emulator.allocated_bytes(), graphs()
    use()
    assert graphs() > made
    gc.collect()
    assert _core.emulator.allocated_bytes() == before


def test_a_cache_grows_with_every_replay():
    """With one array again and again, which as a graph would see the tokens of its capture."""
    rng = np.random.default_rng(0)
    q, k, v = (there(rng.standard_normal((1, 2, 1, 8), F32)) for _ in range(3))

    def results(compile):
        cache = tw.KVCache(1, 1, 2, 8, 64)

        def step(q):
            cache.append(0, k, v)
            return tw.attention(tw.relu(q), cache.layer(0))

        step = compile(step)
        found = []
        for i in range(7):
            k[...] = k * -0.7
            found.append(host(step(q)))
            assert cache.lengths.tolist() == [i + 1]
        return found

    start = k.get()
    want = results(lambda step: step)
    k[...] = there(start)
    assert same(results(tw.compile), want)


def test_what_no_kernel_wrote_is_caught():
    def step(x):
        with running_on(emulated.DEVICE, "test"):
            y = _core.empty_like(x)
        y[...] = x * 2
        return tw.relu(x), y

    with pytest.raises(tw.UnsupportedError, match="by other means"):
        four_times(tw.compile(step), there(np.ones(4, F32)))
