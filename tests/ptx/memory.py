"""Memory as PTX sees it: bytes with bounds, alignment, and who touched what since a barrier."""

from __future__ import annotations

import ctypes

import numpy as np

from ptx.parser import SHARED_BASE

GRAIN = 2  # bytes of one mark: no thread stores fewer to shared memory
SHARED_WINDOW = 1 << 56  # generic addresses of shared memory: no address of a process


class Finding(Exception):
    """What a kernel must not do; the message names the instruction, the block and a thread."""


class Memory:
    """Bytes from an address on."""

    name = "parameter"

    def __init__(self, base, data):
        self.base, self.bytes = base, data
        self._views = {}

    def index(self, addresses, dtype, count):
        """Where the elements lie in ``view(dtype)``: (threads, count)."""
        width = dtype.itemsize * count
        at = addresses.astype(np.int64) - self.base
        if (at % width).any():
            raise Finding(f"{self.name} memory: {width} bytes at no multiple of that")
        self.check(addresses, at, width)
        return (at // dtype.itemsize)[:, None] + np.arange(count)

    def check(self, addresses, at, width):
        if (at < 0).any() or (at + width > len(self.bytes)).any():
            raise Finding(
                f"{self.name} memory out of bounds: {width} bytes at offsets {at.min()} to "
                f"{at.max()} of {len(self.bytes)}"
            )

    def view(self, dtype):
        if dtype not in self._views:
            whole = len(self.bytes) // dtype.itemsize * dtype.itemsize
            self._views[dtype] = self.bytes[:whole].view(dtype)
        return self._views[dtype]

    def load(self, addresses, dtype, count, warps):
        return self.view(dtype)[self.index(addresses, dtype, count)]

    def store(self, addresses, values, warps):
        """``values`` is (threads, count)."""
        self.view(values.dtype)[self.index(addresses, values.dtype, values.shape[1])] = values


class GlobalMemory(Memory):
    """The emulator's device memory as it is: its allocations and nothing between them."""

    name = "global"

    def __init__(self, allocations):
        self.starts = np.array([start for start, _ in allocations], np.int64)
        self.ends = self.starts + np.array([size for _, size in allocations], np.int64)
        base = int(self.starts[0])
        size = -(-(int(self.ends[-1]) - base) // 16) * 16  # the gap behind the last is larger
        data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(base))
        super().__init__(base, data)

    def check(self, addresses, at, width):
        addresses = addresses.astype(np.int64)
        which = np.searchsorted(self.starts, addresses, side="right") - 1
        bad = (which < 0) | (addresses + width > self.ends[which])
        if bad.any():
            n = which[bad][0]
            place = int(addresses[bad][0] - self.starts[n])
            raise Finding(
                f"global memory out of bounds: {width} bytes at offset {place} of an allocation "
                f"of {int(self.ends[n] - self.starts[n])}"
            )


class SharedMemory(Memory):
    """A block's own, poisoned at first, with marks by which races between warps are seen.

    Threads of a block run in step here, so that a missing barrier seldom makes wrong numbers. Since
    the last barrier, no warp may write what another has written or read, nor read what another has
    written.
    """

    name = "shared"

    def __init__(self, size, warps):
        super().__init__(SHARED_BASE, np.full(size, 0xFF, np.uint8))
        grains = -(-size // GRAIN)
        self.epoch = 1  # counts barriers
        self.written = np.zeros(grains, np.int32)
        self.writer = np.zeros(grains, np.int32)
        self.read = np.zeros((warps, grains), np.int32)

    def load(self, addresses, dtype, count, warps):
        grains = self._grains(addresses, dtype.itemsize * count)
        warps = warps[:, None]
        if ((self.written[grains] == self.epoch) & (self.writer[grains] != warps)).any():
            raise Finding("race: a warp reads what another wrote since the last barrier")
        self.read[warps, grains] = self.epoch
        return super().load(addresses, dtype, count, warps)

    def store(self, addresses, values, warps):
        grains = self._grains(addresses, values.dtype.itemsize * values.shape[1])
        warps = warps[:, None]
        seen = self.read[:, grains] == self.epoch
        seen[warps, np.arange(len(grains))[:, None], np.arange(grains.shape[1])] = False
        if seen.any():
            raise Finding("race: a warp writes what another read since the last barrier")
        if ((self.written[grains] == self.epoch) & (self.writer[grains] != warps)).any():
            raise Finding("race: two warps write since the last barrier")
        self.written[grains], self.writer[grains] = self.epoch, warps
        if (self.writer[grains] != warps).any():  # by one instruction
            raise Finding("race: two warps write at once")
        super().store(addresses, values, warps)

    def _grains(self, addresses, width):
        at = addresses.astype(np.int64) - self.base
        self.check(addresses, at, width)
        return (at // GRAIN)[:, None] + np.arange(max(width // GRAIN, 1))
