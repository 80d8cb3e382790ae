"""float32 means float32, also where roundings all have one sign; and calls keep nothing."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import harness
import tilewright as tw
import tolerance
from tilewright.registry import OPS, Reference

KC = 256  # the longest chain of additions without a break, at every ISA level


def one_signed(kind, M, K, N, rng):
    """Operands whose products all have one sign."""
    if kind == "constant":
        return np.full((M, K), 0.1, np.float32), np.full((K, N), 0.3, np.float32)
    if kind == "full mantissas":
        x = np.float32(2.0 - 2.0**-23)
        return np.full((M, K), x), np.full((K, N), x)
    if kind == "uniform":
        return rng.random((M, K), np.float32), rng.random((K, N), np.float32)
    if kind == "falling":
        scale = (1.0 / np.arange(1, K + 1)).astype(np.float32)
        return np.tile(scale, (M, 1)), np.tile(scale[:, None], (1, N))
    raise ValueError(kind)


@pytest.mark.parametrize("K", [1, 2, 3, 8, 255, 256, 257, 8192])
@pytest.mark.parametrize("kind", ["constant", "full mantissas", "uniform", "falling"])
def test_one_signed_products(kind, K, isa, rng):
    a, b = one_signed(kind, 9, K, 37, rng)
    want = a.astype(np.float64) @ b.astype(np.float64)
    exact = Reference(want, np.abs(want), K)
    got = tw.matmul(a, b)
    allowed = tolerance.chain_bound(exact, got.dtype, KC)
    harness.check_output("matmul one-signed", got, exact, f"isa={isa} K={K} {kind}", allowed)


@pytest.mark.parametrize("K", [1, 2, 3, 5, 8])
def test_short_products_are_within_n_u(K, isa, rng):
    """So few terms have a deterministic bound, which TF32 or bfloat16 units would miss by far."""
    a = rng.standard_normal((33, K)).astype(np.float32)
    b = rng.standard_normal((K, 65)).astype(np.float32)
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    exact = Reference(a64 @ b64, np.abs(a64) @ np.abs(b64), K)
    got = tw.matmul(a, b)
    allowed = tolerance.chain_bound(exact, got.dtype, KC)
    harness.check_output("matmul one-signed", got, exact, f"isa={isa} K={K} short", allowed)


def test_range_of_magnitudes(isa, rng):
    """Rows from 2^-60 to 2^60: each is as exact as if it were alone."""
    scale = np.float32(2.0) ** np.arange(-60, 61, 8, dtype=np.float32)[:, None]
    a = rng.standard_normal((16, 300)).astype(np.float32)
    b = rng.standard_normal((300, 40)).astype(np.float32)
    assert harness.same_bits(tw.matmul(a * scale, b), tw.matmul(a, b) * scale)


@pytest.mark.parametrize("name", OPS)
def test_calls_keep_no_reference_to_their_arguments(name):
    """Also those that raise: an argument's reference count is what it was before."""
    op = OPS[name]
    arguments = dict(harness.inputs(name, op.cases[0], harness.DTYPES["float32"]))
    arrays = [v for v in arguments.values() if isinstance(v, np.ndarray)]
    before = [sys.getrefcount(v) for v in arrays]
    for _ in range(10):
        harness.call(op, arguments)
        with pytest.raises((tw.DtypeError, tw.ShapeError, tw.UnsupportedError)):
            harness.call(op, {**arguments, next(iter(arguments)): object()})
    assert [sys.getrefcount(v) for v in arrays] == before
