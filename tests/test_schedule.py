"""Learning-rate schedules against their formulas, alone and combined, and their state."""

import copy
import json
import math
import pickle

import numpy as np
import pytest

import tilewright as tw

optim = tw.optim


def optimizer(*rates):
    groups = [{"params": tw.tensor([1.0], requires_grad=True), "lr": r} for r in rates or (2.0,)]
    return optim.SGD(groups)


def rates(schedule, count):
    """The first group's rate at steps 0, 1, ..."""
    found = []
    for _ in range(count):
        found.append(schedule.optimizer.lr)
        schedule.step()
    return found


def cosine(t, top, bottom=0.0):
    return bottom + (top - bottom) * (1 + math.cos(math.pi * t)) / 2


SCHEDULES = {
    "constant": (lambda o: optim.ConstantLR(o, 0.5, 3), lambda t: 1.0 if t < 3 else 2.0),
    "linear": (lambda o: optim.LinearLR(o, 0.2, 1.0, 4), lambda t: 2 * min(1, 0.2 + 0.2 * t)),
    "polynomial": (lambda o: optim.PolynomialLR(o, 6, 2.0), lambda t: 2 * max(0, 1 - t / 6) ** 2),
    "step": (lambda o: optim.StepLR(o, 3, 0.5), lambda t: 2 * 0.5 ** (t // 3)),
    "multistep": (
        lambda o: optim.MultiStepLR(o, [5, 2], 0.1),
        lambda t: 2.0 if t < 2 else 0.2 if t < 5 else 0.02,
    ),
    "exponential": (lambda o: optim.ExponentialLR(o, 0.9), lambda t: 2 * 0.9**t),
    "lambda": (lambda o: optim.LambdaLR(o, one_over), lambda t: 2 / (1 + t)),
    "cosine": (lambda o: optim.CosineAnnealingLR(o, 6, 0.5), lambda t: cosine(t / 6, 2, 0.5)),
    "restarts": (
        lambda o: optim.CosineAnnealingWarmRestarts(o, 2, 2, 0.5),
        lambda t: cosine([0, 1 / 2, 0, 1 / 4, 2 / 4, 3 / 4, 0, 1 / 8, 2 / 8, 3 / 8][t], 2, 0.5),
    ),
    "restarts alike": (
        lambda o: optim.CosineAnnealingWarmRestarts(o, 3),
        lambda t: cosine(t % 3 / 3, 2),
    ),
    "sequential": (
        lambda o: optim.SequentialLR(
            o, [optim.LinearLR(o, 0.25, 1.0, 3), optim.CosineAnnealingLR(o, 7)], [3]
        ),
        lambda t: 2 * (0.25 + 0.25 * t) if t < 3 else cosine((t - 3) / 7, 2),
    ),
    "chained": (
        lambda o: optim.ChainedScheduler(
            [optim.ConstantLR(o, 0.5, 3), optim.ExponentialLR(o, 0.9)]
        ),
        lambda t: (1.0 if t < 3 else 2.0) * 0.9**t,
    ),
}


def one_over(step):
    return 1 / (1 + step)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_formula(name):
    make, formula = SCHEDULES[name]
    schedule = make(optimizer())
    assert rates(schedule, 10) == pytest.approx([formula(t) for t in range(10)])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("way", ["json", "file", "pickle", "deepcopy"])
def test_state_round_trip(name, way, tmp_path):
    make, formula = SCHEDULES[name]
    schedule = make(optimizer())
    rates(schedule, 4)
    if way == "pickle":
        other = pickle.loads(pickle.dumps(schedule))
    elif way == "deepcopy":
        other = copy.deepcopy(schedule)
    else:
        other = make(optimizer(7.0))  # a base rate that the state replaces
        if way == "json":
            other.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
        else:
            tw.save(schedule.state_dict(), tmp_path / "s")
            other.load_state_dict(tw.load(tmp_path / "s"))
    assert other.optimizer.lr == schedule.optimizer.lr
    assert rates(other, 6) == pytest.approx([formula(t) for t in range(4, 10)])


def test_each_group_has_its_own_rate():
    o = optimizer(2.0, 0.5)
    schedule = optim.ExponentialLR(o, 0.5)
    schedule.step()
    assert schedule.get_last_lr() == [1.0, 0.25]
    o.add_param_group({"params": tw.tensor([1.0], requires_grad=True), "lr": 8.0})
    schedule.step()
    assert schedule.get_last_lr() == [0.5, 0.125, 2.0]
    assert schedule.base_lrs == [2.0, 0.5, 8.0]
    with pytest.raises(tw.FormatError, match="3 groups"):
        schedule.load_state_dict({**schedule.state_dict(), "base_lrs": [1.0]})
    with pytest.raises(tw.FormatError, match="gamma"):
        schedule.load_state_dict({"last_epoch": 3, "base_lrs": [1.0]})


def test_a_function_for_each_group():
    o = optimizer(2.0, 0.5)
    schedule = optim.LambdaLR(o, [one_over, lambda t: 3.0**t])
    assert schedule.get_last_lr() == [2.0, 0.5]
    schedule.step()
    assert schedule.get_last_lr() == [1.0, 1.5]
    o = optimizer(2.0, 0.5)
    parts = [optim.LambdaLR(o, [one_over, lambda t: 3.0**t]), optim.ExponentialLR(o, 0.5)]
    chained = optim.ChainedScheduler(parts)
    chained.step()
    assert chained.get_last_lr() == [0.5, 0.75]
    sequential = optim.SequentialLR(o, parts, [2])
    assert [sequential._rate(1, t, 4.0) for t in range(4)] == [4.0, 12.0, 4.0, 2.0]
    for wrong in ([one_over], [one_over] * 3, []):
        with pytest.raises(ValueError, match=r"LambdaLR: lr_lambda must be .* a list of 2"):
            optim.LambdaLR(o, wrong)


@pytest.mark.parametrize("name", [n for n in SCHEDULES if n != "chained"])
def test_last_epoch_goes_on(name):
    """A schedule made for the step after ``last_epoch`` from the groups' ``initial_lr``."""
    _, formula = SCHEDULES[name]
    group = {"params": tw.tensor([1.0], requires_grad=True), "lr": 0.123, "initial_lr": 2.0}
    o = optim.SGD([group])
    schedule = RESUMED[name](o, 3)
    assert schedule.last_epoch == 4
    assert rates(schedule, 6) == pytest.approx([formula(t) for t in range(4, 10)])
    message = "last_epoch 3 needs 'initial_lr' in every group"
    if name != "sequential":  # whose parts were made before and left it
        with pytest.raises(ValueError, match=message):
            RESUMED[name](optimizer(), 3)


RESUMED = {
    "constant": lambda o, last: optim.ConstantLR(o, 0.5, 3, last),
    "linear": lambda o, last: optim.LinearLR(o, 0.2, 1.0, 4, last),
    "polynomial": lambda o, last: optim.PolynomialLR(o, 6, 2.0, last),
    "step": lambda o, last: optim.StepLR(o, 3, 0.5, last),
    "multistep": lambda o, last: optim.MultiStepLR(o, [5, 2], 0.1, last),
    "exponential": lambda o, last: optim.ExponentialLR(o, 0.9, last),
    "lambda": lambda o, last: optim.LambdaLR(o, [one_over], last),
    "cosine": lambda o, last: optim.CosineAnnealingLR(o, 6, 0.5, last),
    "restarts": lambda o, last: optim.CosineAnnealingWarmRestarts(o, 2, 2, 0.5, last),
    "restarts alike": lambda o, last: optim.CosineAnnealingWarmRestarts(o, 3, last_epoch=last),
    "sequential": lambda o, last: optim.SequentialLR(
        o, [optim.LinearLR(o, 0.25, 1.0, 3), optim.CosineAnnealingLR(o, 7)], [3], last
    ),
}


def test_cosine_schedule():
    o = optimizer()
    schedule = optim.CosineSchedule(o, 10, warmup_steps=4, min_lr_ratio=0.1)
    found = rates(schedule, 13)
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert found[4] == pytest.approx(2.0)
    assert found[7] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert found[10:] == pytest.approx([0.2, 0.2, 0.2])


def test_reduce_on_plateau():
    o = optimizer(1.0, 0.3)
    schedule = optim.ReduceLROnPlateau(
        o, factor=0.5, patience=1, threshold=0.1, cooldown=1, min_lr=[0.0, 0.2]
    )
    seen = []
    # The second is no improvement by a tenth, nor the third: reduced. The fourth cools down.
    for loss in (1.0, 0.95, 0.91, 0.95, 0.95, 0.95, 0.5, np.nan, tw.tensor(0.6)):
        schedule.step(loss)
        seen.append(o.lr)
    assert seen == [1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125]
    assert o.param_groups[1]["lr"] == 0.2
    assert (schedule.best, schedule.last_epoch) == (0.5, 9)


@pytest.mark.parametrize(
    ("mode", "threshold_mode", "numbers"),
    [
        ("max", "rel", [1.0, 1.15, 1.2, 1.0]),
        ("max", "abs", [1.0, 1.15, 1.2, 1.0]),
        ("min", "abs", [1.0, 0.85, 0.8, 1.0]),
    ],
)
def test_what_counts_as_an_improvement(mode, threshold_mode, numbers):
    schedule = optim.ReduceLROnPlateau(
        optimizer(), mode, threshold=0.1, threshold_mode=threshold_mode
    )
    bad = []
    for number in numbers:
        schedule.step(number)
        bad.append(schedule.num_bad_epochs)
    assert bad == [0, 0, 1, 2]


def test_state_of_a_plateau(tmp_path):
    schedule = optim.ReduceLROnPlateau(optimizer(), patience=2)
    for loss in (1.0, 2.0, 2.0):
        schedule.step(loss)
    tw.save(schedule.state_dict(), tmp_path / "s")
    for other in (
        optim.ReduceLROnPlateau(optimizer(5.0), patience=2),
        pickle.loads(pickle.dumps(schedule)),
    ):
        other.load_state_dict(tw.load(tmp_path / "s"))
        assert other.optimizer.lr == 2.0
        other.step(2.0)
        assert other.optimizer.lr == pytest.approx(0.2)
    with pytest.raises(tw.FormatError, match="best"):
        schedule.load_state_dict({"lrs": [1.0]})


def test_schedules_that_make_no_sense():
    o = optimizer()
    for make, match in [
        (lambda: optim.CosineSchedule(o, 3, warmup_steps=4), "warmup_steps"),
        (lambda: optim.ConstantLR(o, 1.5), "factor"),
        (lambda: optim.LinearLR(o, 0.0), "start_factor"),
        (lambda: optim.StepLR(o, 0), "step_size"),
        (lambda: optim.CosineAnnealingLR(o, 0), "T_max"),
        (lambda: optim.CosineAnnealingWarmRestarts(o, 0), "T_0"),
        (lambda: optim.SequentialLR(o, [optim.StepLR(o, 1)], [3]), "milestone"),
        (lambda: optim.SequentialLR(optimizer(), [optim.StepLR(o, 1)], []), "one optimizer"),
        (lambda: optim.ChainedScheduler([optim.ReduceLROnPlateau(o)]), "ReduceLROnPlateau"),
        (lambda: optim.ChainedScheduler([]), "at least one"),
        (lambda: optim.ReduceLROnPlateau(o, "least"), "mode"),
        (lambda: optim.ReduceLROnPlateau(o, factor=1.0), "factor"),
    ]:
        with pytest.raises(ValueError, match=match):
            make()
