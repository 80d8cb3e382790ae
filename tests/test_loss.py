"""Losses against their formulas in float64: values, gradients by both inputs, reductions."""

import ml_dtypes
import numpy as np
import pytest

import tilewright as tw
from harness import agrees, close
from tilewright import _core, nn

bf16 = ml_dtypes.bfloat16
REDUCTIONS = {"mean": np.mean, "sum": np.sum, "none": lambda losses: losses}


def array(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def probabilities(rng, *shape):
    return rng.uniform(0.05, 0.95, shape).astype(np.float32)


def log_softmax(x, axis=-1):
    x = x - x.max(axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis, keepdims=True))


def huber(x, y, delta=1.0):
    d = abs(x - y)
    return np.where(d <= delta, d * d / 2, delta * (d - delta / 2))


def bce(x, y, weight=1.0):
    return -weight * (y * np.log(x) + (1 - y) * np.log1p(-x))


def bce_logits(x, y, weight=1.0, positive=1.0):
    log_p, log_q = -np.logaddexp(0, -x), -np.logaddexp(0, x)
    return -weight * (positive * y * log_p + (1 - y) * log_q)


# name: (loss by reduction, formula, x, y)
LOSSES = {
    "mse": (nn.MSELoss, lambda x, y: (x - y) ** 2, array, array),
    "l1": (nn.L1Loss, lambda x, y: abs(x - y), array, array),
    "huber": (nn.HuberLoss, huber, array, array),
    "huber 0.3": (
        lambda **k: nn.HuberLoss(delta=0.3, **k),
        lambda x, y: huber(x, y, 0.3),
        array,
        array,
    ),
    "smooth l1": (nn.SmoothL1Loss, huber, array, array),
    "smooth l1 0.3": (
        lambda **k: nn.SmoothL1Loss(beta=0.3, **k),
        lambda x, y: huber(x, y, 0.3) / 0.3,
        array,
        array,
    ),
    "smooth l1 0": (
        lambda **k: nn.SmoothL1Loss(beta=0.0, **k),
        lambda x, y: abs(x - y),
        array,
        array,
    ),
    "bce": (nn.BCELoss, bce, probabilities, probabilities),
    "bce weight": (
        lambda **k: nn.BCELoss(np.float32([1, 2, 3, 4]), **k),
        lambda x, y: bce(x, y, np.array([1, 2, 3, 4])),
        probabilities,
        probabilities,
    ),
    "logits": (nn.BCEWithLogitsLoss, bce_logits, array, probabilities),
    "logits weights": (
        lambda **k: nn.BCEWithLogitsLoss(
            np.float32([[1], [2], [3]]), pos_weight=np.float32([1, 2, 0.5, 4]), **k
        ),
        lambda x, y: bce_logits(x, y, np.array([[1], [2], [3]]), np.array([1, 2, 0.5, 4])),
        array,
        probabilities,
    ),
    "kl": (nn.KLDivLoss, lambda x, y: y * (np.log(y) - x), array, probabilities),
    "kl log": (
        lambda **k: nn.KLDivLoss(log_target=True, **k),
        lambda x, y: np.exp(y) * (y - x),
        array,
        array,
    ),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_elementwise_losses(rng, name, reduction):
    make, formula, of_x, of_y = LOSSES[name]
    loss = make(reduction=reduction)
    x, y = of_x(rng, 3, 4), of_y(rng, 3, 4)
    agrees(loss, lambda x, y: REDUCTIONS[reduction](formula(x, y)), x, y)
    close(loss(x, y), REDUCTIONS[reduction](formula(x.astype(float), y.astype(float))))
    strided = [np.repeat(a, 2, axis=1)[:, ::2] for a in (x, y)]
    assert np.array_equal(loss(*strided), loss(x, y))


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_gives_a_float32_loss_and_bfloat16_gradients(rng, name):
    make, formula, of_x, of_y = LOSSES[name]
    x, y = of_x(rng, 3, 4).astype(bf16), of_y(rng, 3, 4)
    t = tw.tensor(x, requires_grad=True)
    loss = make(reduction="mean")(t, y)
    assert loss.dtype == np.float32
    close(loss, formula(x.astype(float), y.astype(float)).mean())
    loss.backward()
    assert t.grad.dtype == bf16


def test_batchmean_is_the_divergence(rng):
    p, q = (np.exp(log_softmax(array(rng, 5, 7).astype(float))) for _ in range(2))
    loss = nn.KLDivLoss(reduction="batchmean")
    want = (p * np.log(p / q)).sum(-1).mean()
    close(loss(np.log(q).astype(np.float32), p.astype(np.float32)), want)
    certain = np.eye(7, dtype=np.float32)  # 0 log 0 is 0
    x = tw.tensor(np.log(q).astype(np.float32)[[0] * 7], requires_grad=True)
    loss(x, certain).backward()
    close(x.grad, -certain / 7)


def test_edges_of_binary_cross_entropy():
    """Certain and wrong: a finite loss from probabilities, an exact one from logits."""
    x = tw.tensor([0.0, 1.0, 0.0, 1.0], requires_grad=True)
    y = np.float32([0, 1, 1, 0])
    loss = nn.BCELoss(reduction="none")(x, y)
    assert loss.numpy().tolist() == [0, 0, 100, 100]
    loss.sum().backward()
    assert np.isfinite(x.grad).all()
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        nn.BCELoss()(np.float32([1.5]), np.float32([1]))
    z = tw.tensor([-1e4, 1e4, -1e4, 1e4], requires_grad=True)
    loss = nn.BCEWithLogitsLoss(reduction="none")(z, y)
    assert loss.numpy().tolist() == [0, 0, 1e4, 1e4]
    loss.sum().backward()
    assert z.grad.tolist() == [0, 0, -1, 1]


@pytest.mark.parametrize("name", LOSSES)
def test_nan_empty_and_wrong_inputs(rng, name):
    make, _, of_x, of_y = LOSSES[name]
    x, y = of_x(rng, 3, 4), of_y(rng, 3, 4)
    x[1, 2] = np.nan
    found = np.asarray(make(reduction="none")(x, y))
    assert np.argwhere(np.isnan(found)).tolist() == [[1, 2]]
    with pytest.raises(tw.ShapeError, match="y must have shape"):
        make()(x, y[:2])
    with pytest.raises(tw.DtypeError, match="float64"):
        make()(x, y.astype(np.float64))
    with pytest.raises(tw.DtypeError, match="must be float"):
        make()(x, np.ones((3, 4), np.int64))
    with pytest.raises(ValueError, match="reduction must be"):
        make(reduction="median")
    if "weight" not in name:
        nothing = np.zeros((0, 4), np.float32)
        assert make(reduction="sum")(nothing, nothing) == 0
        assert np.isnan(make()(nothing, nothing))


def test_weights_that_do_not_fit(rng):
    with pytest.raises(tw.ShapeError, match="weight must broadcast"):
        nn.BCELoss(np.ones(3, np.float32))(probabilities(rng, 3, 4), probabilities(rng, 3, 4))
    with pytest.raises(tw.ShapeError, match="pos_weight must broadcast"):
        nn.BCEWithLogitsLoss(pos_weight=np.ones((2, 3, 4), np.float32))(*[array(rng, 3, 4)] * 2)
    with pytest.raises(ValueError, match="delta"):
        nn.HuberLoss(delta=0.0)
    with pytest.raises(ValueError, match="beta"):
        nn.SmoothL1Loss(beta=-1.0)


def test_weights_are_buffers(tmp_path):
    loss = nn.BCEWithLogitsLoss(pos_weight=np.float32([1, 2]))
    assert list(loss.state_dict()) == ["pos_weight"]
    tw.save(loss.state_dict(), tmp_path / "l")
    other = nn.BCEWithLogitsLoss(pos_weight=np.float32([0, 0]))
    other.load_state_dict(tw.load(tmp_path / "l"))
    assert other.pos_weight.tolist() == [1, 2]


# Of classes -------------------------------------------------------------------------------------


def nll(x, target, weight, ignored=-100):
    """Losses and weights, the classes on axis 1."""
    counts = target != ignored
    ids = np.where(counts, target, 0)
    picked = np.take_along_axis(x, np.expand_dims(ids, 1 if x.ndim > 1 else 0), min(1, x.ndim - 1))
    w = counts.astype(float) if weight is None else np.where(counts, weight[ids], 0)
    return -picked.reshape(target.shape) * w, w


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (3, 5, 2), (2, 5, 3, 2)])
def test_nll(rng, reduction, weighted, shape):
    C, batch = shape[-1] if len(shape) == 1 else shape[1], shape[:1] + shape[2:]
    target = rng.integers(0, C, batch if len(shape) > 1 else ())
    if target.ndim:
        target.flat[1] = -100
    weight = np.linspace(0.5, 2, C).astype(np.float32) if weighted else None

    def definition(x):
        losses, w = nll(x, target, weight)
        return losses.sum() / w.sum() if reduction == "mean" else REDUCTIONS[reduction](losses)

    loss = nn.NLLLoss(weight, reduction=reduction)
    agrees(lambda x: loss(x, target), definition, array(rng, *shape))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(5,), (4, 5), (3, 5, 2), (2, 5, 3, 2)])
def test_cross_entropy_has_its_classes_on_axis_1(rng, reduction, shape):
    axis = 0 if len(shape) == 1 else 1
    target = rng.integers(0, 5, shape[:axis] + shape[axis + 1 :])
    if target.ndim:
        target.flat[1] = 7

    def definition(x):
        losses, w = nll(log_softmax(x, axis), target, None, 7)
        return losses.sum() / w.sum() if reduction == "mean" else REDUCTIONS[reduction](losses)

    loss = nn.CrossEntropyLoss(reduction=reduction, ignore_index=7)
    agrees(lambda x: loss(x, target), definition, array(rng, *shape))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["ids", "probabilities"])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (3, 5, 2)])
def test_weights_smoothing_and_probabilities(rng, reduction, smoothing, kind, shape):
    """Smoothing mixes each target with an even spread; weights multiply the terms of classes."""
    axis = 0 if len(shape) == 1 else 1
    weight = np.linspace(0.5, 2, 5).astype(np.float32)
    along = weight.reshape([5 if i == axis else 1 for i in range(len(shape))]).astype(float)
    if kind == "ids":
        target = rng.integers(0, 5, shape[:axis] + shape[axis + 1 :])
        spread = np.moveaxis(np.eye(5)[target], -1, axis)
        divisor = weight[target].sum()
    else:
        target = rng.random(shape).astype(np.float32)
        target /= target.sum(axis, keepdims=True)
        spread = target.astype(float)
        divisor = spread.sum()
    spread = (1 - smoothing) * spread + smoothing / 5

    def definition(x):
        losses = -(along * spread * log_softmax(x, axis)).sum(axis)
        return losses.sum() / divisor if reduction == "mean" else REDUCTIONS[reduction](losses)

    loss = nn.CrossEntropyLoss(weight, reduction=reduction, label_smoothing=smoothing)
    agrees(lambda x: loss(x, target), definition, array(rng, *shape))


def test_what_nll_refuses(rng):
    loss, x = nn.NLLLoss(), array(rng, 3, 4)
    for target, error, match in [
        (np.array([0, 4, 1]), tw.ShapeError, r"\[0, 4\), got 4"),
        (np.array([0, -1, 1]), tw.ShapeError, "got -1"),
        (np.array([0, 1]), tw.ShapeError, r"shape \(3,\)"),
        (np.array([0.0, 1.0, 2.0], np.float32), tw.DtypeError, "int32 or int64"),
    ]:
        with pytest.raises(error, match=match):
            loss(x, target)
    with pytest.raises(tw.ShapeError, match="weight"):
        nn.NLLLoss(np.ones(3, np.float32))(x, np.array([0, 1, 2]))
    ignored = np.array([-100, -100, -100])
    t = tw.tensor(x, requires_grad=True)
    found = loss(t, ignored)
    assert np.isnan(found.numpy())
    found.backward()
    assert not t.grad.any()
    with pytest.raises(ValueError, match="reduction"):
        nn.CrossEntropyLoss(reduction="median")


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_without_classes(reduction):
    """Only rows that are ignored, or probabilities, can have none."""
    logits = tw.tensor(np.zeros((1000, 0), np.float32), requires_grad=True)
    for target, loss in [(np.full(1000, -100), np.nan), (np.zeros((1000, 0), np.float32), 0.0)]:
        y = tw.cross_entropy(logits, target, reduction=reduction)
        want = {"none": np.zeros(1000), "sum": 0.0, "mean": loss}[reduction]
        np.testing.assert_array_equal(y.numpy(), want)
        y.sum().backward()
        assert logits.grad.shape == (1000, 0)
    with pytest.raises(tw.ShapeError, match="target must be in"):
        tw.cross_entropy(logits, np.zeros(1000, np.int64))


def test_cross_entropy_writes_an_lse_for_every_row():
    """Also of rows without classes: the array for them has to have the room."""
    memory, loss = np.zeros(1000, np.float32), np.zeros((), np.float32)
    arguments = (np.zeros((1000, 0), np.float32), np.full(1000, -100), None, 0.0, -100, "sum", loss)
    with pytest.raises(tw.ShapeError, match="lse must be a contiguous array of 1000 elements"):
        _core.cross_entropy_forward(*arguments, memory[:0], None)
    assert not memory.any()
    _core.cross_entropy_forward(*arguments, memory, None)
    assert (memory == -np.inf).all()
