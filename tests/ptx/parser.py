"""The text of PTX: entries, their parameters, registers and instructions."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

TYPES = {f"{c}{n}": np.dtype(f"u{n // 8}") for c in "bu" for n in (8, 16, 32, 64)}
TYPES |= {f"s{n}": np.dtype(f"i{n // 8}") for n in (8, 16, 32, 64)}
TYPES |= {"f32": np.dtype(np.float32), "f64": np.dtype(np.float64), "pred": np.dtype(bool)}
TYPES |= {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}

SHARED_BASE = 1024  # where a block's shared memory starts: not at 0, as on cards


class Unsupported(Exception):
    """PTX that this interpreter does not know."""


class Register(NamedTuple):
    name: str
    type: np.dtype


class Address(NamedTuple):
    base: Register | int
    offset: int


class Float(NamedTuple):
    bits: int


Operand = Any  # Register, int, Float, Address, a tuple of operands, or the index of a target


@dataclasses.dataclass(slots=True)
class Instruction:
    opcode: str
    operands: list[Operand]
    guard: Register | None
    negated: bool
    type: np.dtype | None  # that its last part names
    run: Callable[[Any, Instruction], None]
    jumps: bool
    together: bool
    text: str


HANDLERS: list[tuple[re.Pattern[str], Callable[[Any, Instruction], None]]] = []
JUMPS = ("bra", "ret", "bar.sync", "bar.red")  # after which other threads may be next
# What every lane of a warp must reach before one goes on.
TOGETHER = ("bar.warp", "shfl", "vote", "ldmatrix", "mma")


def instruction(pattern):
    """Let the function perform the opcodes of this pattern."""

    def register(function):
        HANDLERS.append((re.compile(pattern), function))
        return function

    return register


@functools.cache
def _about(opcode):
    """An instruction's fields from ``type`` to ``together``."""
    for pattern, function in HANDLERS:
        if pattern.fullmatch(opcode):
            kind = TYPES.get(opcode.rpartition(".")[2])
            return kind, function, opcode.startswith(JUMPS), opcode.startswith(TOGETHER)
    raise Unsupported(f"the PTX instruction {opcode}")


class Entry:
    """A kernel: ``code``, its instructions; ``parameters``, the offset and size of each."""

    def __init__(self, text):
        head, _, body = text.partition("\n{\n")
        self.name = re.search(r"\.entry\s+(\w+)", head)[1]
        self.parameters, self.symbols = [], {"_ZN10tilewright3gpu14dynamic_sharedE": SHARED_BASE}
        end = 0
        declared = r"\.param\s+(?:\.align (\d+)\s+)?\.(\w+)\s+(\w+)(?:\[(\d+)\])?"
        for align, kind, name, count in re.findall(declared, head):
            size = TYPES[kind].itemsize * int(count or 1)
            align = int(align or size)
            start = -(-end // align) * align
            self.symbols[name] = start
            self.parameters.append((start, size))
            end = start + size
        self.parameter_bytes = end
        self.code: list[Instruction] = []
        self._scopes: list[dict[str, np.dtype]] = [{}]
        self._scope_count = 0
        self._known: dict[str, Operand] = {}  # outside of scopes
        labels: dict[str, int] = {}
        for statement in _statements(body):
            if statement == "{":
                self._scopes.append({})
                self._scope_count += 1
            elif statement == "}":
                self._scopes.pop()
            elif statement.endswith(":"):
                labels[statement[:-1]] = len(self.code)
            elif statement.startswith(".reg"):
                self._declare(statement)
            elif not statement.startswith(".pragma"):
                self.code.append(self._instruction(statement))
        for i in self.code:
            if i.opcode.startswith("bra"):
                i.operands[0] = labels[i.operands[0]]

    def _declare(self, statement):
        _, kind, names = statement.split(None, 2)
        for name in names.split(","):
            # `%r<8>` is %r0 to %r7; a scope's own names hide those outside.
            name = name.strip()
            count = re.fullmatch(r"(%\w+)<\d+>", name)
            scope = self._scopes[-1]
            if count:
                scope[count[1]] = (TYPES[kind[1:]], "")
            else:
                scope[name] = (TYPES[kind[1:]], f"@{self._scope_count}")

    def _register(self, name):
        for scope in reversed(self._scopes):
            found = scope.get(name) or scope.get(name.rstrip("0123456789"))
            if found:
                return Register(name + found[1], found[0])
        raise Unsupported(f"the register {name}")

    def _instruction(self, text):
        match = _INSTRUCTION.fullmatch(text)
        if not match:
            raise Unsupported(f"the PTX statement {text!r}")
        negated, guard, opcode, operands = match.groups()
        if opcode.startswith("bra"):
            found = [operands]
        else:
            found = [self._operand(o, opcode) for o in _split(operands)]
        register = self._register(guard) if guard else None
        return Instruction(opcode, found, register, bool(negated), *_about(opcode), text)

    def _operand(self, text, opcode):
        known = self._known.get(text)
        if known is None or len(self._scopes) > 1:
            known = self._read_operand(text, opcode)
            if len(self._scopes) == 1:
                self._known[text] = known
        return known

    def _read_operand(self, text, opcode):
        if text[0] == "{":
            return tuple(self._operand(o, opcode) for o in _split(text[1:-1]))
        if text[0] == "[":
            base, _, offset = text[1:-1].partition("+")
            return Address(self._operand(base, opcode), int(offset or 0))
        if "|" in text:
            return tuple(self._operand(o, opcode) for o in text.split("|"))
        if text[0] == "%":
            return Register(text, TYPES["u32"]) if text in SPECIAL else self._register(text)
        if text in self.symbols:
            return self.symbols[text]
        if text.startswith("0f"):
            return Float(int(text[2:], 16))
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
            return int(text.rstrip("U"), 0)
        raise Unsupported(f"the operand {text} of {opcode}")


SPECIAL = {f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"}


_INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_OPERAND = re.compile(r"(?:\{[^}]*\}|\[[^]]*\]|[^,{\[])+")
_LABEL = re.compile(r"\$?\w+:")


def _statements(body):
    """Statements without their semicolon, labels with their colon, and the braces of scopes."""
    for line in body.splitlines():
        line = line.partition("//")[0].strip()
        while line:
            if line[0] in "{}":
                yield line[0]
                line = line[1:].strip()
            elif label := _LABEL.match(line):
                yield label[0]
                line = line[label.end() :].strip()
            else:
                statement, semicolon, line = line.partition(";")
                if not semicolon:
                    raise Unsupported(f"a statement of several lines: {statement}")
                yield statement.strip()
                line = line.strip()


def _split(text):
    """Operands, whose commas may lie within braces."""
    return [part.strip() for part in _OPERAND.findall(text)]
