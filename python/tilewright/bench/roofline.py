"""What this machine can do, measured in a few seconds with the active ISA level's own instructions.

- multiply-adds a second: independent chains of them on registers (csrc/simd/roofline.cc,
  roofline_dot.cc), products of tiles on matrix units (csrc/simd/roofline_amx.cc); `units` has those
  of every level up to the active one
- bytes a second from L1, L2, L3 (its near part, and all of it as "far") and memory: streaming
  reads, copies, and copies past the caches; a copy counts both directions. The bandwidth of a
  level is the largest of the three

A call can't be faster than the larger of operations / peak and bytes / bandwidth of the cache that
its data fits in.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tilewright import _core, runtime
from tilewright.runtime import get_num_threads

SECONDS = 0.15  # of each loop, some thirty
NEAR_L3 = 16  # times the L2: 32 MB a core, where that has 2
TERM_PRODUCTS = 6  # of bfloat16 terms, for a float32 product (csrc/simd/gemm_split.cc)
FALLBACK_CACHES = {"L1": 32 << 10, "L2": 1 << 20, "L3": 16 << 20}  # where the system does not tell


class Level(NamedTuple):
    """A memory level: how many bytes fit it, and how fast they come."""

    name: str
    size: float
    read: float
    copy: float = 0.0
    streaming: float = 0.0  # copy by stores past the caches

    @property
    def bandwidth(self) -> float:
        """The most that any way of moving them reached."""
        return max(self.read, self.copy, self.streaming)


class Roofline(NamedTuple):
    """Measured limits for one ISA level and thread count."""

    fma: float  # float32 in registers, a multiply-add counts two
    bf16: float  # bfloat16 pairs in registers or on matrix units, likewise; 0 without
    int8: float  # int8 multiply-adds summed into int32, likewise
    memory: tuple[Level, ...]
    units: tuple[tuple[str, float, float, float], ...] = ()  # level: its fma, bf16, int8

    @property
    def float32(self) -> float:
        """Of float32 products: in registers, or six products of bfloat16 terms for one."""
        return max(self.fma, self.bf16 / TERM_PRODUCTS)

    def arithmetic(self, dtype: str) -> tuple[float, str]:
        """Operations a second for operands of this dtype, and on what."""
        if dtype == "int8":
            return self.int8, "int8"
        if dtype == "bfloat16" and self.bf16 > self.float32:
            return self.bf16, "bf16"
        return self.float32, "fma" if self.float32 == self.fma else "terms"

    def limit(self, flops: float, nbytes: float, dtype: str = "float32") -> tuple[float, str]:
        """Seconds a call needs at least, and what binds it."""
        rate, name = self.arithmetic(dtype)
        traffic, home = self.traffic(nbytes)
        return (flops / rate, name) if flops / rate >= traffic else (traffic, home)

    def traffic(self, nbytes: float) -> tuple[float, str]:
        """Seconds that moving the bytes takes at least, and where they are."""
        home = next(level for level in self.memory if nbytes <= level.size)
        return nbytes / home.bandwidth, home.name

    def as_dict(self) -> dict[str, Any]:
        """For the JSON: GFLOP/s, GB/s, bytes."""
        memory = {
            m.name: {
                "size": m.size,
                "gbs": m.bandwidth / 1e9,
                "read_gbs": m.read / 1e9,
                "copy_gbs": m.copy / 1e9,
                "streaming_gbs": m.streaming / 1e9,
            }
            for m in self.memory
        }
        names = ("fma_gflops", "bf16_gflops", "int8_gops")
        units = {
            level: dict(zip(names, (rate / 1e9 for rate in rates), strict=True))
            for level, *rates in self.units
        }
        return {
            "gflops": self.float32 / 1e9,
            "fma_gflops": self.fma / 1e9,
            "bf16_gflops": self.bf16 / 1e9,
            "int8_gops": self.int8 / 1e9,
            "memory": memory,
            "units": units,
        }


def cache_sizes(threads: int) -> dict[str, int]:
    """Bytes of L1 and L2 (over the threads' cores), and of the L3 that all cores share.

    Large ones are cut in two, "L3" and "far": what a few cores, or a virtual machine, can count on
    is a part of it, and the rest is much slower.
    """
    sizes = dict(FALLBACK_CACHES)
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        level, kind, size = ((folder / f).read_text().strip() for f in ("level", "type", "size"))
        if f"L{level}" in sizes and kind != "Instruction" and size.endswith("K"):
            sizes[f"L{level}"] = int(size[:-1]) << 10
    l1, l2, l3 = sizes["L1"] * threads, sizes["L2"] * threads, sizes["L3"]
    return {"L1": l1, "L2": l2, "L3": min(l3, NEAR_L3 * l2), "far": l3}


def measure(seconds: float = SECONDS) -> Roofline:
    """Measure on the active ISA level with the current number of threads."""
    threads = get_num_threads()
    caches = cache_sizes(threads)
    units = []
    for level in runtime.isas():
        if level.supported:
            with runtime.options(isa=level.name):
                units.append((level.name, *_arithmetic(threads, seconds)))
        if level.active:
            break
    _, fma, bf16, int8 = units[-1]
    levels = []
    for name, size in {**caches, "DRAM": 4 * min(caches["far"], 128 << 20)}.items():
        # Half a cache is filled: read and copied buffers beside whatever else lives there.
        rates = _bandwidths(size if name == "DRAM" else size // 2, threads, seconds)
        levels.append(Level(name, float("inf") if name == "DRAM" else size, *rates))
    return Roofline(fma, bf16, int8, tuple(levels), tuple(units))


def _arithmetic(threads: int, seconds: float) -> tuple[float, float, float]:
    tasks = 8 * threads
    return (
        _best(lambda: _core.roofline_multiply_add(tasks, 20_000), seconds),
        _best(lambda: _core.roofline_multiply_add_bf16(tasks, 10_000), seconds),
        _best(lambda: _core.roofline_multiply_add_int8(tasks, 20_000), seconds),
    )


def _bandwidths(working_set: int, threads: int, seconds: float) -> tuple[float, float, float]:
    """Of reads, copies and copies past the caches."""
    read, x, y = (_aligned(working_set // 4 // part) for part in (1, 2, 2))
    repeats = max(1, (8 << 20) // working_set)
    return (
        _best(lambda: _core.roofline_read(read, threads, repeats), seconds),
        _best(lambda: _core.roofline_copy(x, y, threads, repeats), seconds),
        _best(lambda: _core.roofline_copy_streaming(x, y, threads, repeats), seconds),
    )


def _aligned(count: int) -> Any:
    """Floats of a cache line's alignment, in pages that are there."""
    line = 64
    room = np.ones(count * 4 + line, np.uint8)
    return room[-room.ctypes.data % line :][: count * 4].view(np.float32)


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
