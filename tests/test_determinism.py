"""A row's bits depend on that row alone: not on threads, repeats, neighbours, batch, or padding."""

from __future__ import annotations

import numpy as np
import pytest

import harness
import tilewright as tw
from tilewright.autograd import Context
from tilewright.registry import OPS

FLOAT32 = harness.DTYPES["float32"]


def bits(result):
    return [np.ascontiguousarray(r).tobytes() for r in harness.as_tuple(result)]


def test_every_op_says_which_inputs_have_rows():
    """``rows`` names the inputs whose first axis is a batch of independent rows; () if none."""
    silent = [
        op.name
        for op in OPS.values()
        if not isinstance(getattr(op.definition, "rows", None), tuple)
    ]
    assert not silent, f"rows = (...) is missing in the op files of {silent}"


@pytest.mark.parametrize(("name", "case", "dtype"), harness.typed_cases(float16=3))
def test_threads_and_repeats(name, case, dtype, isa, threads):
    """Forward and backward: the same bits with 1, 2 and 3 threads, and again."""
    op = OPS[name]
    arguments = harness.inputs(name, case, dtype)
    needs = [n for n in op.grads if harness.is_float(arguments.get(n))]
    found = []
    for count in (1, 2, 3, 3):
        threads(count)
        ctx = Context(frozenset(needs))
        outs = harness.as_tuple(op.forward(ctx, **arguments))
        here = bits(outs)
        if needs and op.backward is not None:
            grads = op.backward(ctx, *[np.ones_like(out) for out in outs])
            here += (
                bits(tuple(g for g in harness.as_tuple(grads) if g is not None))
                if grads is not None
                else []
            )
        found.append(here)
    assert all(f == found[0] for f in found[1:]), f"{name} isa={isa} dtype={dtype} case={case}"


def rows_of(arguments, names, length, rows):
    """The arguments with some rows only; what is broadcast along the batch stays."""
    changed = dict(arguments)
    for n in names:
        x = arguments.get(n)
        if isinstance(x, np.ndarray) and x.ndim and x.shape[0] == length:
            changed[n] = x[rows]
    return changed


@pytest.mark.parametrize(("name", "case", "dtype"), harness.typed_cases(float16=3))
def test_a_row_alone_has_the_bits_it_has_in_the_batch(name, case, dtype, isa):
    op = OPS[name]
    arguments = harness.inputs(name, case, dtype)
    names = getattr(op.definition, "rows", ())
    first = arguments.get(names[0]) if names else None
    whole = harness.as_tuple(harness.call(op, arguments))
    length = len(first) if isinstance(first, np.ndarray) and first.ndim else 0
    if not length or any(w.ndim == 0 or w.shape[0] != length for w in whole) or first.ndim < 2:
        pytest.skip("no batch in this case")
    if arguments.get("axis", -1) in (0, -first.ndim):
        pytest.skip("the op works along the first axis")
    for rows in (slice(0, 1), slice(length - 1, length), slice(length // 2, None), slice(0, 3)):
        alone = harness.as_tuple(harness.call(op, rows_of(arguments, names, length, rows)))
        for got, want in zip(alone, whole, strict=True):
            if len(got) != len(want[rows]):
                pytest.skip("another input spans the batch as well")
            assert harness.same_bits(got, want[rows]), (
                f"{name} isa={isa} dtype={dtype} case={case} {rows}: not the bits of the batch"
            )


def spaced(a, row, offset, fill):
    """``a`` with its rows ``row`` elements apart, from ``offset`` elements behind a whole page."""
    page = 4096 // a.itemsize
    memory = np.full(len(a) * row + offset + 2 * page, fill, a.dtype)
    first = (-memory.ctypes.data % 4096) // a.itemsize + offset
    view = memory[first : first + len(a) * row].reshape(len(a), row)[:, : a.shape[1]]
    view[...] = a
    return view


@pytest.mark.parametrize(("K", "N"), [(40, 48), (64, 16), (512, 96), (1088, 600)])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_matmul_rows_wherever_they_lie(K, N, kind, rng, isa):
    """Rows that tiles load where they are, and rows that are packed: aligned or not, pages apart or
    not. What lies between rows is never met."""
    integers = kind == "int8"
    if integers:
        a, b = (rng.integers(-128, 128, shape, dtype=np.int8) for shape in ((97, K), (K, N)))
    else:
        a, b = (
            rng.standard_normal(shape).astype(harness.DTYPES[kind]) for shape in ((97, K), (K, N))
        )
    product = tw.int8_matmul if integers else tw.matmul
    fill = 101 if integers else np.nan
    want = product(a, b)
    for row in (K, K + 1, K + 24, K + 64, K + 96, -(-K // 2048) * 2048):
        for offset in (0, 1, 64):
            got = product(spaced(a, row, offset, fill), b)
            assert harness.same_bits(got, want), (row, offset)
    assert harness.same_bits(product(spaced(a, K, 0, fill)[::-1], b), want[::-1])


@pytest.mark.parametrize(("M", "K", "N"), [(400, 64, 64), (40, 1, 4096)])
def test_a_small_b_meets_blocks_of_rows_and_columns(M, K, N, rng, isa):
    """Small integers, so that every order of sums gives the same."""
    a, b = (rng.integers(-8, 9, shape) for shape in ((M, K), (K, N)))
    got = tw.matmul(a.astype(np.float32), b.astype(np.float32))
    np.testing.assert_array_equal(got, a @ b)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "tanh", "sigmoid"])
def test_an_element_has_its_bits_among_any_others(name, rng, isa):
    x = np.linspace(-16, 16, 4096, dtype=np.float32)  # with what only some of a vector need
    order = rng.permutation(len(x))

    def value_and_slope(values):
        t = tw.Tensor(values, requires_grad=True)
        y = getattr(tw, name)(t)
        y.sum().backward()
        return y.numpy(), np.asarray(t.grad)

    for got, want in zip(value_and_slope(x[order]), value_and_slope(x), strict=True):
        assert bits(got) == bits(want[order])


@pytest.mark.parametrize(("K", "N"), [(64, 48), (300, 1000), (768, 33)])
def test_matmul_rows_in_any_batch(K, N, rng, dtype, isa, threads):
    """Rows of a through every path that their number selects: in place, packed, batched, split."""
    a = rng.standard_normal((400, K)).astype(dtype)
    b = rng.standard_normal((K, N)).astype(dtype)
    whole = tw.matmul(a, b)
    for count in (1, 2, 3, 4, 5, 13, 14, 15, 16, 31, 168, 169, 337):
        for at in (0, 399 - count, 57):
            threads(1 + count % 3)
            assert harness.same_bits(tw.matmul(a[at : at + count], b), whole[at : at + count]), (
                count,
                at,
            )
    assert harness.same_bits(tw.matmul(a.reshape(8, 50, K), b), whole.reshape(8, 50, N))
    assert harness.same_bits(tw.matmul(a.reshape(100, 4, K), b), whole.reshape(100, 4, N))
    assert harness.same_bits(tw.matmul(a[:, None], b[None]), whole[:, None])
    columns = np.asfortranarray(b)
    assert harness.same_bits(tw.matmul(a[:3], columns), whole[:3])
