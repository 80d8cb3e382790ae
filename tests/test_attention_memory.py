"""Attention's memory is linear in the sequence lengths."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("Tq", [1, 2, 130])
def test_keys_outside_a_window_are_not_even_read(Tq, isa):
    """K and V on pages that may not be read, but for the tiles that the window meets."""
    program = f"""
import ctypes, mmap
import numpy as np
import tilewright as tw
tw.set_isa({isa!r})
T, D, seen = 8192, 16, {Tq} + 100
def guarded():
    pages = mmap.mmap(-1, T * D * 4)
    x = np.frombuffer(pages, np.float32).reshape(1, 1, T, D)
    x[...] = np.random.default_rng(0).standard_normal(x.shape)
    hidden = (T - seen) // 256 * 256 * D * 4
    address = ctypes.c_void_p(x.ctypes.data)
    assert hidden % mmap.PAGESIZE == 0 < hidden
    assert ctypes.CDLL(None).mprotect(address, ctypes.c_size_t(hidden), 0) == 0
    return x
q = np.ones((1, 1, {Tq}, D), np.float32)
k, v = guarded(), guarded()
out = tw.attention(q, k, v, window=(100, 0))
inside = tw.attention(q, k[:, :, -seen:], v[:, :, -seen:], window=(100, 0))
np.testing.assert_allclose(out, inside, rtol=1e-4, atol=1e-5)
recorded = [tw.Tensor(x, requires_grad=True) for x in (q, k, v)]
tw.attention(*recorded, window=(100, 0)).backward(q)
assert not recorded[1].grad[0, 0, :-seen].any()
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr or found.returncode


def test_memory_is_linear_in_the_sequence_length():
    """A process that may hold some Tk x D arrays, but not one Tq x Tk: 8 times the length."""
    program = """
import resource, sys
import numpy as np
import tilewright as tw
from tilewright.autograd import Tensor, backward
tw.set_num_threads(1)
def step(T):
    x = [Tensor(np.ones((1, 1, T, 8), np.float32), requires_grad=True) for _ in range(3)]
    backward(tw.attention(*x, causal=True), np.ones((1, 1, T, 8), np.float32))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(step(1024), step(8192))
"""
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    small, large = map(int, found.stdout.split())
    assert large - small < 100 * 1024  # KiB; the scores alone would be 256 MiB
