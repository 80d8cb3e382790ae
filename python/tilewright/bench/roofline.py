"""What this machine can do, measured in a few seconds with the active ISA level's own instructions.

- multiply-adds a second: independent chains of them on registers (csrc/simd/roofline.cc), products
  of tiles on matrix units (csrc/simd/roofline_amx.cc)
- bytes a second from L2, L3 and memory: streaming reads and copies, whichever moves more; a copy
  counts both directions

A call can't be faster than the larger of operations / peak and bytes / bandwidth of the cache that
its data fits in.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tilewright import _core
from tilewright.runtime import get_num_threads

SECONDS = 0.4  # of each of the nine loops
TERM_PRODUCTS = 6  # of bfloat16 terms, for a float32 product (csrc/simd/gemm_split.cc)
FALLBACK_CACHES = {"L2": 1 << 20, "L3": 16 << 20}  # where the system does not tell


class Level(NamedTuple):
    """A memory level: how many bytes fit it, and how fast they come."""

    name: str
    size: float
    bandwidth: float


class Roofline(NamedTuple):
    """Measured limits for one ISA level and thread count."""

    fma: float  # float32 in registers, a multiply-add counts two
    bf16: float  # bfloat16 on matrix units, likewise; 0 without them
    int8: float  # int8 multiply-adds summed into int32, likewise
    memory: tuple[Level, ...]

    @property
    def float32(self) -> float:
        """Of float32 products: in registers, or six products of bfloat16 terms for one."""
        return max(self.fma, self.bf16 / TERM_PRODUCTS)

    def arithmetic(self, dtype: str) -> tuple[float, str]:
        """Operations a second for operands of this dtype, and on what."""
        if dtype == "int8":
            return self.int8, "int8"
        if dtype == "bfloat16" and self.bf16:
            return self.bf16, "bf16"
        return self.float32, "fma" if self.float32 == self.fma else "terms"

    def limit(self, flops: float, nbytes: float, dtype: str = "float32") -> tuple[float, str]:
        """Seconds a call needs at least, and what binds it."""
        home = next(level for level in self.memory if nbytes <= level.size)
        rate, name = self.arithmetic(dtype)
        traffic = nbytes / home.bandwidth
        return (flops / rate, name) if flops / rate >= traffic else (traffic, home.name)

    def as_dict(self) -> dict[str, Any]:
        """For the JSON: GFLOP/s, GB/s, bytes."""
        memory = {m.name: {"size": m.size, "gbs": m.bandwidth / 1e9} for m in self.memory}
        return {
            "gflops": self.float32 / 1e9,
            "fma_gflops": self.fma / 1e9,
            "bf16_gflops": self.bf16 / 1e9,
            "int8_gops": self.int8 / 1e9,
            "memory": memory,
        }


def cache_sizes(threads: int) -> dict[str, int]:
    """Bytes of L2 (over the threads' cores) and of the L3 that they share."""
    sizes = dict(FALLBACK_CACHES)
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        level, kind, size = ((folder / f).read_text().strip() for f in ("level", "type", "size"))
        if f"L{level}" in sizes and kind != "Instruction" and size.endswith("K"):
            sizes[f"L{level}"] = int(size[:-1]) << 10
    sizes["L2"] *= threads
    return sizes


def measure(seconds: float = SECONDS) -> Roofline:
    """Measure on the active ISA level with the current number of threads."""
    threads = get_num_threads()
    caches = cache_sizes(threads)
    fma = _best(lambda: _core.roofline_multiply_add(8 * threads, 20_000), seconds)
    bf16 = _best(lambda: _core.roofline_multiply_add_bf16(8 * threads, 2_000), seconds)
    int8 = _best(lambda: _core.roofline_multiply_add_int8(8 * threads, 20_000), seconds)
    levels = []
    # Half a cache is filled: read and copied buffers beside whatever else lives there.
    for name, size in (*caches.items(), ("DRAM", 0)):
        working_set = size // 2 or min(4 * caches["L3"], 512 << 20)
        bandwidth = _bandwidth(working_set, threads, seconds)
        levels.append(Level(name, size or float("inf"), bandwidth))
    return Roofline(fma, bf16, int8, tuple(levels))


def _bandwidth(working_set: int, threads: int, seconds: float) -> float:
    x = np.ones(working_set // 8, np.float32)
    y = np.zeros_like(x)
    repeats = max(1, (8 << 20) // working_set)
    read = np.ones(working_set // 4, np.float32)
    return max(
        _best(lambda: _core.roofline_read(read, threads, repeats), seconds),
        _best(lambda: _core.roofline_copy(x, y, threads, repeats), seconds),
    )


def _best(work: Callable[[], float], seconds: float) -> float:
    """Most work a second of many short tries; 0 for work that this level hasn't got."""
    best = 0.0
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end or best == 0.0:
        amount = work()
        if amount == 0:
            return 0.0
        best = max(best, amount / (time.perf_counter() - start))
    return best
