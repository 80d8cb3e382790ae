"""A block of threads: registers, who is where, and barriers.

The threads at the lowest place in the code go first, all of them in one step; those of a branch not
taken wait until the others have come to them. So a block runs in step unless its code diverges.
"""

from __future__ import annotations

import numpy as np

from ptx.memory import Finding, Memory, SharedMemory
from ptx.parser import TYPES, Float, Register

LANES = 32


class Block:
    """One block's run of an entry; ``run`` returns when all threads have ended."""

    def __init__(self, entry, index, launch, global_memory, parameters):
        self.entry, self.index = entry, index
        x, y, z = launch["block"]
        self.threads = n = x * y * z
        if n % LANES:
            raise Finding(f"a block of {n} threads, which are no whole warps")
        linear = np.arange(n, dtype=np.uint32)
        self.warps = (linear // LANES).astype(np.int64)
        places = {
            "tid": (linear % x, linear // x % y, linear // x // y),
            "ntid": (x, y, z),
            "ctaid": index,
            "nctaid": launch["grid"],
        }
        self.registers = {
            f"%{name}.{axis}": np.broadcast_to(np.asarray(value, np.uint32), n)
            for name, values in places.items()
            for axis, value in zip("xyz", values, strict=True)
        }
        self.constants = {}
        self.memory = {
            "global": global_memory,
            "shared": SharedMemory(launch["shared_bytes"], n // LANES),
            "param": Memory(0, parameters),
        }
        self.place = np.zeros(n, np.int64)  # in the code
        self.done = np.zeros(n, bool)
        self.waiting = np.zeros(n, bool)  # at a barrier of the block
        self.held = np.zeros(n, bool)  # for other lanes of the warp
        self.mask = np.ones(n, bool)  # who performs the instruction
        self.all = True
        self.copies = []  # of this block, not committed
        self.groups = []  # committed, not waited for

    # --- operands --------------------------------------------------------------------------------

    def read(self, operand, dtype):
        """The operand's value in each thread."""
        if type(operand) is Register:
            value = self.registers.get(operand.name)
            if value is None:
                value = self._fresh(operand)
            if value.dtype == dtype:
                return value
            if value.dtype.itemsize == dtype.itemsize:
                return value.view(dtype)
            if value.dtype.itemsize > dtype.itemsize:  # its low bytes
                return value.astype(f"u{dtype.itemsize}").view(dtype)
            raise Finding(f"{operand.name} has fewer bits than {dtype}")
        value = self.constants.get((operand, dtype))
        if value is None:
            value = self.constants[operand, dtype] = self._constant(operand, dtype)
        return value

    def write(self, register, value):
        """Give the register of the threads at work their values."""
        own = self.registers.get(register.name)
        if own is None:
            own = self._fresh(register)
        if value.dtype != own.dtype:
            same = value.dtype.itemsize == own.dtype.itemsize
            if not same and (own.dtype.kind == "f" or value.dtype.itemsize > own.dtype.itemsize):
                raise Finding(f"{register.name} takes no {value.dtype}")
            value = value.view(own.dtype) if same else value.astype(own.dtype)
        if self.all:
            own[:] = value
        else:
            np.copyto(own, value, where=self.mask)

    def write_active(self, register, values):
        """The same, where there are values for the threads at work alone."""
        if self.all:
            return self.write(register, values)
        spread = np.zeros(self.threads, values.dtype)
        spread[self.mask] = values
        return self.write(register, spread)

    def addresses(self, operand):
        """Of the threads at work."""
        base = operand.base
        dtype = base.type if type(base) is Register else TYPES["u64"]
        value = self.read(base, dtype).astype(np.int64) + operand.offset
        return value if self.all else value[self.mask]

    def active(self, values):
        return values if self.all else values[self.mask]

    def _fresh(self, register):
        """A register that nobody has written: all its bits are set, a float's is NaN."""
        if register.type.kind == "b":
            made = np.zeros(self.threads, bool)
        else:
            made = np.full(self.threads * register.type.itemsize, 0xFF, np.uint8)
            made = made.view(register.type)
        self.registers[register.name] = made
        return made

    def _constant(self, operand, dtype):
        if type(operand) is Float:
            value = np.full(self.threads, operand.bits, np.uint32)
            return value.view(dtype)
        if dtype.kind == "b":
            return np.full(self.threads, bool(operand))
        bits = 8 * dtype.itemsize
        return np.full(self.threads, operand % (1 << bits), f"u{dtype.itemsize}").view(dtype)

    # --- the run ---------------------------------------------------------------------------------

    def run(self):
        i = None
        try:
            with np.errstate(all="ignore"):
                while not self.done.all():
                    for i in self._steps():
                        i.run(self, i)
                if any(c.size for group in (*self.groups, self.copies) for c in group):
                    raise Finding("the block ends before a cp.async that nobody waited for")
        except Finding as e:
            what = f"{e}\n  by block {self.index}"
            if i is not None:
                what += f", thread {int(np.argmax(self.mask))}, at `{i.text}`"
            raise Finding(what) from None

    def _steps(self):
        """Instructions for the threads at the lowest place, until they jump or meet others."""
        free = ~(self.done | self.waiting | self.held)
        if not free.any():
            self._pass_barrier()
            return
        places = self.place[free]
        at = int(places.min())
        team = ~(self.done | self.waiting) & (self.place == at)
        later = places[places > at]
        limit = int(later.min()) if later.size else len(self.entry.code)
        self.held[team] = False
        code = self.entry.code
        whole = bool(team.all())
        while at < limit:
            i = code[at]
            if i.together:
                complete = (team | self.done).reshape(-1, LANES).all(1).repeat(LANES) & team
                if not complete.all() and (complete != team).any():
                    self.place[team] = at
                    self.held |= team & ~complete
                    if not complete.any():
                        return
                    team, whole = complete, False
            self.mask, self.all = team, whole
            at += 1
            if i.jumps:
                self.place[team] = at
            if i.guard is not None:
                self.mask = team & (self.read(i.guard, i.guard.type) != i.negated)
                self.all = bool(self.mask.all())
                if not self.mask.any():
                    continue
            yield i
            if i.jumps:
                return
        self.place[team] = at

    def _pass_barrier(self):
        """Nobody is free: all wait at one barrier of the block, or never go on."""
        live = ~self.done
        if (self.held & live).any():
            n = int(np.argmax(self.held))
            raise Finding(
                f"lanes of warp {n // LANES} never reach `{self.entry.code[self.place[n]].text}`"
            )
        if self.done.any() or len(set(self.place[live])) > 1:
            raise Finding("barrier divergence: threads end, or wait elsewhere, while others wait")
        i = self.entry.code[self.place[0] - 1]
        if i.opcode.startswith("bar.red"):
            self.mask, self.all = live, True
            value = self.read(i.operands[2], i.operands[2].type)
            self.write(i.operands[0], np.full(self.threads, value.any()))
        self.waiting[:] = False
        self.memory["shared"].epoch += 1
