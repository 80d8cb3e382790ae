"""The entries of all PTX in a folder, and the emulator's launches run by them."""

from __future__ import annotations

import functools
import itertools
import re
import subprocess

import numpy as np

from ptx import movement, numbers, warps  # noqa: F401  (each knows its instructions)
from ptx.machine import Block
from ptx.memory import Finding, GlobalMemory
from ptx.parser import Entry


def common_name(mangled):
    """A mangled name as both compilers would have it: with one name of the anonymous namespace."""
    found = re.search(r"(\d+)_GLOBAL__N_", mangled)
    if not found:
        return mangled
    return mangled[: found.start()] + "A" + mangled[found.end(1) + int(found[1]) :]


@functools.lru_cache
def symbols(program):
    """The functions of a program, local ones too, by their offsets."""
    listed = subprocess.run(
        ["nm", "--defined-only", program], capture_output=True, text=True, check=True
    )
    rows = (line.split() for line in listed.stdout.splitlines())
    return {int(row[0], 16): row[2] for row in rows if row[1] in "tT"}


class Programs:
    """Runs launches of the emulator by nvcc's PTX; those of other kernels are left to it.

    Args:
        folder: where nvcc's .ptx files are, at any depth.
        sources: the sources whose kernels to run.
        change: of an entry's text, before it is read: a test plants faults by it.
    """

    def __init__(self, folder, sources, change=None):
        self.texts = {}
        for path in sorted(p for p in folder.rglob("*.ptx") if p.name.split(".")[0] in sources):
            for entry in re.split(r"^(?:\.visible )?(?=\.entry)", path.read_text(), flags=re.M)[1:]:
                name = re.match(r"\.entry\s+(\w+)", entry)[1]
                self.texts[common_name(name)] = entry.partition("\n}\n")[0]
        self.change = change
        self.blocks = None  # indices of those to run, or all
        self.ran = []  # names of entries, launch by launch; a test may clear it
        self.used = set()  # the same, from the first test on
        self._entries = {}

    def entry(self, name):
        if name not in self._entries:
            text = self.texts[name]
            self._entries[name] = Entry(self.change(text) if self.change else text)
        return self._entries[name]

    def __call__(self, allocations, launch):
        name = common_name(symbols(launch["program"])[launch["offset"]])
        if name not in self.texts:
            return False
        entry = self.entry(name)
        self.ran.append(name)
        self.used.add(name)
        parameters = np.zeros(entry.parameter_bytes, np.uint8)
        for (start, size), given in zip(entry.parameters, launch["parameters"], strict=True):
            if size != len(given):
                raise Finding(f"{launch['what']}: {size} bytes of a parameter, not {len(given)}")
            parameters[start : start + size] = np.frombuffer(given, np.uint8)
        memory = GlobalMemory(allocations)
        grid = [range(n) for n in launch["grid"][::-1]]
        for n, (z, y, x) in enumerate(itertools.product(*grid)):
            if self.blocks is None or n in self.blocks:
                Block(entry, (x, y, z), launch, memory, parameters).run()
        return True
