"""tw.compile: a replay has the bits of the step it was recorded from."""

import numpy as np
import pytest

import harness
import tilewright as tw
from programs import Classifier, batch, counts, same
from tilewright.registry import OPS
from tilewright.training import Settings, Trainer

f32 = np.float32


OPTIMIZERS = [
    (tw.optim.Adam, {}),
    (tw.optim.Adam, {"amsgrad": True, "weight_decay": 0.1, "maximize": True}),
    (tw.optim.AdamW, {"weight_decay": 0.1}),
    (tw.optim.SGD, {}),
    (tw.optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
    (tw.optim.RMSprop, {"centered": True, "momentum": 0.5}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_training(kind, options, threads):
    """Loss, parameters, gradients and optimizer state, while rates change and threads differ."""
    eager, compiled = Classifier(kind, **options), Classifier(kind, **options)
    step = tw.compile(compiled.step)
    for i in range(40):
        threads(1 + i % 3)
        eager.optimizer.lr = compiled.optimizer.lr = 1e-2 / (1 + i)
        assert harness.same_bits(eager.step(*batch(i)).data, step(*batch(i)).data), i
        assert same(eager.state(), compiled.state()), i
    versions = [[p._version for p in c.model.parameters()] for c in (eager, compiled)]
    assert versions[0] == versions[1]


def test_every_isa_level(isa):
    eager, compiled = Classifier(), Classifier()
    step = tw.compile(compiled.step)
    for i in range(5):
        assert harness.same_bits(eager.step(*batch(i)).data, step(*batch(i)).data), (isa, i)
    assert same(eager.state(), compiled.state())


RECORDABLE = [  # quantize returns a QuantizedArray, and others take one
    p for p in harness.typed_cases() if p.values[0] not in ("quantize", "dequantize", "qmatmul")
]
DIFFERENTIABLE = [
    p for p in harness.typed_cases(differentiable=True) if p.values[2] in (f32, np.dtype(f32))
]


@pytest.mark.parametrize(("name", "case", "dtype"), RECORDABLE)
def test_every_op(name, case, dtype):
    """Forward, of new inputs too."""
    op = OPS[name]
    arguments = harness.inputs(name, case, dtype)
    step = tw.compile(lambda **given: op(**given))
    want = harness.as_tuple(op(**arguments))
    for _ in range(4):
        got = harness.as_tuple(step(**{n: copied(v) for n, v in arguments.items()}))
        assert all(harness.same_bits(a, b) for a, b in zip(got, want, strict=True))
    changed = {
        n: v[::-1].copy() if harness.is_float(v) and v.ndim and v.flags.c_contiguous else v
        for n, v in arguments.items()
    }
    want, got = harness.as_tuple(op(**changed)), harness.as_tuple(step(**changed))
    assert all(harness.same_bits(a, b) for a, b in zip(got, want, strict=True))


def copied(value):
    return value.copy("K") if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize(("name", "case", "dtype"), DIFFERENTIABLE)
def test_every_backward_pass(name, case, dtype):
    """Gradients of parameters that stay where they are and change in place."""
    op = OPS[name]
    arguments = harness.inputs(name, case, dtype)
    leaves = {
        n: tw.tensor(v, requires_grad=True)
        for n, v in arguments.items()
        if n in op.grads and harness.is_float(v)
    }
    outs = harness.as_tuple(op(**{**arguments, **leaves}))
    rng = np.random.default_rng(0)
    douts = [rng.standard_normal(out.shape, f32).astype(out.dtype) for out in outs]

    def step():
        for leaf in leaves.values():
            leaf.grad = None
        outs = harness.as_tuple(op(**{**arguments, **leaves}))
        for out, dout in zip(outs[:1], douts, strict=False):
            out.backward(dout)

    def gradients():
        return [None if t.grad is None else t.grad.copy() for t in leaves.values()]

    compiled = tw.compile(step)
    for i in range(4):
        for leaf in leaves.values():
            leaf.grad = None
            leaf.data[...] = np.flip(leaf.data)
        try:
            compiled()
        except tw.UnsupportedError as refused:  # NumPy has a part in it: sums over broadcast axes
            pytest.skip(f"refused: {refused}")
        got = gradients()
        step()
        assert all(
            a is b is None or harness.same_bits(a, b) for a, b in zip(got, gradients(), strict=True)
        ), i


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_casts_are_replayed(dtype):
    """Products in 16 bits of float32 weights, whose gradients come back as float32."""

    def trained(compiled):
        w = tw.tensor(np.linspace(-1, 1, 48, dtype=f32).reshape(8, 6), requires_grad=True)
        sgd = tw.optim.SGD([w], lr=0.1)

        def step(x):
            sgd.zero_grad()
            y = tw.matmul(x.to(dtype), w.to(dtype), activation="gelu").to("float32")
            loss = tw.mse(y, y_wanted)
            loss.backward()
            sgd.step()
            return loss

        run = tw.compile(step) if compiled else step
        losses = [run(tw.tensor(x)).data for x in xs]
        return [*losses, w.data, w.grad]

    rng = np.random.default_rng(0)
    xs, y_wanted = rng.standard_normal((5, 4, 8), f32), rng.standard_normal((4, 6), f32)
    before = counts()
    found = trained(compiled=True)
    assert list(counts() - before) == [2, 0, 3]
    assert found[-1].dtype == f32
    assert same(found, trained(compiled=False))


def test_gradients_add_up_without_zero_grad():
    eager, compiled = Classifier(), Classifier()

    def forward_backward(net, x, y):
        loss = tw.cross_entropy(net.model(x), y)
        loss.backward()
        return loss

    step = tw.compile(lambda x, y: forward_backward(compiled, x, y))
    for i in range(30):
        if i % 5 == 3:
            eager.optimizer.step(), compiled.optimizer.step()
        if i % 7 == 6:
            eager.optimizer.zero_grad(), compiled.optimizer.zero_grad()
        want, got = forward_backward(eager, *batch(i)), step(*batch(i))
        assert harness.same_bits(want.data, got.data), i
        assert same(eager.state(), compiled.state()), i


def test_clipping_and_a_parameter_used_twice():
    """Tied weights: gradients are summed inside the program."""
    nets = []
    for _ in range(2):
        tw.manual_seed(3)
        table = tw.nn.Embedding(33, 16)
        norm = tw.nn.LayerNorm(16)
        params = [*table.parameters(), *norm.parameters()]
        nets.append((table, norm, params, tw.optim.AdamW(params, lr=0.05)))

    def step(net, ids, targets):
        table, norm, params, optimizer = net
        optimizer.zero_grad()
        loss = tw.cross_entropy(tw.matmul(norm(table(ids)), table.weight.T), targets)
        loss.backward()
        size = tw.optim.clip_grad_norm_(params, 0.3)
        optimizer.step()
        return loss, size

    compiled = tw.compile(lambda ids, targets: step(nets[1], ids, targets))
    for i in range(12):
        rng = np.random.default_rng(i)
        ids, targets = rng.integers(0, 33, (2, 4, 9))
        (want, size), (got, clipped) = step(nets[0], ids, targets), compiled(ids, targets)
        assert same((want.data, np.array(size)), (got.data, clipped)), i
        for p, q in zip(nets[0][2], nets[1][2], strict=True):
            assert same((p.data, p.grad), (q.data, q.grad)), i


def test_dropout_draws_what_eager_draws():
    x = np.ones((50, 40), f32)
    layer = tw.nn.Dropout(0.3).train()
    tw.manual_seed(11)
    want = [layer(tw.tensor(x)).data for _ in range(6)]
    after = tw.random.get_state()
    tw.manual_seed(11)
    step = tw.compile(lambda x: layer(x))
    got = [step(tw.tensor(x)).data for _ in range(6)]
    assert same(want, got)
    assert tw.random.get_state() == after
    assert not harness.same_bits(got[4], got[5])


# What a program is made for -----------------------------------------------------------------------


def test_shapes_are_recorded_apart_and_counted():
    eager, compiled = Classifier(), Classifier()
    step = tw.compile(compiled.step)
    start = counts()
    for i in range(24):
        rows = (64, 7, 1)[i % 3]
        assert harness.same_bits(eager.step(*batch(i, rows)).data, step(*batch(i, rows)).data)
    assert same(eager.state(), compiled.state())
    assert (counts() - start).tolist() == [6, 0, 18]


def test_two_programs_of_one_model():
    eager, compiled = Classifier(), Classifier()
    train = tw.compile(compiled.step)

    def predict(x):
        with tw.no_grad():
            return compiled.model(x)

    predicted = tw.compile(predict)
    for i in range(10):
        x, y = batch(i)
        eager.step(x, y), train(x, y)
        with tw.no_grad():
            assert harness.same_bits(eager.model(x).data, predicted(x).data), i


def test_strides_dtypes_and_values_of_arguments():
    w = np.arange(12, dtype=f32).reshape(4, 3)
    step = tw.compile(lambda x, activation: tw.matmul(x, w, activation=activation))
    x = np.arange(-20, 20, dtype=f32).reshape(5, 8)
    frozen = x[:, :4].copy()
    frozen.flags.writeable = False
    for given in (x[:, :4], x[:, ::2], x.T[:4].T, x[::-1, 4:], frozen, x[:3, :4].astype("f2")):
        for activation in (None, "relu", "gelu"):
            for _ in range(4):
                want = tw.matmul(given, w, activation=activation)
                assert harness.same_bits(step(given, activation), want)


def test_options_and_no_grad():
    w = tw.tensor(np.ones((300, 300), f32), requires_grad=True)
    x = np.random.default_rng(0).standard_normal((5, 300), f32)
    step = tw.compile(lambda x: tw.matmul(x, w.detach()))
    for isa in [level.name for level in tw.isas() if level.supported] * 3:
        with tw.options(isa=isa):
            assert harness.same_bits(step(x).data, tw.matmul(x, w.data))


def test_an_array_that_was_replaced():
    """A parameter's array, its gradient, the state of an optimizer, the mode of a module."""
    eager, compiled = Classifier(), Classifier()
    step = tw.compile(compiled.step)

    def both(i):
        assert harness.same_bits(eager.step(*batch(i)).data, step(*batch(i)).data), i

    for i in range(4):
        both(i)
    start = counts()
    for net in (eager, compiled):
        p = next(net.model.parameters())
        p.data = p.data[::-1].copy()
    both(4)
    assert (counts() - start).tolist() == [0, 1, 0], "recorded again"
    both(5), both(6)
    for net in (eager, compiled):
        net.optimizer.state[next(net.model.parameters())]["m"] = np.ones((128, 64), f32)
    both(7), both(8), both(9)
    saved = eager.optimizer.state_dict()
    for net in (eager, compiled):
        net.optimizer.load_state_dict({k: np.array(v) for k, v in saved.items()})
        net.model.load_state_dict({k: v * 2 for k, v in net.model.state_dict().items()})
    both(10), both(11), both(12)
    assert same(eager.state(), compiled.state())


def test_a_module_in_another_mode():
    layer = tw.nn.Dropout(0.5).train()
    step = tw.compile(lambda x: layer(tw.relu(x)))
    x = tw.tensor(np.ones((9, 9), f32))
    assert all((step(x).data == 0).any() for _ in range(4))
    layer.eval()
    assert all((step(x).data == 1).all() for _ in range(4))


def test_packed_weights_follow_the_weight():
    linear = tw.nn.Linear(70, 30).eval()
    x = tw.tensor(np.random.default_rng(0).standard_normal((3, 70), f32))

    def step(x):
        with tw.no_grad():
            return linear(x)

    compiled = tw.compile(step)
    for i in range(9):
        if i % 4 == 3:
            with tw.no_grad():
                linear.weight[0] = float(i)
        assert harness.same_bits(step(x).data, compiled(x).data), i


def test_results_are_fresh_and_arguments_come_back():
    step = tw.compile(lambda x, y: {"x": x, "sum": [tw.relu(x), None, (y, 3)]})
    kept = []
    for i in range(5):
        x, y = np.full(4, i, f32), tw.tensor(np.zeros(2, f32))
        found = step(x, y)
        kept.append(found["sum"][0])
        assert i < 2 or (found["x"] is x and found["sum"][2][0] is y)
        assert found["sum"][1] is None
    assert [k[0] for k in kept] == [0, 1, 2, 3, 4]


def test_a_step_inside_a_step():
    inner = tw.compile(lambda x: tw.relu(x))
    outer = tw.compile(lambda x: tw.gelu(inner(x)))
    x = np.linspace(-3, 3, 50, dtype=f32)
    assert all(harness.same_bits(outer(x), tw.gelu(tw.relu(x))) for _ in range(4))


def test_temporaries_share_one_arena():
    x = np.ones((1000,), f32)

    def step(x):
        for _ in range(20):
            x = tw.relu(x)
        return x

    compiled = tw.compile(step)
    for _ in range(3):
        compiled(x)
    (program,) = compiled._programs.values()
    assert 4096 <= program._core.arena_bytes <= 2 * 4096  # two live at a time


def test_a_parameter_that_is_frozen():
    eager, compiled = Classifier(), Classifier()
    step = tw.compile(compiled.step)
    for i in range(10):
        if i == 5:
            for net in (eager, compiled):
                next(net.model.parameters()).requires_grad = False
        assert harness.same_bits(eager.step(*batch(i)).data, step(*batch(i)).data), i
    for p, q in zip(eager.model.parameters(), compiled.model.parameters(), strict=True):
        assert harness.same_bits(p.data, q.data)
        assert (p.grad is None) == (q.grad is None)


def test_programs_and_drafts_are_bounded():
    step = tw.compile(lambda x, scale: tw.matmul(x, x, alpha=scale))
    x = np.eye(3, dtype=f32)
    for i in range(150):
        for _ in range(1 + 2 * (i % 2)):
            assert harness.same_bits(step(x, float(i)), tw.matmul(x, x, alpha=float(i)))
    assert len(step._programs) <= 64
    assert len(step._drafts) <= 8


# Models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantized", [False, True])
def test_decoding(quantized):
    """Logits of many tokens, through pages that begin, and keys that are forgotten."""
    config = tw.models.GPTConfig(vocab_size=50, context=300, layers=2, heads=2, width=48)
    model = tw.models.GPT(config, seed=2).eval()
    model = model.quantize() if quantized else model
    caches = [tw.KVCache(2, 1, 2, 24, 300, dtype="float32") for _ in range(2)]
    start = counts()

    def read(cache, ids, positions):
        with tw.no_grad():
            return model._head(model._trunk(ids, cache, positions))

    step = tw.compile(lambda ids, positions: read(caches[1], ids, positions))
    rng = np.random.default_rng(0)
    for i in range(280):
        at = i if i < 200 else i - 60
        if i == 200:
            for cache in caches:
                cache.truncate(140)
        ids = rng.integers(0, 50, (1, 1))
        want, got = read(caches[0], ids, np.array([[at]])), step(ids, np.array([[at]]))
        assert harness.same_bits(want.data, got.data), i
    assert (caches[0].lengths == caches[1].lengths).all()
    assert (counts() - start).tolist() == [2, 0, 278]


def test_generation_is_that_of_an_uncached_model():
    config = tw.models.GPTConfig(vocab_size=50, context=20, layers=1, heads=2, width=16)
    model = tw.models.GPT(config, seed=2).eval()
    start = counts()
    tokens = [1, 2, 3]
    for token in model.generate(tokens, 40, temperature=0):
        with tw.no_grad():
            if len(tokens) <= 20:
                logits = model(np.array([tokens])).data[0, -1]
                assert token == logits.argmax()
        tokens.append(token)
    assert (counts() - start)[2] > 30


def test_a_cache_that_is_full_and_one_that_is_emptied():
    cache = tw.KVCache(1, 1, 1, 4, 5, dtype="float32")

    def step(q):
        cache.append(0, q, q)
        return tw.attention(q, cache.layer(0), causal=True)

    compiled = tw.compile(step)
    q = np.ones((1, 1, 1, 4), f32)
    for _ in range(5):
        assert (compiled(q) == 1).all()
    with pytest.raises(tw.ShapeError, match="max_tokens"):
        compiled(q)
    cache.truncate(2)
    assert (compiled(q) == 1).all()
    assert cache.lengths.tolist() == [3]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_trainer(dropout):
    """Two programs, between which Python looks at the loss, against no program."""
    text = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8)
    config = tw.models.GPTConfig(context=16, layers=2, heads=2, width=32, dropout=dropout)
    trainers = []
    for _ in range(2):
        made = Trainer(tw.models.GPT(config, seed=1), text, Settings(steps=12, batch=4, clip=0.5))
        trainers.append(made)
    eager, compiled = trainers
    eager._differentiate, eager._update = eager._gradients, eager.optimizer.step
    start = counts()
    for a, b in zip(eager.run(), compiled.run(), strict=True):
        assert (a.loss, a.gradient_norm) == (b.loss, b.gradient_norm), a.number
    for p, q in zip(eager.parameters, compiled.parameters, strict=True):
        assert same((p.data, p.grad), (q.data, q.grad))
    # The update records until its gradients are those that the other program writes: three times.
    assert (counts() - start).tolist() == [5, 0, 19]
