"""Optimizers against NumPy in float64, parameter groups, clipping, and their state."""

import copy
import pickle

import ml_dtypes
import numpy as np
import pytest

import harness
import tilewright as tw

bf16 = ml_dtypes.bfloat16


def parameters(rng, dtype=np.float32):
    """Three of odd sizes, with gradients; the second has none."""
    params = [
        tw.tensor(rng.standard_normal(shape).astype(dtype), requires_grad=True)
        for shape in [(3, 5), (4,), (1, 17, 3)]
    ]
    for p in (params[0], params[2]):
        p.grad = rng.standard_normal(p.shape).astype(dtype)
    return params


# Definitions in float64: parameters after some gradients -----------------------------------------


def adam(p, grads, o):
    m = v = largest = 0.0
    for t, g in enumerate(grads, 1):
        g, p = decayed(p, g, o)
        m = o["betas"][0] * m + (1 - o["betas"][0]) * g
        v = o["betas"][1] * v + (1 - o["betas"][1]) * g * g
        largest = np.maximum(largest, v)
        below = largest if o["amsgrad"] else v
        bias1, bias2 = 1 - o["betas"][0] ** t, 1 - o["betas"][1] ** t
        p = p - o["lr"] * m / bias1 / (np.sqrt(below / bias2) + o["eps"])
    return p


def sgd(p, grads, o):
    velocity = None
    for g in grads:
        g, p = decayed(p, g, o)
        if o["momentum"]:
            velocity = (
                g if velocity is None else o["momentum"] * velocity + (1 - o["dampening"]) * g
            )
            g = g + o["momentum"] * velocity if o["nesterov"] else velocity
        p = p - o["lr"] * g
    return p


def rmsprop(p, grads, o):
    square = mean = velocity = 0.0
    for g in grads:
        g, p = decayed(p, g, o)
        square = o["alpha"] * square + (1 - o["alpha"]) * g * g
        mean = o["alpha"] * mean + (1 - o["alpha"]) * g
        below = square - mean**2 if o["centered"] else square
        velocity = o["momentum"] * velocity + g / (np.sqrt(below) + o["eps"])
        p = p - o["lr"] * velocity
    return p


def decayed(p, g, o):
    """Both forms of weight decay: into the gradient, or off the parameter."""
    g = -g if o["maximize"] else g
    if o.get("decoupled_weight_decay"):
        return g, p * (1 - o["lr"] * o["weight_decay"])
    return g + o["weight_decay"] * p, p


OPTIMIZERS = {
    "sgd": (tw.optim.SGD, sgd, {"lr": 0.1}),
    "sgd decay": (tw.optim.SGD, sgd, {"lr": 0.1, "weight_decay": 0.3}),
    "momentum": (tw.optim.SGD, sgd, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3}),
    "dampening": (tw.optim.SGD, sgd, {"lr": 0.1, "momentum": 0.9, "dampening": 0.4}),
    "nesterov": (tw.optim.SGD, sgd, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "sgd up": (tw.optim.SGD, sgd, {"lr": 0.1, "weight_decay": 0.3, "maximize": True}),
    "adam": (tw.optim.Adam, adam, {"lr": 0.1}),
    "adam decay": (tw.optim.Adam, adam, {"lr": 0.1, "betas": (0.5, 0.8), "weight_decay": 0.3}),
    "adam up": (tw.optim.Adam, adam, {"lr": 0.1, "weight_decay": 0.3, "maximize": True}),
    "amsgrad": (tw.optim.Adam, adam, {"lr": 0.1, "betas": (0.5, 0.6), "amsgrad": True}),
    "adamw": (
        tw.optim.AdamW,
        adam,
        {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2},
    ),
    "adamw amsgrad": (tw.optim.AdamW, adam, {"lr": 0.1, "betas": (0.5, 0.6), "amsgrad": True}),
    "rmsprop": (tw.optim.RMSprop, rmsprop, {"lr": 0.01}),
    "rms decay": (tw.optim.RMSprop, rmsprop, {"alpha": 0.7, "weight_decay": 0.3, "eps": 1e-3}),
    "rms momentum": (tw.optim.RMSprop, rmsprop, {"momentum": 0.9}),
    "rms centered": (tw.optim.RMSprop, rmsprop, {"centered": True}),
    "rms both": (tw.optim.RMSprop, rmsprop, {"centered": True, "momentum": 0.5, "maximize": True}),
}


def make(name, params):
    kind, _, options = OPTIMIZERS[name]
    return kind(params, **options)


def expected(name, optimizer, start, grads):
    options = optimizer.param_groups[0]
    return OPTIMIZERS[name][1](start.astype(float), [g.astype(float) for g in grads], options)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_match_float64(rng, name, isa):
    params = parameters(rng)
    before = [p.numpy().copy() for p in params]
    grads = [[rng.standard_normal(p.shape).astype(np.float32) for p in params] for _ in range(4)]
    optimizer = make(name, params)
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g
        optimizer.step()
    for i, p in enumerate(params):
        want = expected(name, optimizer, before[i], [step[i] for step in grads])
        row, where = f"{type(optimizer).__name__} float32", f"isa={isa} {name}, 4 steps"
        harness.assert_within(row, p.numpy(), want, 2e-6 + 1e-5 * abs(want), where)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_without_a_gradient_rests_and_counts_its_own_steps(rng, name):
    params = parameters(rng)
    start = [p.numpy().copy() for p in params]
    optimizer = make(name, params)
    optimizer.step()
    assert np.array_equal(params[1].numpy(), start[1])
    late = rng.standard_normal(4).astype(np.float32)
    params[1].grad = late
    optimizer.step()
    want = expected(name, optimizer, start[1], [late])
    np.testing.assert_allclose(params[1].numpy(), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_many_tensors_of_any_layout_step_as_one_would(rng, name, threads):
    """Sizes around a task's, transposed and sliced arrays, any thread count: the same bits."""
    arrays = [
        rng.standard_normal(shape).astype(np.float32)
        for shape in [(8191,), (3, 8193), (1,), (0, 5)]
    ]
    grads = [rng.standard_normal(a.shape).astype(np.float32) for a in arrays]
    found = []
    for count in (1, 4):
        threads(count)
        params = [tw.Tensor(a.copy(), True) for a in arrays]
        params += [tw.Tensor(np.asfortranarray(arrays[1]), True)]
        params += [tw.Tensor(np.repeat(arrays[0], 2)[::2], True)]
        optimizer = make(name, params)
        for _ in range(2):
            for p, g in zip(params, [*grads, grads[1], grads[0]], strict=True):
                p.grad = g
            optimizer.step()
        found.append([p.numpy().tobytes() for p in params])
    assert found[0] == found[1]
    assert found[0][1] == found[0][4]
    assert found[0][0] == found[0][5]


def test_a_centered_rmsprop_survives_a_gradient_that_stays():
    p = tw.tensor(np.zeros(64), dtype=np.float32, requires_grad=True)
    optimizer = tw.optim.RMSprop([p], centered=True, alpha=0.5)
    p.grad = np.linspace(0.1, 3, 64, dtype=np.float32)
    for _ in range(200):
        optimizer.step()
    assert np.isfinite(p.numpy()).all()


def test_nan_in_a_gradient_reaches_its_own_element_alone(isa):
    for name in OPTIMIZERS:
        p = tw.tensor(np.ones(35), dtype=np.float32, requires_grad=True)
        p.grad = np.ones(35, np.float32)
        p.grad[17] = np.nan
        optimizer = make(name, [p])
        optimizer.step()
        optimizer.step()
        assert np.flatnonzero(np.isnan(p.numpy())).tolist() == [17], name


def test_groups_have_options_of_their_own(rng):
    a, b, c = parameters(rng)
    b.grad = rng.standard_normal(4).astype(np.float32)
    before = [p.numpy().copy() for p in (a, b, c)]
    groups = [{"params": [a]}, {"params": b, "lr": 0.5, "weight_decay": 0.0}]
    optimizer = tw.optim.AdamW(groups, lr=0.1, weight_decay=0.4)
    optimizer.add_param_group({"params": [c], "eps": 0.1})
    assert [p is q for p, q in zip(optimizer.params, (a, b, c), strict=True)] == [True] * 3
    optimizer.step()
    for group, p, start in zip(optimizer.param_groups, (a, b, c), before, strict=True):
        want = adam(start.astype(float), [p.grad.astype(float)], group)
        np.testing.assert_allclose(p.numpy(), want, rtol=1e-5, atol=1e-6)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5, 0.1]
    assert optimizer.lr == 0.1
    optimizer.lr = 0.3
    assert [group["lr"] for group in optimizer.param_groups] == [0.3] * 3
    optimizer.zero_grad(set_to_none=False)
    assert not any(p.grad.any() for p in optimizer.params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in optimizer.params)
    assert "(1): 1 parameters, lr=0.3" in repr(optimizer)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("SGD", "momentum", 0.9),
        ("RMSprop", "momentum", 0.9),
        ("RMSprop", "centered", True),
        ("AdamW", "amsgrad", True),
    ],
)
def test_an_option_that_needs_state_may_be_set_between_steps(rng, name, option, value):
    """From then on as an optimizer whose state has been zeros until then, or a fresh velocity."""
    start, grads = rng.standard_normal(7), rng.standard_normal((4, 7)).astype(np.float32)
    kind = getattr(tw.optim, name)
    p = tw.tensor(start.astype(np.float32), requires_grad=True)
    optimizer = kind([p])
    for i, grad in enumerate(grads):
        if i == 2:
            optimizer.param_groups[0][option] = value
            again = tw.tensor(p.data, requires_grad=True)
            other = kind([again], **{option: value})
            other.load_state_dict(optimizer.state_dict())
        p.grad = grad
        optimizer.step()
        if i >= 2:
            again.grad = grad
            other.step()
            assert np.array_equal(p.data, again.data)
    assert all(a.any() for slot, a in optimizer.state[p].items() if slot != "step")


def test_a_velocity_that_starts_later_takes_its_first_gradient_whole():
    p = tw.tensor(np.zeros(3, np.float32), requires_grad=True)
    optimizer = tw.optim.SGD([p], lr=1.0, dampening=0.5)
    p.grad = np.ones(3, np.float32)
    optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.5
    optimizer.step()
    assert (p.data == -2).all()  # not -1.5
    optimizer.step()
    assert (p.data == -3).all()  # 0.5 * 1 + 0.5 * 1


def test_groups_that_make_no_sense(rng):
    a, b, c = parameters(rng)
    optimizer = tw.optim.SGD([a], lr=0.1)
    with pytest.raises(ValueError, match="twice"):
        optimizer.add_param_group({"params": [a]})
    with pytest.raises(ValueError, match="twice"):
        optimizer.add_param_group({"params": [b, b]})
    with pytest.raises(ValueError, match="got betas"):
        optimizer.add_param_group({"params": [b], "betas": (0.9, 0.9)})
    with pytest.raises(TypeError, match="ndarray"):
        optimizer.add_param_group({"params": [np.ones(3)]})
    with pytest.raises(TypeError, match="no op made"):
        optimizer.add_param_group({"params": [b * 2]})
    assert len(optimizer.param_groups) == 1
    assert c not in optimizer.state


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [bf16, np.float16])
def test_narrow_parameters_keep_float32_state(rng, name, dtype):
    params = parameters(rng, dtype)
    before, grad = params[0].numpy().astype(float), params[0].grad.astype(float)
    optimizer = make(name, params)
    optimizer.step()
    assert params[0].dtype == dtype
    arrays = optimizer.state_dict()
    slots = [name for name in arrays if name.endswith(".0")]
    assert all(arrays[name].dtype == np.float32 for name in slots)
    want = expected(name, optimizer, before, [grad])
    u = ml_dtypes.finfo(dtype).eps / 2
    np.testing.assert_allclose(params[0].numpy().astype(float), want, rtol=1.01 * u, atol=2e-6)


def test_a_step_is_a_write_that_the_tape_notices():
    p = tw.tensor([1.0, 2.0], requires_grad=True)
    loss = (p * p).sum()
    p.grad = np.ones(2, np.float32)
    tw.optim.SGD([p], lr=0.1).step()
    with pytest.raises(RuntimeError, match="written in place"):
        loss.backward()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("way", ["file", "pickle", "deepcopy"])
def test_state_round_trip_continues_to_the_bit(rng, tmp_path, name, way):
    grads = [rng.standard_normal((3, 5)).astype(np.float32) for _ in range(4)]
    start = rng.standard_normal((3, 5)).astype(np.float32)

    def run(optimizer, some):
        for g in some:
            optimizer.params[0].grad = g
            optimizer.step()

    whole = make(name, [tw.tensor(start, requires_grad=True)])
    run(whole, grads)
    half = make(name, [tw.tensor(start, requires_grad=True)])
    run(half, grads[:2])
    if way == "pickle":
        resumed = pickle.loads(pickle.dumps(half))
    elif way == "deepcopy":
        resumed = copy.deepcopy(half)
    else:
        tw.save(half.state_dict(), tmp_path / "o")
        resumed = make(name, [tw.tensor(half.params[0].numpy(), requires_grad=True)])
        resumed.lr = 7.0
        resumed.load_state_dict(tw.load(tmp_path / "o"))
        assert resumed.param_groups[0].keys() == whole.param_groups[0].keys()
    run(resumed, grads[2:])
    assert resumed.params[0].numpy().tobytes() == whole.params[0].numpy().tobytes()


def test_options_come_back_as_they_were(rng):
    groups = [
        {"params": p, "lr": lr} for p, lr in zip(parameters(rng), (0.1, 0.2, 0.3), strict=True)
    ]
    optimizer = tw.optim.AdamW(groups, betas=(0.8, 0.9), amsgrad=True)
    other = tw.optim.AdamW([{"params": p} for p in parameters(rng)], amsgrad=True)
    other.load_state_dict(optimizer.state_dict())
    for group, restored in zip(optimizer.param_groups, other.param_groups, strict=True):
        for name in optimizer.defaults:
            assert restored[name] == group[name]
            assert type(restored[name]) is type(group[name])


def test_states_that_do_not_fit(rng):
    optimizer = tw.optim.AdamW(parameters(rng))
    state = optimizer.state_dict()
    with pytest.raises(tw.FormatError, match=r"m\.0"):
        optimizer.load_state_dict({k: v for k, v in state.items() if k != "m.0"})
    with pytest.raises(tw.ShapeError, match=r"v\.1 must have shape \(4,\)"):
        optimizer.load_state_dict({**state, "v.1": np.zeros(3)})
    a, b, c = parameters(rng)
    split = tw.optim.AdamW([{"params": [a]}, {"params": [b, c]}])
    other = tw.optim.AdamW([{"params": [a, b]}, {"params": [c]}])
    with pytest.raises(tw.FormatError, match=r"groups\.0 must have 1 parameters, got 2"):
        split.load_state_dict(other.state_dict())
    with pytest.raises(tw.FormatError, match="largest"):
        optimizer.load_state_dict(tw.optim.AdamW(parameters(rng), amsgrad=True).state_dict())


def test_clip_grad_norm(rng):
    params = parameters(rng)
    grads = [p.grad.astype(np.float64) for p in params if p.grad is not None]
    norm = np.sqrt(sum((g**2).sum() for g in grads))
    assert tw.optim.clip_grad_norm_(params, 1e9) == pytest.approx(norm, rel=1e-6)
    np.testing.assert_array_equal(params[0].grad, grads[0])
    assert tw.optim.clip_grad_norm_(params, 0.5) == pytest.approx(norm, rel=1e-6)
    np.testing.assert_allclose(params[0].grad, grads[0] * 0.5 / norm, rtol=1e-5)
    assert tw.optim.clip_grad_norm_(iter(params), 0.5) == pytest.approx(0.5, rel=1e-4)
    params[0].grad[0, 0] = np.inf
    with pytest.raises(RuntimeError, match="norm of the gradients is inf"):
        tw.optim.clip_grad_norm_(params, 0.5, error_if_nonfinite=True)
    assert tw.optim.clip_grad_norm_(params, 0.5) == np.inf
    assert np.isnan(params[0].grad[0, 0])
    assert tw.optim.clip_grad_norm_([tw.tensor([1.0], requires_grad=True)], 1.0) == 0.0


@pytest.mark.parametrize("p", [1.0, 3.0, np.inf])
def test_clip_by_other_norms(rng, p):
    params = parameters(rng, bf16)
    flat = np.concatenate([x.grad.astype(np.float64).ravel() for x in params if x.grad is not None])
    norm = np.linalg.norm(flat, p)
    assert tw.optim.clip_grad_norm_(params, 0.5, norm_type=p) == pytest.approx(norm, rel=1e-6)
    got = np.concatenate([x.grad.astype(np.float64).ravel() for x in params if x.grad is not None])
    np.testing.assert_allclose(got, flat * 0.5 / norm, rtol=2**-8)
    assert tw.optim.clip_grad_norm_([], 1.0, norm_type=p) == 0.0
    with pytest.raises(ValueError, match="norm_type"):
        tw.optim.clip_grad_norm_(params, 0.5, norm_type=0.0)


def test_clip_grad_value(rng):
    params = parameters(rng)
    params[0].grad[0] = [-np.inf, np.nan, np.inf, 0.25, -0.75]
    want = np.clip(params[2].grad, -0.5, 0.5)
    tw.optim.clip_grad_value_(params, 0.5)
    np.testing.assert_array_equal(params[0].grad[0], [-0.5, np.nan, 0.5, 0.25, -0.5])
    np.testing.assert_array_equal(params[2].grad, want)
    tw.optim.clip_grad_value_(params[2], 0.25)
    assert abs(params[2].grad).max() == 0.25
    with pytest.raises(ValueError, match="clip_value"):
        tw.optim.clip_grad_value_(params, -1.0)


def test_what_makes_no_optimizer():
    p = tw.tensor([1.0], requires_grad=True)
    for make, match in [
        (lambda: tw.optim.SGD([]), "params is empty"),
        (lambda: tw.optim.SGD([p], lr=-1.0), "lr"),
        (lambda: tw.optim.SGD([p], nesterov=True), "nesterov"),
        (lambda: tw.optim.SGD([p], momentum=0.9, dampening=0.1, nesterov=True), "dampening"),
        (lambda: tw.optim.Adam([p], betas=(0.9, 1.0)), "betas"),
        (lambda: tw.optim.AdamW([p], eps=-1.0), "eps"),
        (lambda: tw.optim.RMSprop([p], alpha=1.0), "alpha"),
        (lambda: tw.optim.RMSprop([p], weight_decay=np.nan), "weight_decay"),
    ]:
        with pytest.raises(ValueError, match=match):
            make()
