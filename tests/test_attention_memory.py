"""Attention's memory is linear in the sequence lengths, whatever shapes the scores."""

import functools
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tilewright as tw
from attention_inputs import arrays, gradients, powers_of_two
from tilewright.autograd import backward


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


H, HKV, D = 4, 2, 8
SHORT, LONG = 256, 2048
# The scores of LONG x LONG would be 64 MiB; a mask for every head 16 MiB and, of bools, 16 MiB.
ROOM = 12 << 20


def mask(T, dtype):
    """One for all heads. It is quadratic itself, but made in place: no temporary hides another."""
    made = np.ones((T, T), dtype)
    made[::3, ::7] = 0
    return made


VARIANTS = {  # as functions of the length
    "plain": lambda T: {},
    "causal": lambda T: {"causal": True},
    "bool mask": lambda T: {"mask": mask(T, bool)},
    "added mask": lambda T: {"mask": mask(T, np.float32)},
    "added mask of 16 bits": lambda T: {"mask": mask(T, np.float16)},
    "padding mask": lambda T: {"mask": np.arange(T) < T - 9},
    "lengths": lambda T: {"kv_lengths": np.array([T - 9])},
    "window": lambda T: {"window": (T // 2, 5)},
    "softcap": lambda T: {"softcap": 2.0},
    "alibi": lambda T: {"alibi_slopes": powers_of_two(H)},
    "dropout": lambda T: {"dropout_p": 0.1, "seed": 1},
    "all": lambda T: VARIANTS["alibi"](T) | VARIANTS["dropout"](T) | VARIANTS["softcap"](T),
}


def step(variant, T, *, varlen=False):
    """Attention forward and backward, grouped heads; returns what still has to be called."""
    options = VARIANTS[variant](T)
    q, k, v = arrays(1, H, HKV, T, T, D)
    if not varlen:
        return functools.partial(gradients, q, k, v, np.ones_like(q), **options)
    flat = [tw.Tensor(x[0].swapaxes(0, 1), requires_grad=True) for x in (q, k, v)]
    ends = np.array([0, 5, T], np.int32)
    return lambda: backward(tw.attention_varlen(*flat, ends, ends, **options), flat[0].data)


def growth(variant, **more):
    """Bytes that the peak of this process grows by when a long sequence follows a short one."""

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    step(variant, SHORT, **more)()
    call, before = step(variant, LONG, **more), peak()
    call()
    return peak() - before


@pytest.mark.parametrize(
    ("variant", "varlen"),
    [(v, False) for v in VARIANTS]
    + [(v, True) for v in VARIANTS if "mask" not in v and v != "lengths"],
)
def test_memory_is_linear_in_the_sequence_length(variant, varlen):
    """In a process of its own: a peak never falls again."""
    program = f"import test_attention_memory as t; print(t.growth({variant!r}, varlen={varlen}))"
    found = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    )
    assert int(found.stdout) < ROOM
