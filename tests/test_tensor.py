"""Tensor and its arithmetic: values and gradients of every rule, the tape, what it refuses."""

import itertools
import random
import re

import ml_dtypes
import numpy as np
import pytest

import tilewright as tw
from tilewright import cuda

bf16 = ml_dtypes.bfloat16


def away_from_zero(rng, *shape):
    return rng.choice([-1.0, 1.0], shape) * rng.uniform(0.5, 2.0, shape)


def positive(rng, *shape):
    return rng.uniform(0.5, 2.0, shape)


# name -> (function of Tensors, the same of float64 arrays, makers of the operands)
RULES = {
    "add": (lambda a, b: a + b, None, [(away_from_zero, (2, 3)), (away_from_zero, (2, 3))]),
    "add broadcast": (lambda a, b: a + b, None, [(away_from_zero, (2, 3)), (away_from_zero, (3,))]),
    "add scalar": (lambda a: 2.5 + a, None, [(away_from_zero, (2, 3))]),
    "sub": (lambda a, b: a - b, None, [(away_from_zero, (2, 1, 3)), (away_from_zero, (4, 1))]),
    "rsub": (lambda a: 1.5 - a, None, [(away_from_zero, (5,))]),
    "mul": (lambda a, b: a * b, None, [(away_from_zero, (2, 3)), (away_from_zero, (1, 3))]),
    "mul self": (lambda a: a * a, None, [(away_from_zero, (2, 3))]),
    "div": (lambda a, b: a / b, None, [(away_from_zero, (2, 3)), (away_from_zero, (2, 1))]),
    "rdiv": (lambda a: 3.0 / a, None, [(away_from_zero, (4,))]),
    "neg": (lambda a: -a, None, [(away_from_zero, (3,))]),
    "pow number": (lambda a: a**3, None, [(away_from_zero, (2, 3))]),
    "pow": (lambda a, b: a**b, None, [(positive, (2, 3)), (away_from_zero, (3,))]),
    "rpow": (lambda a: 2.0**a, None, [(away_from_zero, (3,))]),
    "exp": (lambda a: a.exp(), np.exp, [(away_from_zero, (2, 3))]),
    "log": (lambda a: a.log(), np.log, [(positive, (2, 3))]),
    "sqrt": (lambda a: a.sqrt(), np.sqrt, [(positive, (2, 3))]),
    "sum": (lambda a: a.sum(), None, [(away_from_zero, (2, 3, 2))]),
    "sum axis": (lambda a: a.sum(axis=1), None, [(away_from_zero, (2, 3, 2))]),
    "sum keepdims": (
        lambda a: a.sum(axis=(0, -1), keepdims=True), None, [(away_from_zero, (2, 3, 2))]
    ),
    "mean": (lambda a: a.mean(), None, [(away_from_zero, (2, 3))]),
    "mean axis": (lambda a: a.mean(axis=-1), None, [(away_from_zero, (2, 3))]),
    "max": (lambda a: a.max(axis=1), None, [(away_from_zero, (3, 4))]),
    "reshape": (lambda a: a.reshape(3, -1), None, [(away_from_zero, (2, 3))]),
    "transpose": (
        lambda a: a.transpose(0, -1), lambda a: a.swapaxes(0, -1), [(away_from_zero, (2, 3, 4))]
    ),
    "permute": (
        lambda a: a.permute(1, 2, 0), lambda a: a.transpose(1, 2, 0), [(away_from_zero, (2, 3, 4))]
    ),
    "broadcast_to": (
        lambda a: a.broadcast_to(4, 2, 3),
        lambda a: np.broadcast_to(a, (4, 2, 3)),
        [(away_from_zero, (2, 1))],
    ),
    "T": (lambda a: a.T, None, [(away_from_zero, (2, 3))]),
    "getitem slice": (lambda a: a[1:, ::-1], None, [(away_from_zero, (3, 4))]),
    "getitem int": (lambda a: a[..., -1, None], None, [(away_from_zero, (3, 4))]),
    "getitem element": (lambda a: a[1, 2], None, [(away_from_zero, (3, 4))]),
    "getitem ids twice": (
        lambda a: a[np.array([0, 2, 0])], None, [(away_from_zero, (3, 4))]
    ),
    "getitem mask": (
        lambda a: a[np.array([True, False, True])], None, [(away_from_zero, (3, 4))]
    ),
    "where": (
        lambda a, b: tw.where(np.array([True, False, True]), a, b),
        lambda a, b: np.where(np.array([True, False, True]), a, b),
        [(away_from_zero, (2, 3)), (away_from_zero, (1, 3))],
    ),
    "concatenate": (
        lambda a, b: tw.concatenate([a, b], axis=1),
        lambda a, b: np.concatenate([a, b], axis=1),
        [(away_from_zero, (2, 3)), (away_from_zero, (2, 1))],
    ),
    "stack": (
        lambda a, b: tw.stack([a, b], axis=-1),
        lambda a, b: np.stack([a, b], axis=-1),
        [(away_from_zero, (2, 3)), (away_from_zero, (2, 3))],
    ),
    "split": (
        lambda a: a.split(2, axis=1)[1] * a.split(2, axis=1)[0],
        lambda a: a[:, 2:4] * a[:, :2],
        [(away_from_zero, (2, 5))],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_values_and_gradients_match_float64(name):
    ours, definition, makers = RULES[name]
    definition = definition or ours
    rng = np.random.default_rng(3)
    arrays = [make(rng, *shape).astype(np.float32) for make, shape in makers]
    exact = [a.astype(np.float64) for a in arrays]
    tensors = [tw.tensor(a, requires_grad=True) for a in arrays]

    y = ours(*tensors)
    want = definition(*exact)
    assert type(y) is tw.Tensor
    assert y.dtype == np.float32
    assert y.shape == np.shape(want)
    np.testing.assert_allclose(y.numpy(), want, rtol=1e-6, atol=1e-6)

    weights = rng.standard_normal(y.shape).astype(np.float32)
    y.backward(weights)
    for i, t in enumerate(tensors):
        assert t.grad.shape == t.shape
        assert t.grad.dtype == t.dtype
        np.testing.assert_allclose(
            t.grad, central_differences(definition, exact, i, weights), rtol=1e-5, atol=1e-5
        )


def central_differences(f, arrays, i, weights, h=1e-5):
    """d(sum(weights * f)) / d(arrays[i]) in float64."""
    grad = np.zeros(arrays[i].shape)
    for at in np.ndindex(*arrays[i].shape):
        sides = []
        for sign in (1.0, -1.0):
            moved = [a.copy() for a in arrays]
            moved[i][at] += sign * h
            sides.append(np.sum(weights * f(*moved)))
        grad[at] = (sides[0] - sides[1]) / (2 * h)
    return grad


def test_matmul_and_the_chain_rule():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((4, 5)), rng.standard_normal((5, 3))
    ta, tb = (tw.tensor(v.astype(np.float32), requires_grad=True) for v in (a, b))
    loss = ((ta @ tb) ** 2).mean()
    loss.backward()
    dy = 2 * (a @ b) / 12
    np.testing.assert_allclose(ta.grad, dy @ b.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(tb.grad, a.T @ dy, rtol=1e-5, atol=1e-5)


def test_a_product_with_a_packed_matrix():
    """b itself is gone: a gets no gradient and says so at once; the others get theirs."""
    w = np.arange(6, dtype=np.float32).reshape(2, 3)
    x, r = np.ones((4, 2), np.float32), tw.tensor(np.ones((4, 3), np.float32), requires_grad=True)
    with pytest.raises(tw.UnsupportedError, match=r"^matmul: b must not be packed .*no_grad"):
        tw.matmul(tw.tensor(x, requires_grad=True), tw.pack(w), activation="relu")
    for activation in (None, "silu"):
        for one in (x, x[0]):
            bias = tw.tensor(np.zeros(3, np.float32), requires_grad=True)
            other = tw.tensor(bias.data, requires_grad=True)
            options = {"activation": activation, "residual": r if one.ndim == 2 else None}
            packed = tw.matmul(one, tw.pack(w), bias=bias, **options)
            plain = tw.matmul(one, w, bias=other, **options)
            assert np.array_equal(packed.data, plain.data)
            packed.sum().backward()
            plain.sum().backward()
            assert np.array_equal(bias.grad, other.grad)
    assert (r.grad == 4).all()


def test_ties_share_the_gradient_of_max():
    x = tw.tensor([1.0, 3.0, 3.0], requires_grad=True)
    x.max().backward()
    assert x.grad.tolist() == [0.0, 0.5, 0.5]


def test_power_at_zero():
    x = tw.tensor([0.0, 2.0], requires_grad=True)
    (x**1).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0]
    x.grad = None
    (x**0).sum().backward()
    assert x.grad.tolist() == [0.0, 0.0]


def test_gradients_of_two_uses_and_two_calls_add_up():
    x = tw.tensor([1.0, 2.0], requires_grad=True)
    (x * 3.0 + x).sum().backward()
    assert x.grad.tolist() == [4.0, 4.0]
    (x * 2.0).sum().backward()
    assert x.grad.tolist() == [6.0, 6.0]


@pytest.mark.parametrize("size", [2, 1 << 19])  # copied by NumPy, and by a kernel
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_gradients_share_no_memory(size, order):
    leaves = [tw.tensor(np.ones(size, np.float32), requires_grad=True) for _ in range(3)]
    given = np.ones(size, np.float32)
    terms = leaves[0] + leaves[1], leaves[2]  # one is a leaf, the other hands the gradient on
    (terms[order[0]] + terms[order[1]]).backward(given)
    for factor, leaf in enumerate(leaves, start=2):
        leaf.grad *= factor
    for factor, leaf in enumerate(leaves, start=2):
        assert (leaf.grad == factor).all()
    assert (given == 1).all()


@pytest.mark.parametrize("dtype", [np.float32, bf16])
def test_dtypes_stay(dtype):
    x = tw.tensor(np.array([1.0, 2.0], dtype), requires_grad=True)
    results = [
        x * 2, 2.0 * x, x + np.float64(1.0), x / 3, x**2, x.exp(), x.sum(), x.mean(), x.max(),
        x + np.arange(2), np.arange(2) - x, tw.where(np.array([True, False]), x, 0.0),
    ]  # fmt: skip
    for y in results:
        assert y.dtype == dtype
        assert type(y.data) is np.ndarray
        x.grad = None
        y.sum().backward()
        assert x.grad.dtype == dtype


def test_mixed_floats_promote_and_gradients_come_back():
    a = tw.tensor(np.ones(3, bf16), requires_grad=True)
    b = tw.tensor(np.ones(3, np.float32), requires_grad=True)
    y = a * b
    assert y.dtype == np.float32
    y.sum().backward()
    assert a.grad.dtype == bf16
    assert b.grad.dtype == np.float32


def test_sums_of_bfloat16_run_in_float32():
    x = tw.tensor(np.ones(1000, bf16))  # a bfloat16 sum sticks at 256
    assert x.sum().item() == 1000.0
    assert x.mean().item() == 1.0


def test_integers_divide_to_float32():
    ids = tw.tensor([1, 2, 3])
    assert (ids / 2).dtype == np.float32
    assert (ids * 0.5).dtype == np.float32
    assert (ids + 1).dtype == ids.dtype
    assert ids.mean().dtype == np.float32


def test_float64_is_refused_with_the_remedy():
    with pytest.raises(tw.DtypeError, match=r"use x\.astype\(np\.float32\)$"):
        tw.tensor(np.zeros(2))
    with pytest.raises(tw.DtypeError, match=r"use x\.astype\(np\.float32\)$"):
        tw.tensor([1.0]) + np.zeros(1)
    with pytest.raises(tw.DtypeError, match="must be floating"):
        tw.tensor([1, 2], requires_grad=True)
    assert tw.tensor([1.0, 2.0]).dtype == np.float32
    assert tw.tensor(np.zeros(2), dtype=np.float32).dtype == np.float32


@pytest.mark.parametrize("dtype", [">f8", ">f4", ">f2", ">i4", np.longdouble, complex, "M8[s]"])
def test_dtypes_that_no_tensor_has(dtype):
    with pytest.raises(tw.DtypeError, match=r"^tensor: x must "):
        tw.tensor(np.ones(3).astype(dtype))
    with pytest.raises(tw.DtypeError, match=r"^tensor: x must "):
        tw.tensor([1, 2], dtype=dtype)
    for x in (tw.tensor([1, 2]), tw.tensor([1.0], requires_grad=True)):
        with pytest.raises(tw.DtypeError, match=r"^to: dtype must "):
            x.to(dtype)
    if np.dtype(dtype).kind in "fi":  # converted where it is asked for
        assert tw.tensor(np.ones(3).astype(dtype), dtype=np.float32).dtype == np.float32


def test_numpy_on_the_left_asks_the_tensor():
    x = tw.tensor([1.0, 2.0], requires_grad=True)
    a = np.ones(2, np.float32)
    for y in (a + x, a - x, a * x, a / x, a**x):
        assert type(y) is tw.Tensor
        assert y.requires_grad
    m = np.ones((2, 2), np.float32)
    assert type(m @ x.reshape(2, 1)) is tw.Tensor


def test_comparisons_are_elementwise_and_off_the_tape():
    x = tw.tensor([1.0, 2.0, 3.0], requires_grad=True)
    for y, want in [
        (x > 2, [False, False, True]), (x >= 2, [False, True, True]), (x < 2, [True, False, False]),
        (x <= x, [True] * 3), (x == 2, [False, True, False]),
        (x != np.full(3, 2.0), [True, False, True]),
    ]:  # fmt: skip
        assert y.numpy().tolist() == want
        assert not y.requires_grad
    assert len({x: 1}) == 1  # hashed by identity
    assert bool(tw.tensor([1.0]) > 0)


def test_array_protocol_is_detached_and_without_copy():
    x = tw.tensor([[1.0, 2.0]], requires_grad=True)
    assert np.shares_memory(np.asarray(x), x.numpy())
    assert np.asarray(x, np.float64).dtype == np.float64
    assert np.shares_memory(np.from_dlpack(x), x.numpy())
    assert x.shape == (1, 2)
    assert (len(x), x.ndim, x.size, x.dtype) == (1, 2, 2, np.float32)
    assert "requires_grad=True" in repr(x)
    assert tw.tensor(3.0).item() == 3.0
    assert not x.detach().requires_grad
    assert np.shares_memory(x.detach().numpy(), x.numpy())


def test_to_converts_and_differentiates():
    x = tw.tensor([1.5, 2.5], requires_grad=True)
    y = x.to(bf16)
    assert y.dtype == bf16
    y.sum().backward()
    assert x.grad.dtype == np.float32
    assert x.to(np.float32) is x
    assert not x.to(np.int32).requires_grad
    with pytest.raises(tw.DtypeError):
        x.to(np.float64)


def test_a_saved_tensor_that_is_written_raises():
    x = tw.tensor([1.0, 2.0], requires_grad=True)
    c = tw.tensor([3.0, 4.0])
    y = (x * c).sum()
    c[0] = 5.0
    with pytest.raises(RuntimeError, match="multiply: b was written in place"):
        y.backward()
    y = (x.exp() * 2.0).sum()
    y.backward()  # exp saved nothing that was written


def test_writing_through_a_view_or_to_a_saved_result_raises_too():
    x = tw.tensor([1.0, 2.0], requires_grad=True)
    c = tw.tensor(np.ones((2, 2), np.float32))
    y = (x * c).sum()
    c[0].reshape(2, 1)[0] = 9.0
    with pytest.raises(RuntimeError, match="written in place"):
        y.backward()
    e = x.exp()
    with tw.no_grad():
        e[0] = 0.0
    with pytest.raises(RuntimeError, match="exp: the result was written"):
        e.sum().backward()


@pytest.mark.parametrize("wrap", [tw.tensor, np.asarray, list])
@pytest.mark.parametrize("place", [lambda ids: ids, lambda ids: (slice(None), ids)])
def test_an_index_may_be_written_to_afterwards(wrap, place):
    x = tw.tensor(np.ones((4, 4), np.float32), requires_grad=True)
    ids, dy = wrap([0, 2, 0]), np.ones((4, 4), np.float32)
    y = x[place(ids)]
    ids[0] = 3
    y.backward(dy[: y.shape[0], : y.shape[1]])
    counts = np.array([2, 0, 1, 0], np.float32)
    want = np.broadcast_to(counts if y.shape[0] == 4 else counts[:, None], (4, 4))
    assert np.array_equal(x.grad, want)


def test_what_was_not_saved_may_be_written():
    x = tw.tensor([1.0, 2.0], requires_grad=True)
    c = tw.tensor([3.0, 4.0])
    y = (x + c).sum()
    c[0] = 5.0
    y.backward()
    assert x.grad.tolist() == [1.0, 1.0]


def test_writing_where_it_would_lose_a_gradient_raises():
    x = tw.tensor([1.0, 2.0], requires_grad=True)
    with pytest.raises(RuntimeError, match="no_grad"):
        x[0] = 3.0
    with pytest.raises(RuntimeError, match="no_grad"):
        tw.tensor([0.0, 0.0])[0] = x[1]
    with tw.no_grad():
        x[0] = 3.0
    assert x.numpy().tolist() == [3.0, 2.0]


def test_backward_twice_without_a_scalar_and_of_the_wrong_shape():
    x = tw.tensor([1.0, 2.0], requires_grad=True)
    y = x * x
    with pytest.raises(RuntimeError, match="pass gradient="):
        y.backward()
    with pytest.raises(tw.ShapeError, match=r"\(2,\).*got \(3,\)"):
        y.backward(np.ones(3, np.float32))
    y.backward(np.ones(2, np.float32))
    with pytest.raises(RuntimeError, match="already"):
        y.backward(np.ones(2, np.float32))
    with pytest.raises(RuntimeError, match="does not require"):
        tw.tensor([1.0]).backward()


def test_no_grad_records_nothing():
    x = tw.tensor([1.0], requires_grad=True)
    with tw.no_grad():
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad


def test_shape_errors_name_the_rule():
    x = tw.tensor(np.zeros((2, 3), np.float32))
    with pytest.raises(tw.ShapeError, match="reshape: shape must hold the 6 elements"):
        x.reshape(4, 2)
    with pytest.raises(tw.ShapeError, match="permute: axes"):
        x.permute(0, 0)


def test_a_long_chain_needs_no_deep_stack():
    x = tw.tensor([1.0], requires_grad=True)
    y = x
    for _ in range(20_000):
        y = y + 1.0
    y.backward()
    assert x.grad.tolist() == [1.0]
    del y  # freeing it must not recurse either


def test_every_axis_combination_of_a_broadcast_sum():
    for pattern in itertools.product([1, 3], repeat=3):
        a = tw.tensor(np.ones(pattern, np.float32), requires_grad=True)
        (a + np.zeros((3, 3, 3), np.float32)).sum().backward()
        assert a.grad.shape == pattern
        assert np.all(a.grad == 27 / np.prod(pattern))


LINEAR = [
    lambda rng, pool: rng.choice(pool) + rng.choice(pool),
    lambda rng, pool: rng.choice(pool) - rng.choice(pool),
    lambda rng, pool: -rng.choice(pool),
    lambda rng, pool: rng.choice(pool) * 2.0,
    lambda rng, pool: rng.choice(pool).T,
    lambda rng, pool: rng.choice(pool).reshape(9).reshape(3, 3),
    lambda rng, pool: rng.choice(pool)[::-1],
    lambda rng, pool: rng.choice(pool).sum(axis=0, keepdims=True) + rng.choice(pool),
    lambda rng, pool: tw.concatenate([t[:1] for t in (rng.choice(pool),) * 3]),
    lambda rng, pool: tw.concatenate(rng.choice(pool).split(2, axis=1)[::-1], axis=1),
]


@pytest.mark.parametrize("seed", range(60))
def test_random_graphs_of_views_and_sums(seed):
    """Gradients are added in place where nobody else holds them: no order of views may show it.

    The functions are linear, so that their exact gradient is their value at each unit vector.
    """

    def f(x):
        rng = random.Random(seed)
        pool = [x]
        for _ in range(12):
            pool.append(rng.choice(LINEAR)(rng, pool))
        total = sum((t * float(i + 1) for i, t in enumerate(pool[-4:])), start=pool[-1])
        return (total * np.arange(9, dtype=np.float32).reshape(3, 3)).sum()

    x = tw.tensor(np.zeros((3, 3), np.float32), requires_grad=True)
    f(x).backward()
    units = np.eye(9, dtype=np.float32).reshape(9, 3, 3)
    want = np.array([f(tw.tensor(unit)).item() for unit in units]).reshape(3, 3)
    np.testing.assert_array_equal(x.grad, want)


def test_iteration_gives_views_on_the_tape():
    x = tw.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    first, second = x
    (first * second).sum().backward()
    assert x.grad.tolist() == [[3.0, 4.0], [1.0, 2.0]]
    assert np.shares_memory(first.numpy(), x.numpy())
    with pytest.raises(TypeError):
        iter(tw.tensor(1.0))
    assert list(tw.tensor(np.zeros((0, 3), np.float32))) == []


def test_devices():
    x = tw.tensor([1.0], device="cpu")
    assert x.device == "cpu"
    assert x.to("cpu") is x
    assert x.to("bfloat16").dtype == bf16
    with pytest.raises(tw.DeviceError, match=r"to: device must be 'cpu'.*got 'gpu'"):
        x.to("gpu")


@pytest.mark.skipif(not cuda.lacks(), reason="a GPU is there")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_missing(device):
    missing = rf"device 'cuda' can't be used: {re.escape(cuda.lacks())}"
    with pytest.raises(tw.DeviceError, match=f"^to: {missing}"):
        tw.tensor([1.0]).to(device)
    with pytest.raises(tw.DeviceError, match=f"^tensor: {missing}"):
        tw.tensor([1.0], device=device)


def test_out_is_a_write_too():
    x = tw.tensor([1.0, -2.0], requires_grad=True)
    c = tw.tensor([3.0, 4.0])
    y = (x * c).sum()
    with tw.no_grad():
        assert tw.relu(tw.tensor([5.0, 6.0]), out=c) is c
    with pytest.raises(RuntimeError, match="multiply: b was written in place"):
        y.backward()


def test_a_gradient_of_another_dtype_or_kind_is_taken_as_it_is_meant():
    x = tw.tensor([1.0, 2.0], requires_grad=True)
    (x * x).backward(gradient=tw.tensor([1.0, 0.5]))
    assert x.grad.tolist() == [2.0, 2.0]
    assert type(x.grad) is np.ndarray
