"""The random state behind initial weights, dropout and sampling: a seed and a count of draws.

Every draw gets a generator of its own, NumPy's Philox keyed by (seed, draw). So the state is two
integers; a run that is resumed with them continues with the same numbers to the bit.
"""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from tilewright.errors import DtypeError, ShapeError
from tilewright.recording import current, refuse

_lock = threading.Lock()
_state = {"seed": -1, "draws": 0}  # a negative seed: none was given yet


def manual_seed(n: int) -> None:
    """Start the random stream of seed n, 0 <= n < 2**64, from its beginning."""
    set_state({"seed": n, "draws": 0})


def get_state() -> dict[str, int]:
    """The state as a dict that JSON can hold, for ``set_state``."""
    with _lock:
        _seed_once()
        return dict(_state)


def set_state(state: dict[str, int]) -> None:
    """Continue where ``get_state`` was called."""
    refuse("setting the random state", "do it outside of the step")
    seed, draws = int(state["seed"]), int(state["draws"])
    if not (0 <= seed < 2**64 and 0 <= draws < 2**64):
        raise ValueError(f"random: seed and draws must be in [0, 2**64), got {state}")
    with _lock:
        _state.update(seed=seed, draws=draws)


def generator() -> Any:
    """A numpy.random.Generator of its own for one draw."""
    refuse("a random draw of NumPy's", "draw outside of the step and pass the numbers")
    return _next()


def _next() -> Any:
    with _lock:
        _seed_once()
        key = (_state["seed"], _state["draws"])
        _state["draws"] += 1
    return keyed(*key)


def keyed(seed: int, draw: int = 0) -> Any:
    """The generator that is draw number ``draw`` of a seed; the state is left alone."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, draw], np.uint64)))


def fresh_seed() -> int:
    """One draw of the state, as a seed of ``tw.dropout`` and its kin."""
    seed = int(_next().integers(2**64, dtype=np.uint64))
    if (noted := current()) is not None:
        noted.drew(seed)
    return seed


def checked(op: str, seed: Any) -> int:
    """Return the ``seed`` argument of an op as an int in [0, 2**64)."""
    try:
        value = operator.index(seed)
    except TypeError:
        raise DtypeError(f"{op}: seed must be an int, got {type(seed).__name__}") from None
    if not 0 <= value < 2**64:
        raise ShapeError(f"{op}: seed must be in [0, 2**64), got {value}")
    return value


def words(seed: int, elements: Any) -> Any:
    """The random words behind dropout, as uint32: one for each element number.

    Element n has word n % 4 of Philox4x32-10 at counter (n / 4 low, n / 4 high, 0, 0) with the
    seed as key. The kernels make the same words (csrc/simd/philox.h); this is their definition.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    n = np.asarray(elements, np.uint64)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    block = n >> np.uint64(2)
    c = [block & low, block >> shift, np.zeros_like(n), np.zeros_like(n)]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [b >> shift ^ c[1] ^ np.uint64(key[0]), b & low,
             a >> shift ^ c[3] ^ np.uint64(key[1]), a & low]  # fmt: skip
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.choose((n & np.uint64(3)).astype(np.intp), c).astype(np.uint32)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw from another seed inside the block, and leave the state as it was; None does nothing."""
    if seed is None:
        yield
        return
    before = get_state()
    manual_seed(seed)
    try:
        yield
    finally:
        set_state(before)


def _seed_once() -> None:
    if _state["seed"] < 0:
        _state["seed"] = int.from_bytes(os.urandom(7), "little")
