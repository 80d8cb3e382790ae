"""Instructions that move numbers: loads, stores, conversions; and control."""

from __future__ import annotations

import numpy as np

from ptx.memory import SHARED_WINDOW, Finding
from ptx.parser import TYPES, instruction

U64 = TYPES["u64"]
ANY = r"(?:\.v[24])?\.[bsuf](?:8|16|32|64)"


def _each(operand):
    return operand if type(operand) is tuple else (operand,)


@instruction(rf"ld\.(?:param|global|shared){ANY}")
def _load(b, i):
    memory = b.memory[i.opcode.split(".")[1]]
    registers = _each(i.operands[0])
    values = memory.load(b.addresses(i.operands[1]), i.type, len(registers), b.active(b.warps))
    for n, register in enumerate(registers):
        b.write_active(register, np.ascontiguousarray(values[:, n]))


@instruction(rf"st(?:\.global|\.shared)?{ANY}")
def _store(b, i):
    space = i.opcode.split(".")[1]
    addresses = b.addresses(i.operands[0])
    if space not in b.memory:  # a generic address
        inside = addresses >= SHARED_WINDOW
        if inside.any() != inside.all():
            raise Finding("a store to shared and to global memory at once")
        space = "shared" if inside.any() else "global"
        addresses = addresses - SHARED_WINDOW if inside.any() else addresses
    values = np.stack([b.active(b.read(o, i.type)) for o in _each(i.operands[1])], 1)
    b.memory[space].store(addresses, values, b.active(b.warps))


@instruction(r"cvta\.shared\.u64")
def _to_generic(b, i):
    b.write(i.operands[0], b.read(i.operands[1], U64) + np.uint64(SHARED_WINDOW))


@instruction(r"cvta\.to\.shared\.u64")
def _to_shared(b, i):
    b.write(i.operands[0], b.read(i.operands[1], U64) - np.uint64(SHARED_WINDOW))


@instruction(r"cvta\.to\.global\.u64")
def _to_global(b, i):
    b.write(i.operands[0], b.read(i.operands[1], U64))


@instruction(r"mov\.(?:[busf](?:16|32|64)|pred)")
def _mov(b, i):
    """Also packs a vector into a register, or a register into a vector: the low bits come first."""
    to, source = i.operands
    if type(to) is tuple:
        part = np.dtype(f"u{i.type.itemsize // len(to)}")
        parts = b.read(source, i.type).view(part).reshape(b.threads, len(to))
        for n, register in enumerate(to):
            b.write(register, np.ascontiguousarray(parts[:, n]))
    elif type(source) is tuple:
        part = np.dtype(f"u{i.type.itemsize // len(source)}")
        parts = np.stack([b.read(o, part) for o in source], 1)
        b.write(to, parts.view(f"u{i.type.itemsize}")[:, 0])
    else:
        b.write(to, b.read(source, i.type))


@instruction(r"cvt\.[su](?:8|16|32|64)\.[su](?:8|16|32|64)")
def _integer(b, i):
    b.write(i.operands[0], b.read(i.operands[1], i.type).astype(_target(i)))


@instruction(r"cvt\.rn\.f32\.[su](?:32|64)|cvt\.rn\.(?:f16|bf16)\.f32|cvt\.f32\.(?:f16|bf16)")
def _float(b, i):
    b.write(i.operands[0], b.read(i.operands[1], i.type).astype(_target(i)))


@instruction(r"cvt\.rn\.(?:f16|bf16)x2\.f32")
def _pair(b, i):
    """The first source becomes the high half."""
    to = TYPES[i.opcode.split(".")[2][:-2]]
    high, low = (b.read(o, i.type).astype(to).view(np.uint16) for o in i.operands[1:])
    b.write(i.operands[0], np.stack([low, high], 1).view(np.uint32)[:, 0])


@instruction(r"cvt\.rzi\.s32\.f32")
def _cut(b, i):
    """Toward zero, into range; NaN becomes 0."""
    x = np.nan_to_num(b.read(i.operands[1], i.type).astype(np.float64))
    b.write(i.operands[0], np.clip(np.trunc(x), -(2**31), 2**31 - 1).astype(np.int32))


@instruction(r"cvt\.sat\.f32\.f32")
def _saturate(b, i):
    """Into [0, 1]; NaN becomes 0."""
    b.write(i.operands[0], np.fmin(np.fmax(b.read(i.operands[1], i.type), 0), 1))


def _target(i):
    return TYPES[i.opcode.split(".")[-2]]


@instruction(r"bra(?:\.uni)?")
def _branch(b, i):
    b.place[b.mask] = i.operands[0]


@instruction(r"ret")
def _return(b, i):
    b.done |= b.mask
