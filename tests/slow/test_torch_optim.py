"""Optimizers, clipping and schedules against PyTorch, step by step."""

import warnings

import numpy as np
import pytest

import tilewright as tw

torch = pytest.importorskip("torch", reason="torch is not installed: parity is not checked")
pytestmark = pytest.mark.slow

STEPS = 20

OPTIMIZERS = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.5}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "maximize": True}),
    ("Adam", {}),
    ("Adam", {"lr": 0.05, "betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.5}),
    ("Adam", {"lr": 0.05, "weight_decay": 0.5, "amsgrad": True}),
    ("Adam", {"lr": 0.05, "weight_decay": 0.5, "maximize": True}),
    ("Adam", {"lr": 0.05, "weight_decay": 0.5, "decoupled_weight_decay": True}),
    ("AdamW", {}),
    ("AdamW", {"lr": 0.05, "betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.5}),
    ("AdamW", {"lr": 0.05, "betas": (0.5, 0.6), "amsgrad": True, "maximize": True}),
    ("RMSprop", {}),
    ("RMSprop", {"alpha": 0.7, "eps": 1e-3, "weight_decay": 0.5}),
    ("RMSprop", {"momentum": 0.9}),
    ("RMSprop", {"centered": True}),
    ("RMSprop", {"centered": True, "momentum": 0.5, "weight_decay": 0.1, "maximize": True}),
]


def pair(rng, name, options, groups=False):
    """Our and PyTorch's optimizer over parameters with the same values."""
    start = [rng.standard_normal(shape).astype(np.float32) for shape in [(5, 7), (3,), (2, 3, 4)]]
    ours = [tw.tensor(x, requires_grad=True) for x in start]
    theirs = [torch.tensor(x, requires_grad=True) for x in start]
    if groups:
        ours, theirs = (
            [{"params": [p[0]]}, {"params": p[1:], "lr": 0.03, "weight_decay": 0.0}]
            for p in (ours, theirs)
        )
    return getattr(tw.optim, name)(ours, **options), getattr(torch.optim, name)(theirs, **options)


def parameters(theirs):
    return [p for group in theirs.param_groups for p in group["params"]]


def give_gradients(rng, ours, theirs, skip=()):
    for i, (x, z) in enumerate(zip(ours.params, parameters(theirs), strict=True)):
        x.grad = z.grad = None
        if i not in skip:
            x.grad = rng.standard_normal(x.shape).astype(np.float32)
            z.grad = torch.tensor(x.grad)


def same(ours, theirs):
    for x, z in zip(ours.params, parameters(theirs), strict=True):
        np.testing.assert_allclose(x.numpy(), z.detach().numpy(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
@pytest.mark.parametrize("groups", [False, True])
def test_steps(rng, name, options, groups):
    ours, theirs = pair(rng, name, options, groups)
    for step in range(STEPS):
        give_gradients(rng, ours, theirs, skip={1} if step % 3 == 0 else ())
        ours.step()
        theirs.step()
        same(ours, theirs)


def test_where_centered_rmsprop_differs():
    """A gradient that stays the same: rounding makes PyTorch's variance negative, ours is 0."""
    ours = tw.tensor(np.zeros(64), dtype=np.float32, requires_grad=True)
    theirs = torch.zeros(64, requires_grad=True)
    ours.grad = np.linspace(0.1, 3, 64, dtype=np.float32)
    theirs.grad = torch.tensor(ours.grad)
    a = tw.optim.RMSprop([ours], centered=True, alpha=0.5)
    b = torch.optim.RMSprop([theirs], centered=True, alpha=0.5)
    for _ in range(200):
        a.step()
        b.step()
    assert torch.isnan(theirs).any()
    assert np.isfinite(ours.numpy()).all()


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, float("inf")])
def test_clipping(rng, norm_type):
    ours, theirs = pair(rng, "SGD", {})
    clip = torch.nn.utils.clip_grad_norm_
    for limit in (0.3, 1e3):
        give_gradients(rng, ours, theirs)
        norm = tw.optim.clip_grad_norm_(ours.params, limit, norm_type)
        assert norm == pytest.approx(clip(parameters(theirs), limit, norm_type).item(), rel=1e-5)
        ours.step()
        theirs.step()
    give_gradients(rng, ours, theirs)
    tw.optim.clip_grad_value_(ours.params, 0.4)
    torch.nn.utils.clip_grad_value_(parameters(theirs), 0.4)
    ours.step()
    theirs.step()
    same(ours, theirs)


def sequential(s, o):
    parts = [s.LinearLR(o, 0.1, 1.0, 4), s.CosineAnnealingLR(o, 7), s.ExponentialLR(o, 0.9)]
    return s.SequentialLR(o, parts, [4, 12])


SCHEDULES = {
    "constant": lambda s, o: s.ConstantLR(o, 0.3, 4),
    "linear": lambda s, o: s.LinearLR(o, 0.2, 0.8, 7),
    "polynomial": lambda s, o: s.PolynomialLR(o, 9, 1.5),
    "step": lambda s, o: s.StepLR(o, 4, 0.3),
    "multistep": lambda s, o: s.MultiStepLR(o, [3, 3, 8], 0.3),
    "exponential": lambda s, o: s.ExponentialLR(o, 0.8),
    "lambda": lambda s, o: s.LambdaLR(o, lambda t: 1 / (1 + t)),
    "lambdas": lambda s, o: s.LambdaLR(o, [lambda t: 1 / (1 + t), lambda t: 0.9**t]),
    "cosine": lambda s, o: s.CosineAnnealingLR(o, 12, 0.01),
    "cosine over": lambda s, o: s.CosineAnnealingLR(o, 5),
    "restarts": lambda s, o: s.CosineAnnealingWarmRestarts(o, 3, 2, 0.01),
    "restarts alike": lambda s, o: s.CosineAnnealingWarmRestarts(o, 4),
    "sequential": sequential,
    "chained": lambda s, o: s.ChainedScheduler([s.ConstantLR(o, 0.3, 4), s.ExponentialLR(o, 0.8)]),
    "chained cosine": lambda s, o: s.ChainedScheduler(
        [s.CosineAnnealingLR(o, 30), s.LinearLR(o, 0.2, 1.0, 5)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(rng, name):
    ours, theirs = pair(rng, "SGD", {"lr": 0.1}, groups=True)
    a = SCHEDULES[name](tw.optim.lr_scheduler, ours)
    b = SCHEDULES[name](torch.optim.lr_scheduler, theirs)
    for _ in range(STEPS):
        assert a.get_last_lr() == pytest.approx(
            [group["lr"] for group in theirs.param_groups], rel=1e-6, abs=1e-12
        )
        theirs.step()
        a.step()
        with warnings.catch_warnings():  # SequentialLR passes on an argument it deprecates
            warnings.simplefilter("ignore")
            b.step()


RESUMED = {
    "constant": lambda s, o, last: s.ConstantLR(o, 0.3, 9, last),
    "linear": lambda s, o, last: s.LinearLR(o, 0.2, 0.8, 9, last),
    "polynomial": lambda s, o, last: s.PolynomialLR(o, 9, 1.5, last),
    "step": lambda s, o, last: s.StepLR(o, 4, 0.3, last),
    "multistep": lambda s, o, last: s.MultiStepLR(o, [3, 3, 8], 0.3, last),
    "exponential": lambda s, o, last: s.ExponentialLR(o, 0.8, last),
    "lambda": lambda s, o, last: s.LambdaLR(o, lambda t: 1 / (1 + t), last),
    "lambdas": lambda s, o, last: s.LambdaLR(o, [lambda t: 1 / (1 + t), lambda t: 0.9**t], last),
    "cosine": lambda s, o, last: s.CosineAnnealingLR(o, 12, 0.01, last),
    "restarts": lambda s, o, last: s.CosineAnnealingWarmRestarts(o, 3, 2, 0.01, last),
}


@pytest.mark.parametrize("name", RESUMED)
def test_schedules_that_go_on(rng, name):
    """Both stop after five steps; new ones take their rates and go on by ``last_epoch``."""
    make, found = RESUMED[name], []
    for library, o in zip((tw, torch), pair(rng, "SGD", {"lr": 0.1}, groups=True), strict=True):
        s = library.optim.lr_scheduler
        first = make(s, o, -1)
        for _ in range(5):
            o.step()
            first.step()
        kept = ("params", "lr", "initial_lr")
        o = library.optim.SGD([{n: g[n] for n in kept} for g in o.param_groups], lr=0.1)
        schedule = make(s, o, first.last_epoch - 1)
        rates = []
        for _ in range(STEPS):
            rates.append(schedule.get_last_lr())
            o.step()
            schedule.step()
        found.append((schedule.last_epoch, np.array(rates)))
    (a, ours), (b, theirs) = found
    assert a == b
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("threshold_mode", ["rel", "abs"])
def test_plateau(rng, mode, threshold_mode):
    ours, theirs = pair(rng, "SGD", {"lr": 0.1}, groups=True)
    options = {"mode": mode, "threshold_mode": threshold_mode, "factor": 0.5, "patience": 1}
    options |= {"threshold": 0.05, "cooldown": 1, "min_lr": [0.0, 0.01]}
    a = tw.optim.ReduceLROnPlateau(ours, **options)
    b = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, **options)
    for loss in rng.random(60):
        a.step(loss)
        b.step(loss)
        assert a.get_last_lr() == pytest.approx([group["lr"] for group in theirs.param_groups])
    assert a.get_last_lr()[1] == 0.01
